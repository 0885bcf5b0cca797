"""The samplers and classifier-free guidance, against diffusers' schedulers in the classic pipeline loop."""

import common
import pytest
import torch
from common import TOLERANCE, randn, relative

import clip_text
import guidance
import scheduler
import weights

SAMPLERS = pytest.mark.parametrize("kind", ["ddim", "pndm"])


# ------------------------------------------------------------------------------------------------ whole trajectories
@SAMPLERS
@pytest.mark.parametrize("steps", [10, 20, 25, 50])
def test_trajectory(kind, steps):
    """Fifty steps and guidance 7.5 could blow roundings up; errors of 0 were measured for both samplers."""
    assert common.trajectory_error(kind, steps) <= TOLERANCE


@SAMPLERS
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30, 999])  # 7 and 30 do not divide 1000
def test_few_and_odd_numbers_of_steps(kind, steps):
    common.timesteps(kind, steps)
    if steps < 100:  # 999 evaluations would take a minute
        assert common.trajectory_error(kind, steps) <= TOLERANCE


@SAMPLERS
def test_999_steps_without_a_network(kind):
    """An estimate that is a fixed linear map of z: the sampler's arithmetic alone."""
    sampler, theirs, z = (
        scheduler.SAMPLERS[kind](999),
        common.their_scheduler(kind, 999),
        randn(2, 4, 3, 3),
    )
    ours = guidance.sample(lambda z, t, i: 0.1 * z.flip(1) + t / 5000, sampler, z)
    for t in theirs.timesteps:
        z = theirs.step(0.1 * z.flip(1) + t / 5000, t, z).prev_sample
    assert relative(ours, z) <= TOLERANCE  # a thousand steps, each rounded: 1e-7 was measured


@SAMPLERS
@pytest.mark.parametrize("steps", [-1, 0, 1000, 5000])
def test_steps_that_do_not_fit(kind, steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps .* 1 to 999"):
        scheduler.SAMPLERS[kind](steps)


def test_pndm_can_be_used_again():
    sampler = scheduler.PNDM(10)
    runs = [guidance.sample(lambda z, t, i: z.tanh(), sampler, randn(1, 4, 4, 4)) for _ in range(2)]
    sampler.step(
        randn(1, 4, 4, 4, seed=9), randn(1, 4, 4, 4, seed=8), 0
    )  # a trajectory broken off after one step
    runs.append(guidance.sample(lambda z, t, i: z.tanh(), sampler, randn(1, 4, 4, 4)))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


# ------------------------------------------------------------------------------------------------ levels
@SAMPLERS
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 25, 30, 50, 999])
def test_levels(kind, steps):
    common.timesteps(kind, steps)


def test_levels_in_figures():
    assert scheduler.DDIM(50).timesteps[:3] == [981, 961, 941] and scheduler.DDIM(50).timesteps[
        -2:
    ] == [1, 0]
    assert (
        scheduler.PNDM(50).timesteps[:4] == [981, 961, 961, 941]
        and len(scheduler.PNDM(50).timesteps) == 52
    )


@SAMPLERS
@pytest.mark.parametrize("k", [0, 1, 2, 5, 10])
def test_sample_stops_at_level_k(kind, k):
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


def test_a_perfect_estimate_leads_back():
    """With the true noise as estimate, DDIM's z at levels[k] is add_noise(z_0, n, levels[k]), for every k."""
    sampler, z_0, n = scheduler.DDIM(20), randn(2, 4, 4, 4), randn(2, 4, 4, 4, seed=1)
    start = sampler.add_noise(z_0, n, torch.tensor([sampler.timesteps[0]] * 2))
    for k in range(21):
        z = guidance.sample(lambda z, t, i: n, sampler, start, k)
        assert (
            relative(z, sampler.add_noise(z_0, n, torch.tensor([sampler.timesteps[k]] * 2)))
            <= TOLERANCE
        ), k


def test_add_noise():
    z_0, n, t = randn(4, 4, 5, 3), randn(4, 4, 5, 3, seed=1), torch.tensor([0, 1, 500, 999])
    for kind in scheduler.SAMPLERS:
        ours, theirs = scheduler.SAMPLERS[kind](50), common.their_scheduler(kind, 50)
        assert (
            relative(ours.add_noise(z_0, n, t), theirs.add_noise(z_0, n, t)) <= 1e-6
        )  # three operations, no sum


# ------------------------------------------------------------------------------------------------ guidance
def linear(z, t, context):
    """A stand-in for the UNet that tells its inputs apart: one number a prompt, times z."""
    return context[:, 0, 0].repeat_interleave(len(z) // len(context)).view(-1, 1, 1, 1) * z


def test_guidance():
    z, c_0, c_p = randn(3, 4, 2, 2), torch.full((1, 7, 5), 2.0), torch.full((1, 7, 5), 3.0)
    assert (
        relative(guidance.cfg(linear, c_0, c_p, 7.5)(z, 1), 9.5 * z) <= 1e-6
    )  # 2 + 7.5 (3 − 2), up to a rounding
    assert relative(guidance.cfg(linear, c_0, c_p, 0)(z, 1), 2 * z) <= 1e-6
    many = torch.tensor([3.0, 4, 5])[:, None, None].expand(-1, 7, 5)  # a prompt for each picture
    assert (
        relative(
            guidance.cfg(linear, c_0, many, 2)(z, 1), torch.stack([4 * z[0], 6 * z[1], 8 * z[2]])
        )
        <= 1e-6
    )


def test_scale_one_asks_for_the_prompt_alone():
    seen = []

    def unet(z, t, context):
        seen.append(len(z))
        return linear(z, t, context)

    z, c_p = randn(2, 4, 2, 2), torch.full((1, 7, 5), 3.0)
    assert torch.equal(guidance.cfg(unet, None, c_p, 1)(z, 1, 0), 3 * z) and seen == [
        2
    ]  # half of the work


def test_negative_prompt():
    """NEG: the negative prompt's embedding in the place of the empty one's, so e_n + s (e_p − e_n)."""
    ours, _ = common.pair("unet", **common.UNETS["2 heads, plain first"])
    z, c_n, c_p = randn(2, 4, 8, 8), randn(1, 7, 40, seed=1), randn(1, 7, 40, seed=2)
    e_n, e_p = (ours(z, 481, c.expand(2, -1, -1)) for c in (c_n, c_p))
    assert relative(guidance.cfg(ours, c_n, c_p, 7.5)(z, 481), e_n + 7.5 * (e_p - e_n)) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ all of it
@SAMPLERS
@pytest.mark.parametrize("negative", ["", "a blue moon"])
def test_pictures_of_the_whole_pipeline(model_folder, kind, negative):
    """Prompt to picture, from the same folder and the same z_T, against StableDiffusionPipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    if kind == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    prompts, z = ["a red star on snow", "a view of arcadia"], randn(2, 4, 8, 8)
    expected = pipe(
        prompts,
        negative_prompt=[negative] * 2,
        latents=z,
        num_inference_steps=10,
        guidance_scale=7.5,
        output_type="pt",
    ).images

    model = weights.load(model_folder)
    c_p, c_0 = (
        model.text_encoder(clip_text.tokenize(model.tokenizer, p)[0]) for p in (prompts, [negative])
    )
    z = guidance.sample(guidance.cfg(model.unet, c_0, c_p, 7.5), scheduler.SAMPLERS[kind](10), z)
    assert relative((model.vae.decode(z) / 2 + 0.5).clamp(0, 1), expected) <= TOLERANCE
