"""The text encoder of CLIP ViT-L/14: token ids (B, 77) -> one embedding a token (B, 77, 768) (Radford et al. 2021).

SD 1.x uses the last layer's output after the final LayerNorm. The tokenizer is `transformers.CLIPTokenizer`; 49408
words, 77 places, padding with the end-of-text token. Attribute names are the checkpoint's, so that loading is a strict
`load_state_dict`. Letters in shape comments: B batch, L = 77 tokens, C channels, h heads, d = C / h.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

MAX_TOKENS = 77  # start and end of text included


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)  # OpenAI's approximation; the real GELU is not close enough


class Embeddings(nn.Module):
    def __init__(self, vocab_size, length, c):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, c)
        self.position_embedding = nn.Embedding(length, c)

    def forward(self, tokens):
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        if c % heads:
            raise ValueError(f"{heads} heads do not divide {c} channels")
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            rearrange(proj(x), "b l (h d) -> b h l d", h=self.heads)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(
            q, k, v, is_causal=True
        )  # a token sees itself and what came before
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))


class MLP(nn.Module):
    def __init__(self, c, c_hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, c_hidden), nn.Linear(c_hidden, c)

    def forward(self, x):
        return self.fc2(quick_gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, c, c_hidden, heads, eps):
        super().__init__()
        self.self_attn, self.layer_norm1 = SelfAttention(c, heads), nn.LayerNorm(c, eps)
        self.mlp, self.layer_norm2 = MLP(c, c_hidden), nn.LayerNorm(c, eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextModel(nn.Module):
    def __init__(self, vocab_size, length, c, c_hidden, n, heads, eps):
        super().__init__()
        self.embeddings = Embeddings(vocab_size, length, c)
        layers = nn.ModuleList(Layer(c, c_hidden, heads, eps) for _ in range(n))
        self.encoder = nn.ModuleDict(
            {"layers": layers}
        )  # a dict only for the name `encoder.layers`
        self.final_layer_norm = nn.LayerNorm(c, eps)

    def forward(self, tokens):
        x = self.embeddings(tokens)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPText(nn.Module):
    """Arguments are the keys of `text_encoder/config.json`; the defaults are SD 1.4's."""

    def __init__(
        self,
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=MAX_TOKENS,
        layer_norm_eps=1e-5,
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
        )  # a wrapper for the name

    def forward(self, tokens):
        """Token ids (B, 77) -> embeddings (B, 77, C)."""
        return self.text_model(tokens)


def tokenize(tokenizer, prompts):
    """Prompts -> (ids (B, 77) padded with the tokenizer's padding, which of the prompts were cut to fit)."""
    ids = tokenizer(
        prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    whole = tokenizer(prompts, verbose=False).input_ids
    return ids, [len(tokens) > MAX_TOKENS for tokens in whole]
