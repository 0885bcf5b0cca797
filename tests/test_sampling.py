"""The samplers and classifier-free guidance compute what diffusers' schedulers and pipeline do."""

import re

import common
import numpy as np
import pytest
import torch
from common import TOLERANCE, randn, relative

import guidance
import pipeline
import scheduler
import weights
from support.errors import UserError

SAMPLERS = pytest.mark.parametrize("kind", ["ddim", "pndm"])


# ---------------------------------------------------------------------- whole trajectories
@SAMPLERS
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 50])  # 3 and 7 do not divide 1000
def test_trajectory(kind, steps):
    """50 steps with guidance 7.5 could amplify roundings. We measured 0 for both samplers."""
    assert common.trajectory_error(kind, steps) <= TOLERANCE


@SAMPLERS
@pytest.mark.parametrize("steps", [-1, 0, 1000, 5000])
def test_impossible_steps_are_refused(kind, steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps do not fit"):
        scheduler.SAMPLERS[kind](steps)


def test_pndm_can_be_used_again():
    """i = 0 starts a new trajectory, also after one that was not finished."""

    def estimate(z, t, i):
        return z.tanh()

    sampler = scheduler.PNDM(10)
    first = guidance.sample(estimate, sampler, randn(1, 4, 4, 4))
    second = guidance.sample(estimate, sampler, randn(1, 4, 4, 4))
    sampler.step(randn(1, 4, 4, 4, seed=9), randn(1, 4, 4, 4, seed=8), 0)
    third = guidance.sample(estimate, sampler, randn(1, 4, 4, 4))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


# ---------------------------------------------------------------------- timesteps
@SAMPLERS
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 30, 50, 999])
def test_timesteps(kind, steps):
    common.timesteps(kind, steps)


def test_timesteps_in_numbers():
    ddim, pndm = scheduler.DDIM(50), scheduler.PNDM(50)
    assert ddim.timesteps[:3] == [981, 961, 941]
    assert ddim.timesteps[-2:] == [1, 0]
    assert pndm.timesteps[:4] == [981, 961, 961, 941]
    assert len(pndm.timesteps) == 52


@SAMPLERS
@pytest.mark.parametrize("k", [0, 1, 2, 5, 10])
def test_sample_stops_after_k_evaluations(kind, k):
    sampler, seen = scheduler.SAMPLERS[kind](10), []

    def estimate(z, t, i):
        seen.append((t, i))
        return z.tanh()

    z = guidance.sample(estimate, sampler, randn(1, 4, 4, 4), k)
    assert seen == [(sampler.timesteps[i], i) for i in range(k)]
    expected, theirs = randn(1, 4, 4, 4), common.their_scheduler(kind, 10)
    for t in theirs.timesteps[:k]:
        expected = theirs.step(expected.tanh(), t, expected).prev_sample
    assert relative(z, expected) <= TOLERANCE


def test_ddim_with_the_true_noise_removes_it():
    """If the estimate is the true noise, z after k steps is z_0 with that noise at timesteps[k]."""
    sampler = scheduler.DDIM(20)
    z_0, n = randn(2, 4, 4, 4), randn(2, 4, 4, 4, seed=1)

    def noised(k):
        return sampler.add_noise(z_0, n, torch.tensor([sampler.timesteps[k]] * 2))

    for k in range(21):
        z = guidance.sample(lambda z, t, i: n, sampler, noised(0), k)
        assert relative(z, noised(k)) <= TOLERANCE, k


@SAMPLERS
def test_add_noise(kind):
    z_0, n, t = randn(4, 4, 5, 3), randn(4, 4, 5, 3, seed=1), torch.tensor([0, 1, 500, 999])
    ours, theirs = scheduler.SAMPLERS[kind](50), common.their_scheduler(kind, 50)
    expected = theirs.add_noise(z_0, n, t)
    assert relative(ours.add_noise(z_0, n, t), expected) <= 1e-6  # three operations


# ---------------------------------------------------------------------- guidance
def linear_unet(z, t, context):
    """A stand-in for the UNet: z times the first number of its prompt."""
    return context[:, 0, 0].view(-1, 1, 1, 1) * z


def prompt(*numbers):
    """Embeddings (B, 7, 5) for linear_unet, one number per latent."""
    return torch.tensor(numbers)[:, None, None].expand(-1, 7, 5)


