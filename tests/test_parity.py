"""The three networks against diffusers' and transformers', with the same random numbers in every tensor."""

import common
import pytest
import torch
from common import TOLERANCE, UNETS, pair, randn, relative

import clip_text
import scheduler
import unet
import vae


# ------------------------------------------------------------------------------------------------ names and shapes
@pytest.mark.parametrize(
    "network, tensors, parameters",
    [("unet", 686, 859_520_964), ("vae", 248, 83_653_863), ("text_encoder", 196, 123_060_480)],
)
def test_names_and_shapes_at_sd14s_size(network, tensors, parameters):
    with torch.device("meta"):
        ours, theirs = (make() for make in common.TWINS[network])
    shapes = {name: x.shape for name, x in ours.state_dict().items()}
    their_shapes = {name: x.shape for name, x in theirs.state_dict().items()}
    assert common.their_names(shapes, theirs) == their_shapes
    assert (len(shapes), sum(x.numel() for x in ours.parameters())) == (tensors, parameters)
    if network == "text_encoder":
        assert all(name.startswith("text_model.") for name in shapes)  # SD 1.4's own names


def test_cross_attention_is_80_tensors():
    with torch.device("meta"):
        sizes = [x.numel() for name, x in unet.UNet().state_dict().items() if ".attn2." in name]
    assert (len(sizes), sum(sizes)) == (80, 43_962_560)


# ------------------------------------------------------------------------------------------------ whole networks, small
@pytest.mark.parametrize(
    "gain", [1.0, 3e-3]
)  # 3e-3: every norm reads variances of 1e-5, where its eps counts
@pytest.mark.parametrize("size", [(16, 8), (15, 13), (9, 21)])
@pytest.mark.parametrize("name", UNETS)
def test_unet(name, size, gain):
    assert common.unet_error(name, size, gain) <= TOLERANCE


@pytest.mark.parametrize("gain", [1.0, 3e-3])
@pytest.mark.parametrize("way", ["moments", "encode", "decode"])
def test_vae(way, gain):
    assert common.vae_error(way, gain) <= TOLERANCE


@pytest.mark.parametrize("gain", [1.0, 3e-3])
def test_text_encoder(gain):
    assert common.text_error(gain) <= TOLERANCE


def test_unet_takes_one_prompt_for_several_latents():
    assert common.shared_prompts_error() <= TOLERANCE


def test_unet_takes_one_timestep_for_all():
    ours, _ = pair("unet", **UNETS["2 heads, plain first"])
    z, context = randn(2, 4, 8, 8), randn(2, 7, 40, seed=1)
    every = ours(z, torch.tensor([321, 321]), context)
    assert torch.equal(ours(z, 321, context), every) and torch.equal(
        ours(z, torch.tensor(321), context), every
    )


# ------------------------------------------------------------------------------------------------ their parts
@pytest.mark.parametrize("scale", [1.0, 3e-3])
@pytest.mark.parametrize("part", common.UNET_PARTS)
def test_unet_part(part, scale):
    assert common.unet_part(part, scale) <= TOLERANCE


@pytest.mark.parametrize("scale", [1.0, 3e-3])
@pytest.mark.parametrize("part", common.VAE_PARTS)
def test_vae_part(part, scale):
    assert common.vae_part(part, scale) <= TOLERANCE


def test_text_layer():
    assert common.text_layer_error() <= TOLERANCE


def test_timestep_embedding():
    assert common.timestep_error() <= TOLERANCE
    first = unet.timestep_embedding(torch.tensor([0]), 8)[0]
    assert first.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # cos 0 first, then sin 0


# ------------------------------------------------------------------------------------------------ constants
@pytest.mark.parametrize("network", common.TWINS)
def test_every_norms_eps(network):
    common.same_eps(network)


def test_eps_in_figures():
    """The same, without the reference: a twin with another default would not be noticed above."""
    with torch.device("meta"):
        nets = unet.UNet(), vae.VAE(), clip_text.CLIPText()
    for net in nets:
        for name, m in net.named_modules():
            if isinstance(m, torch.nn.GroupNorm):
                small = net is nets[1] or name.endswith(
                    ".norm"
                )  # all of the VAE's, and the UNet's transformers'
                assert m.eps == (1e-6 if small else 1e-5), name
            elif isinstance(m, torch.nn.LayerNorm):
                assert m.eps == 1e-5, name


