"""The three networks compute what diffusers' and transformers' networks compute.

Each test fills our network with random numbers, gives the same tensors to its twin in the other
library (common.pair), and compares the outputs. First whole networks, then their parts, then the
constants that such a comparison could miss.
"""

import common
import pytest
import torch
from common import TOLERANCE, UNETS, pair, randn, relative

import clip_text
import scheduler
import unet
import vae

# With a gain or scale of 3e-3, the norms read variances of 1e-5. There, their eps matters.
GAINS = pytest.mark.parametrize("gain", [1.0, 3e-3])
SCALES = pytest.mark.parametrize("scale", [1.0, 3e-3])


# ---------------------------------------------------------------------- names and shapes
@pytest.mark.parametrize(
    "network, tensors, parameters",
    [("unet", 686, 859_520_964), ("vae", 248, 83_653_863), ("text_encoder", 196, 123_060_480)],
)
def test_names_and_shapes_are_sd14s(network, tensors, parameters):
    ours, theirs = common.empty_pair(network)
    shapes = {name: x.shape for name, x in ours.state_dict().items()}
    their_shapes = {name: x.shape for name, x in theirs.state_dict().items()}
    assert common.their_names(shapes, theirs) == their_shapes
    assert len(shapes) == tensors
    assert sum(x.numel() for x in ours.parameters()) == parameters


def test_text_encoder_has_the_names_of_sd14s_file():
    ours, _ = common.empty_pair("text_encoder")
    assert all(name.startswith("text_model.") for name in ours.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        dict(layers_per_block=1),
        dict(block_out_channels=[16, 32, 64]),
        dict(down_block_types=[common.DOWN] * 3),
        dict(up_block_types=[common.UP] * 5),
    ],
    ids=str,
)
def test_another_u_is_refused(change):
    """The UNet's rows are SD 1.x's. A config with other rows must not make a network."""
    with torch.device("meta"), pytest.raises(ValueError, match="4 blocks each way"):
        unet.UNet(**UNETS["2 heads, plain first"] | change)


# ---------------------------------------------------------------------- small networks
@GAINS
@pytest.mark.parametrize("size", [(16, 8), (15, 13)])
@pytest.mark.parametrize("name", UNETS)
def test_unet(name, size, gain):
    assert common.unet_error(gain, name, size) <= TOLERANCE


@GAINS
@pytest.mark.parametrize("way", ["moments", "encode", "decode"])
def test_vae(way, gain):
    assert common.vae_error(way, gain) <= TOLERANCE


@GAINS
def test_text_encoder(gain):
    assert common.text_error(gain) <= TOLERANCE


def test_unet_expands_one_prompt_to_the_batch():
    ours, _ = pair("unet", **UNETS["2 heads, plain first"])
    z, c = randn(3, 4, 15, 13), randn(1, 7, 40, seed=1)
    assert torch.equal(ours(z, 500, c), ours(z, 500, c.repeat(3, 1, 1)))


def test_unet_refuses_a_wrong_number_of_prompts():
    """2 prompts for 4 latents could mean two things. Only 1 prompt or 4 prompts are allowed."""
    ours, _ = pair("unet", **UNETS["2 heads, plain first"])
    with pytest.raises(RuntimeError, match="expand"):
        ours(randn(4, 4, 8, 8), 500, randn(2, 7, 40))


def test_unet_takes_one_timestep_for_the_batch():
    ours, _ = pair("unet", **UNETS["2 heads, plain first"])
    z, context = randn(2, 4, 8, 8), randn(2, 7, 40, seed=1)
    expected = ours(z, torch.tensor([321, 321]), context)
    assert torch.equal(ours(z, 321, context), expected)
    assert torch.equal(ours(z, torch.tensor(321), context), expected)


# ---------------------------------------------------------------------- parts
@SCALES
@pytest.mark.parametrize("part", common.UNET_PARTS)
def test_unet_part(part, scale):
    assert common.unet_part(part, scale) <= TOLERANCE


@SCALES
@pytest.mark.parametrize("part", common.VAE_PARTS)
def test_vae_part(part, scale):
    assert common.vae_part(part, scale) <= TOLERANCE


def test_text_layer():
    assert common.text_layer_error() <= TOLERANCE


def test_timestep_embedding():
    assert common.timestep_error() <= TOLERANCE


# ---------------------------------------------------------------------- constants
@pytest.mark.parametrize("network", common.TWINS)
def test_eps_of_every_norm(network):
    common.same_eps(network)


def test_eps_in_numbers():
    """The same without the twins: if their defaults change, the test above would not see it."""
    with torch.device("meta"):
        networks = {"unet": unet.UNet(), "vae": vae.VAE(), "text_encoder": clip_text.CLIPText()}
    for network, module in networks.items():
        for name, m in module.named_modules():
            if isinstance(m, torch.nn.LayerNorm):
                assert m.eps == 1e-5, name
            elif isinstance(m, torch.nn.GroupNorm):
                # `.norm` is the GroupNorm of the UNet's transformers.
                is_small = network == "vae" or name.endswith(".norm")
                assert m.eps == (1e-6 if is_small else 1e-5), name