@pytest.mark.parametrize(
    "s, factor",
    [(7.5, 9.5), (2, 4), (1, 3), (0.5, 2.5), (0, 2), (-1, 1)],  # 2 + s (3 − 2)
)
def test_cfg(s, factor):
    """Also below 1: 0.5 lies between the two estimates, 0 ignores the prompt, −1 avoids it."""
    z = randn(3, 4, 2, 2)
    e = guidance.cfg(linear_unet, prompt(2.0), prompt(3.0), s)(z, 1)
    assert relative(e, factor * z) <= 1e-6  # a few roundings


def test_evaluate_gives_the_unet_one_prompt_per_latent():
    """Stand-ins and diffusers' UNet do not expand a prompt, so `evaluate` must."""
    z = randn(3, 4, 2, 2)
    seen = []

    def unet(z, t, context):
        seen.append((z.shape, context.shape))
        return linear_unet(z, t, context)

    a, b = guidance.evaluate(unet, z, 1, prompt(2.0), prompt(3.0, 4.0, 5.0))
    assert seen == [((6, 4, 2, 2), (6, 7, 5))]
    assert torch.equal(a, 2 * z)
    assert torch.equal(b, torch.stack([3 * z[0], 4 * z[1], 5 * z[2]]))
    e = guidance.cfg(unet, prompt(2.0), prompt(3.0, 4.0, 5.0), 2)(z, 1)
    assert relative(e, torch.stack([4 * z[0], 6 * z[1], 8 * z[2]])) <= 1e-6


def test_cfg_with_scale_1_evaluates_only_the_prompt():
    seen = []

    def unet(z, t, context):
        seen.append(len(z))
        return linear_unet(z, t, context)

    z = randn(2, 4, 2, 2)
    assert torch.equal(guidance.cfg(unet, None, prompt(3.0), 1)(z, 1, 0), 3 * z)
    assert seen == [2]  # not 4


def test_negative_prompt():
    """neg: the negative prompt replaces the empty one, e_n + s (e_p − e_n)."""
    ours, _ = common.pair("unet", **common.UNETS["2 heads, plain first"])
    z, c_n, c_p = randn(2, 4, 8, 8), randn(1, 7, 40, seed=1), randn(1, 7, 40, seed=2)
    e_n, e_p = ours(z, 481, c_n), ours(z, 481, c_p)
    e = guidance.GUIDANCE["neg"](ours, None, c_p, c_n, 7.5, None)(z, 481)
    assert relative(e, e_n + 7.5 * (e_p - e_n)) <= TOLERANCE


# ---------------------------------------------------------------------- images, latents, patches
@pytest.fixture(scope="module")
def toy():
    return weights.load("toy")


def test_images_of_texts_and_of_embeddings_are_the_same(toy):
    def images(prompts, *seeds, **more):
        how = dict(steps=2, scheduler="ddim", size=(16, 24), warmup=0)
        return np.stack(list(pipeline.images(toy, prompts, *seeds, **how | more)))

    prompts, seeds = ["a red star", "a moon"], [3, 4]
    c_p, c_0, c_S = pipeline.encode_prompts(toy, prompts, "", ["red"])
    texts = images(prompts, seeds)
    assert texts.shape == (2, 16, 24, 3)
    assert texts.dtype == np.uint8
    assert np.array_equal(texts, images(c_p, seeds))
    assert np.array_equal(texts, images(prompts, seeds, negative=c_0))
    # Each image has noise of its own, at any batch size. Without seeds they are 0, 1, ..
    apart = images(prompts, seeds, batch_size=1)
    assert np.array_equal(apart[1:], images("a moon", [4]))
    assert abs(apart.astype(int) - texts).max() <= 1  # another batch rounds differently
    assert np.array_equal(images(prompts), images(prompts, [0, 1]))
    for method in ("neg", "sega"):
        avoiding = images(prompts, seeds, guidance=method, avoid=["red"])
        assert np.array_equal(avoiding, images(c_p, seeds, guidance=method, avoid=c_S))
        assert not np.array_equal(avoiding, texts)


@pytest.mark.parametrize(
    "prompts, how, said",
    [
        (["a star"], dict(seeds=[1, 2]), "1 prompts and 2 seeds: use one seed per prompt"),
        (["a star"], dict(size=22), "22 x 22 pixels: use multiples of 4"),
        (["a star"], dict(size=(16, 30)), "16 x 30 pixels"),
        (["a star"], dict(negative="satr"), "does not know the word 'satr'"),
        (["a star"], dict(steps=1000), "1000 sampling steps do not fit"),
    ],
)
def test_images_that_cannot_be_made_are_one_sentence(toy, prompts, how, said):
    with pytest.raises(UserError, match=re.escape(said)):
        list(pipeline.images(toy, prompts, **how))