def test_eight_heads_at_every_level():
    with torch.device("meta"):
        ours, theirs = (make() for make in common.TWINS["unet"])
    heads = {name: m.heads for name, m in ours.named_modules() if isinstance(m, unet.Attention)}
    assert len(heads) == 32 and set(heads.values()) == {8}
    assert heads == {name: theirs.get_submodule(name).heads for name in heads}


def test_schedule_constants():
    alphas = scheduler.DDIM(50).alphas_cumprod
    assert torch.equal(
        alphas, common.their_scheduler("ddim", 50).alphas_cumprod
    )  # the same operations: bit for bit
    betas = 1 - alphas.double()[1:] / alphas.double()[:-1]
    assert 1 - alphas[0].item() == pytest.approx(0.00085, rel=1e-4) and betas[
        -1
    ].item() == pytest.approx(0.012, rel=1e-4)
    # rel 1e-4: 1 − ᾱ has lost three of float32's seven digits


def test_quick_gelu():
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001)
    assert (
        relative(clip_text.quick_gelu(x), ACT2FN["quick_gelu"](x)) <= 1e-6
    )  # one function: a few roundings


def test_text_encoder_looks_only_back():
    ours, _ = pair("text_encoder", **common.TEXT)
    tokens = common.padded_tokens(99)
    changed = tokens.clone()
    changed[:, 20:] = 3
    a, b = ours(tokens), ours(changed)
    assert relative(a[:, :20], b[:, :20]) <= 1e-6 and relative(a[:, 20:], b[:, 20:]) > 0.1


def test_tokens_are_padded_with_end_of_text():
    common.padding()


def test_long_prompts_are_cut_and_said_so(model_folder):
    import weights

    ids, cut = clip_text.tokenize(
        weights.load_tokenizer(model_folder), ["a star " * 60, "a " * 75, "a " * 76]
    )
    assert ids.shape == (3, 77) and cut == [
        True,
        False,
        True,
    ]  # 75 words fit beside start and end of text


# ------------------------------------------------------------------------------------------------ latents
def test_vae_samples_with_a_generator():
    ours, theirs = pair("vae", **common.VAE)
    x = randn(2, 3, 32, 24)
    posterior = theirs.encode(x).latent_dist
    sampled = ours.encode(x, torch.Generator().manual_seed(5))
    assert (
        relative(sampled, 0.18215 * posterior.sample(torch.Generator().manual_seed(5))) <= TOLERANCE
    )
    assert relative(sampled, ours.encode(x)) > 0.1  # with noise it is not the mean
    assert torch.equal(sampled, ours.encode(x, torch.Generator().manual_seed(5)))


def test_scaling_factor():
    ours, theirs = pair("vae", **common.VAE)
    x = randn(1, 3, 32, 32)
    assert ours.scaling_factor == theirs.config.scaling_factor == 0.18215
    assert relative(ours.encode(x), 0.18215 * ours.moments(x)[0]) <= 1e-6
    assert (
        relative(
            ours.decode(ours.encode(x)), theirs.decode(theirs.encode(x).latent_dist.mean).sample
        )
        <= TOLERANCE
    )
    assert (
        vae.VAE(**common.VAE, scaling_factor=0.5).scaling_factor == 0.5
    )  # the embedded model's is another


def test_log_variance_is_clamped():
    ours, theirs = pair("vae", **common.VAE)
    ours.quant_conv.weight *= 100  # the twin's too: the tensors are shared
    mean, logvar = ours.moments(randn(1, 3, 32, 32))
    assert (logvar.min(), logvar.max()) == (-30, 20)
    assert relative(logvar, theirs.encode(randn(1, 3, 32, 32)).latent_dist.logvar) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ SD 1.4's size
def full_size_error(network):
    ours, theirs = pair(network)
    if network == "unet":
        z, t, context = randn(1, 4, 16, 16), torch.tensor([601]), randn(1, 77, 768, seed=1)
        return relative(ours(z, t, context), theirs(z, t, context).sample)
    if network == "vae":
        x, z = randn(1, 3, 64, 64), randn(1, 4, 8, 8)
        return max(
            relative(ours.moments(x)[0], theirs.encode(x).latent_dist.mean),
            relative(ours.decode(z), theirs.decode(z / 0.18215).sample),
        )
    tokens = common.padded_tokens(49408)
    return relative(ours(tokens), theirs(tokens).last_hidden_state)


@pytest.mark.parametrize("network", common.TWINS)
def test_full_size(network, capsys):
    error = full_size_error(network)
    with capsys.disabled():
        print(f"\nfull-size {network}: relative error {error:.1e}")
    assert error <= TOLERANCE
