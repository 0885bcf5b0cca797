"""CLIP ViT-L/14's text encoder: token ids (B, 77) -> one embedding per token (B, 77, 768).

Radford et al. 2021 (arXiv 2103.00020). SD 1.x uses the last layer's output after the final
LayerNorm. The tokenizer is `transformers.CLIPTokenizer`, with 49408 tokens. It fills a prompt up
to 77 tokens with the end-of-text token.

Attribute names are the checkpoint's names, so loading is `load_state_dict(strict=True)`.

Words: the *embedding* of a prompt is the output for it, 77 vectors. One of these vectors is a text
*state* (closed_form.py). A *token embedding* is a row of the table at the input.

Letters in the shape comments: B batch, L = 77 tokens, C channels (768; D in the other files), h
heads (12), d = C / h.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

MAX_TOKENS = 77  # with the start token and the end token
TOKEN_EMBEDDING = "text_model.embeddings.token_embedding.weight"  # its name in the checkpoint


def quick_gelu(x):
    """OpenAI's approximation of the GELU, with which CLIP was trained."""
    return x * torch.sigmoid(1.702 * x)


class Embeddings(nn.Module):
    """One vector per token, plus one per position."""

    def __init__(self, vocab_size, length, c):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, c)
        self.position_embedding = nn.Embedding(length, c)

    def forward(self, tokens):
        x = self.token_embedding(tokens)  # (B, L, C)
        return x + self.position_embedding.weight[: tokens.shape[1]]


class SelfAttention(nn.Module):
    """Multi-head attention with a causal mask: a token sees itself and the tokens before it."""

    def __init__(self, c, heads):
        super().__init__()
        if c % heads:
            raise ValueError(f"{heads} heads do not divide {c} channels")
        self.heads = heads
        self.k_proj = nn.Linear(c, c)
        self.v_proj = nn.Linear(c, c)
        self.q_proj = nn.Linear(c, c)
        self.out_proj = nn.Linear(c, c)

    def forward(self, x):
        q = rearrange(self.q_proj(x), "b l (h d) -> b h l d", h=self.heads)  # (B, h, L, d)
        k = rearrange(self.k_proj(x), "b l (h d) -> b h l d", h=self.heads)
        v = rearrange(self.v_proj(x), "b l (h d) -> b h l d", h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, h, L, d)
        return self.out_proj(rearrange(y, "b h l d -> b l (h d)"))  # (B, L, C)


class MLP(nn.Module):
    def __init__(self, c, c_hidden, act):
        super().__init__()
        self.fc1 = nn.Linear(c, c_hidden)
        self.act = act
        self.fc2 = nn.Linear(c_hidden, c)

    def forward(self, x):
        x = self.act(self.fc1(x))  # (B, L, c_hidden)
        return self.fc2(x)  # (B, L, C)


class Layer(nn.Module):
    """A transformer layer: attention, then an MLP, each with a LayerNorm before it."""

    def __init__(self, c, c_hidden, heads, eps, act):
        super().__init__()
        self.self_attn = SelfAttention(c, heads)
        self.layer_norm1 = nn.LayerNorm(c, eps)
        self.mlp = MLP(c, c_hidden, act)
        self.layer_norm2 = nn.LayerNorm(c, eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextModel(nn.Module):
    """Embeddings, `n` layers, and a last LayerNorm."""

    def __init__(self, vocab_size, length, c, c_hidden, n, heads, eps, act):
        super().__init__()
        self.embeddings = Embeddings(vocab_size, length, c)
        layers = nn.ModuleList(Layer(c, c_hidden, heads, eps, act) for _ in range(n))
        self.encoder = nn.ModuleDict({"layers": layers})  # a dict only for the name
        self.final_layer_norm = nn.LayerNorm(c, eps)

    def forward(self, tokens):
        x = self.embeddings(tokens)  # (B, L, C)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPText(nn.Module):
    """The text encoder: a TextModel, with `text_model.` in front of the checkpoint's names.

    Its arguments are keys of `text_encoder/config.json`; their defaults are SD 1.4's.
    """

    def __init__(
        self,
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=MAX_TOKENS,
        layer_norm_eps=1e-5,
        hidden_act="quick_gelu",
    ):
        super().__init__()
        self.text_model = TextModel(
            vocab_size,
            max_position_embeddings,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            layer_norm_eps,
            {"quick_gelu": quick_gelu, "gelu": F.gelu}[hidden_act],
        )

    def forward(self, tokens):
        """Token ids (B, 77) -> embeddings (B, 77, C)."""
        return self.text_model(tokens)


def tokenize(tokenizer, prompts):
    """Prompts -> (token ids (B, 77), a list that says which prompts were too long and were cut).

    Short prompts are filled up with the tokenizer's padding token.
    """
    ids = tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    uncut = tokenizer(prompts, verbose=False).input_ids
    return ids, [len(tokens) > MAX_TOKENS for tokens in uncut]