def test_eight_heads_in_every_block():
    ours, theirs = common.empty_pair("unet")
    heads = {name: m.heads for name, m in ours.named_modules() if isinstance(m, unet.Attention)}
    assert len(heads) == 32
    assert set(heads.values()) == {8}
    assert heads == {name: theirs.get_submodule(name).heads for name in heads}


def test_schedule_constants():
    alphas = scheduler.DDIM(50).alphas_cumprod
    assert torch.equal(alphas, common.their_scheduler("ddim", 50).alphas_cumprod)
    first_beta = 1 - alphas[0].item()
    last_beta = 1 - (alphas[-1].double() / alphas[-2].double()).item()
    # 1 − ᾱ has lost three of float32's seven digits.
    assert first_beta == pytest.approx(0.00085, rel=1e-4)
    assert last_beta == pytest.approx(0.012, rel=1e-4)


def test_quick_gelu():
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001)
    expected = ACT2FN["quick_gelu"](x)
    assert relative(clip_text.quick_gelu(x), expected) <= 1e-6  # one function: a few roundings


# ---------------------------------------------------------------------- prompts
def test_text_encoder_does_not_look_ahead():
    ours, _ = pair("text_encoder", **common.TEXT)
    tokens = common.padded_tokens(99)
    changed = tokens.clone()
    changed[:, 20:] = 3
    a, b = ours(tokens), ours(changed)
    assert relative(a[:, :20], b[:, :20]) <= 1e-6
    assert relative(a[:, 20:], b[:, 20:]) > 0.1


def test_prompts_are_padded_with_end_of_text():
    common.padding()


def test_tokenize_says_which_prompts_were_cut(model_folder):
    """75 words fit between the start token and the end token."""
    import weights

    tokenizer = weights.load_tokenizer(model_folder)
    ids, cut = clip_text.tokenize(tokenizer, ["a star " * 60, "a " * 75, "a " * 76])
    assert ids.shape == (3, 77)
    assert cut == [True, False, True]


# ---------------------------------------------------------------------- latents
def test_vae_samples_with_a_generator():
    ours, theirs = pair("vae", **common.VAE)
    x = randn(2, 3, 32, 24)
    sampled = ours.encode(x, torch.Generator().manual_seed(5))
    posterior = theirs.encode(x).latent_dist
    expected = 0.18215 * posterior.sample(torch.Generator().manual_seed(5))
    assert relative(sampled, expected) <= TOLERANCE
    assert torch.equal(sampled, ours.encode(x, torch.Generator().manual_seed(5)))
    assert relative(sampled, ours.encode(x)) > 0.1  # without a generator: the mean


def test_scaling_factor():
    ours, theirs = pair("vae", **common.VAE)
    x = randn(1, 3, 32, 32)
    assert ours.scaling_factor == theirs.config.scaling_factor == 0.18215
    assert relative(ours.encode(x), 0.18215 * ours.moments(x)[0]) <= 1e-6
    expected = theirs.decode(theirs.encode(x).latent_dist.mean).sample
    assert relative(ours.decode(ours.encode(x)), expected) <= TOLERANCE
    assert vae.VAE(**common.VAE, scaling_factor=0.5).scaling_factor == 0.5


def test_log_variance_is_clamped():
    ours, theirs = pair("vae", **common.VAE)
    ours.quant_conv.weight *= 100  # the twin's, too: the two share their tensors
    x = randn(1, 3, 32, 32)
    _, logvar = ours.moments(x)
    assert logvar.min() == -30
    assert logvar.max() == 20
    assert relative(logvar, theirs.encode(x).latent_dist.logvar) <= TOLERANCE


# ---------------------------------------------------------------------- SD 1.4's size
def full_size_error(network):
    ours, theirs = pair(network)
    if network == "unet":
        z, t, context = randn(1, 4, 16, 16), torch.tensor([601]), randn(1, 77, 768, seed=1)
        return relative(ours(z, t, context), theirs(z, t, context).sample)
    if network == "vae":
        x, z = randn(1, 3, 64, 64), randn(1, 4, 8, 8)
        encoder_error = relative(ours.moments(x)[0], theirs.encode(x).latent_dist.mean)
        decoder_error = relative(ours.decode(z), theirs.decode(z / 0.18215).sample)
        return max(encoder_error, decoder_error)
    tokens = common.padded_tokens(49408)
    return relative(ours(tokens), theirs(tokens).last_hidden_state)


@pytest.mark.parametrize("network", common.TWINS)
def test_full_size(network, capsys):
    error = full_size_error(network)
    with capsys.disabled():
        print(f"\nfull-size {network}: relative error {error:.1e}")
    assert error <= TOLERANCE