def test_encoded_groups(toy):
    """One tensor per group of prompts, also for an empty group; one tensor for one group."""
    prompts = ["a star", "a moon on sand", "red"]
    each = torch.cat([pipeline.encode_prompts(toy, prompt) for prompt in ["", *prompts]])
    c_0, c_p, nothing, last = pipeline.encode_prompts(toy, "", prompts[:2], [], ["red"])
    assert [len(c) for c in (c_0, c_p, nothing, last)] == [1, 2, 0, 1]
    assert relative(torch.cat([c_0, c_p, nothing, last]), each) <= TOLERANCE
    assert relative(pipeline.encode_prompts(toy, prompts), each[1:]) <= TOLERANCE


def test_a_prompt_that_is_cut_is_a_warning(toy, capsys):
    long = "a star " * 60
    pipeline.encode_prompts(toy, ["a star", long], [long])
    assert "2 of 3 prompts are longer than 77 tokens" in capsys.readouterr().err
    pipeline.encode_prompts(toy, long, warn=False)
    assert not capsys.readouterr().err


def test_saved_latents_continue_with_the_same_images(toy, tmp_path, monkeypatch):
    """3 images of 2 prompts in turn, saved after each one; the file already has the first."""
    monkeypatch.setattr(pipeline, "SAVED", 1)
    file, c_p = tmp_path / "z.safetensors", pipeline.encode_prompts(toy, ["a star", "a moon"])
    how = dict(steps=1, scheduler="ddim", size=16)
    whole = pipeline.saved_latents(file, "images", toy, c_p, 3, 5, **how)
    expected = pipeline.generate_latents(toy, c_p[[0, 1, 0]], [5, 6, 7], batch_size=1, **how)
    assert torch.equal(whole, torch.cat(list(expected)))
    _, settings = weights.read(file)
    weights.save(file, {"z_0": whole[:1]}, settings)
    assert torch.equal(pipeline.saved_latents(file, "images", toy, c_p, 3, 5, **how), whole)
    with pytest.raises(UserError, match="holds other images than this run needs"):
        pipeline.saved_latents(file, "images", toy, c_p, 3, 6, **how)


def test_a_patch_is_in_the_model_only_inside_the_block(toy, tmp_path):
    names = [name for name in toy.unet.state_dict() if ".attn2.to_v." in name]
    before = {name: x.clone() for name, x in toy.unet.state_dict().items()}
    base = weights.fingerprint({name: before[name] for name in names})
    patch = {name: before[name] + 1 for name in names}
    weights.save(tmp_path / "p.safetensors", patch, {"base_fingerprint": base})
    with pipeline.patched(toy, tmp_path / "p.safetensors") as metadata:
        inside = toy.unet.state_dict()
        changed = [name for name in before if not torch.equal(inside[name], before[name])]
        assert changed == names
        assert metadata["base_fingerprint"] == base
    assert all(torch.equal(x, before[name]) for name, x in toy.unet.state_dict().items())
    with pipeline.patched(toy, None) as metadata:
        assert metadata == {}


def test_the_models_own_sampler_and_schedule():
    config = dict(_class_name="DDIMScheduler", beta_start=0.001, steps_offset=0, clip_sample=False)
    ddim = pipeline.make_scheduler(config, 10)
    assert type(ddim) is scheduler.DDIM
    assert ddim.timesteps[-3:] == [100, 0, 0]
    assert ddim.alphas_cumprod[0].item() == pytest.approx(0.999)
    assert type(pipeline.make_scheduler(config, 10, "pndm")) is scheduler.PNDM
    config = dict(_class_name="PNDMScheduler", skip_prk_steps=True)
    assert type(pipeline.make_scheduler(config, 10)) is scheduler.PNDM
    with pytest.raises(UserError, match="skip_prk_steps = False"):  # diffusers' default
        pipeline.make_scheduler({"_class_name": "PNDMScheduler"}, 10)
    with pytest.raises(UserError, match="own sampler, Euler, is not implemented"):
        pipeline.make_scheduler({"_class_name": "Euler"}, 10)
