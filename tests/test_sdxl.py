"""SDXL computes what diffusers and transformers compute. Planted mistakes must make a test fail."""

import common
import pytest
import torch
from common import CROSS_DOWN, CROSS_UP, DOWN, TOLERANCE, UP, randn, relative
from diffusers import UNet2DConditionModel
from test_mistakes import after_init, passes, replace
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import clip_text
import sdxl

XL = dict(  # SDXL's numbers, which are our defaults
    block_out_channels=[320, 640, 1280],
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
TINY = dict(  # P is 24
    block_out_channels=[16, 32, 32],
    transformer_layers_per_block=[1, 1, 3],
    attention_head_dim=[2, 4, 8],
    cross_attention_dim=40,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=72,
    norm_num_groups=4,
)
TEXT = dict(vocab_size=99, intermediate_size=48, num_hidden_layers=3)
TEXT_1 = TEXT | dict(hidden_size=16, num_attention_heads=2)
TEXT_2 = TEXT | dict(hidden_size=24, num_attention_heads=4, projection_dim=24)
XL_2 = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)


# ---------------------------------------------------------------------- twins and comparisons
def unet_twin(**sizes):
    return UNet2DConditionModel(
        down_block_types=[DOWN, CROSS_DOWN, CROSS_DOWN],
        up_block_types=[CROSS_UP, CROSS_UP, UP],
        use_linear_projection=True,
        addition_embed_type="text_time",
        **sizes,
    )


def text_twin(**sizes):
    """The second text encoder. Its end token has SDXL's wrong id, 2, in the config."""
    sizes = dict(projection_dim=1280, hidden_act="gelu", eos_token_id=2, pad_token_id=1) | sizes
    return CLIPTextModelWithProjection(CLIPTextConfig(**sizes))


def pair(ours, theirs, seed=0):
    """The twin, with the random numbers of our network."""
    common.randomise(ours.to_empty(device="cpu"), seed)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


def unet_error(height=15, width=13):
    with torch.device("meta"):
        ours, theirs = sdxl.UNetXL(**TINY), unet_twin(**TINY)
    pair(ours, theirs)
    z, t, context = randn(3, 4, height, width), torch.tensor([999, 1, 500]), randn(3, 78, 40)
    size = [8 * height, 8 * width]
    added = dict(text_embeds=context[:, -1, :24], time_ids=torch.tensor([[*size, 0, 0, *size]] * 3))
    expected = theirs(z, t, context[:, :-1], added_cond_kwargs=added).sample
    return relative(ours(z, t, context), expected)


def text_error():
    """The rows of two prompts, the second one with "!" behind its end in the second tokenizer."""
    with torch.device("meta"):
        second, second_twin = sdxl.CLIPTextProjection(**TEXT_2), text_twin(**TEXT_2)
    pair(second, second_twin)
    positions = second_twin.text_model.embeddings
    positions.position_ids = torch.arange(77)[None]  # in no file
    first, first_twin = common.pair("text_encoder", **TEXT_1)
    tokens = common.padded_tokens(99)
    tokens_2 = torch.where((tokens == 98).cumsum(1) > 1, 0, tokens)
    states = first_twin(tokens, output_hidden_states=True).hidden_states[-2]
    theirs = second_twin(tokens_2, output_hidden_states=True)
    states = torch.cat([states, theirs.hidden_states[-2]], dim=2)
    pooled = torch.cat([theirs.text_embeds, torch.zeros(2, 16)], dim=1)
    ours = sdxl.CLIPTextXL(first, second)(tokens, tokens_2)
    return max(relative(ours[:, :77], states), relative(ours[:, 77], pooled))


# ---------------------------------------------------------------------- networks
def test_names_and_shapes_are_sdxls():
    with torch.device("meta"):
        networks = [
            (sdxl.UNetXL(), unet_twin(**XL), 1680, 2_567_463_684),
            (sdxl.CLIPTextProjection(), text_twin(**XL_2), 517, 694_659_840),
        ]
    for ours, theirs, tensors, parameters in networks:
        shapes = {name: x.shape for name, x in ours.state_dict().items()}
        assert shapes == {name: x.shape for name, x in theirs.state_dict().items()}
        assert len(shapes) == tensors
        assert sum(x.numel() for x in ours.parameters()) == parameters
        eps = {name: m.eps for name, m in ours.named_modules() if hasattr(m, "eps")}
        their_eps = {name: m.eps for name, m in theirs.named_modules() if hasattr(m, "eps")}
        assert eps == their_eps


@pytest.mark.parametrize("size", [(16, 8), (15, 13)])
def test_unet(size):
    assert unet_error(*size) <= TOLERANCE


def test_text_encoders():
    assert text_error() <= TOLERANCE


# ---------------------------------------------------------------------- mistakes
def last_layer(model, tokens):
    x = model.embeddings(tokens)
    for layer in model.encoder["layers"]:
        x = layer(x)
    return x


def with_final_norm(model, tokens, right=sdxl.before_last):
    return model.final_layer_norm(right(model, tokens))


def quick_gelu(self):
    for layer in self.text_model.encoder["layers"]:
        layer.mlp.act = clip_text.quick_gelu


def width_first(self, z, right=sdxl.UNetXL.sizes):
    return right(self, z.transpose(2, 3))


def pooled_state_last(self):
    first = self.add_embedding.linear_1
    first.register_forward_pre_hook(lambda _, x: (x[0].roll(-24, dims=1),))


MISTAKES = {
    "the last layer's states": (replace(sdxl, "before_last", last_layer), text_error),
    "the final LayerNorm": (replace(sdxl, "before_last", with_final_norm), text_error),
    "quick_gelu": (after_init(sdxl.CLIPTextProjection, quick_gelu), text_error),
    "width before height": (replace(sdxl.UNetXL, "sizes", width_first), unet_error),
    "pooled state after the sizes": (after_init(sdxl.UNetXL, pooled_state_last), unet_error),
}


@pytest.mark.parametrize("plant, comparison", MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_seen(plant, comparison, monkeypatch):
    plant(monkeypatch)
    assert not passes(comparison)
