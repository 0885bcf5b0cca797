"""SLD and SEGA compute what diffusers' pipelines for Safe and Semantic Stable Diffusion compute.

First the arithmetic alone: diffusers' pipelines get given estimates instead of a UNet's, and the
tests compare the combined estimate that reaches their scheduler. Then whole images.
"""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import plant, randn, relative
from diffusers import DDIMScheduler
from diffusers.pipelines.deprecated.semantic_stable_diffusion.pipeline_semantic_stable_diffusion import (  # noqa: E501
    SemanticStableDiffusionPipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_safe import (
    SafetyConfig,
    StableDiffusionPipelineSafe,
)

import guidance
import pipeline
import weights

STEPS, S = 14, 7.5  # more steps than each tested warm-up: 0, 7, 10
TOLERANCE = 1e-6  # sums of four to seven float32 terms


# ---------------------------------------------------------------------- given estimates
def estimates(n):
    """n estimates (2, 4, 6, 8) for each step. Their differences go from 1e-5 to 3.

    So some of them are below SLD's thresholds and some above.
    """
    for i in range(STEPS):
        first = randn(2, 4, 6, 8, seed=100 * i)
        step = [first]
        for j in range(1, n):
            generator = torch.Generator().manual_seed(100 * i + j)
            size = 10 ** (torch.rand(first.shape, generator=generator) * 5.5 - 5)
            step.append(first + size * randn(2, 4, 6, 8, seed=100 * i + 50 + j))
        yield step


def toy_pipeline(make, kind):
    """One of diffusers' pipelines with the toy model."""
    pipe = make.from_pretrained(
        weights.TOY, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    if kind == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe


def their_estimates(make, n, **arguments):
    """What a pipeline of diffusers makes of `estimates(n)`: one combined estimate per step."""
    pipe = toy_pipeline(make, "ddim")
    given, combined = estimates(n), []
    right_step = pipe.scheduler.step

    def unet(*_, **__):
        return SimpleNamespace(sample=torch.cat(next(given)))

    def step(e, t, z, **more):
        combined.append(e)
        return right_step(e, t, z, **more)

    pipe.unet.forward = unet
    pipe.scheduler.step = step
    pipe(
        ["a star", "a moon"],
        latents=randn(2, 4, 6, 8),
        height=24,
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=S,
        output_type="latent",
        **arguments,
    )
    return combined


def sld_arguments(strength):
    """diffusers' constants, but with s_S = 200 for "weak", as in table 1 of SLD's paper."""
    constants = dict(getattr(SafetyConfig, strength.upper()))
    if strength == "weak":
        assert constants["sld_guidance_scale"] == 20, "diffusers is fixed: use its constants"
        constants["sld_guidance_scale"] = 200
    return constants


@functools.cache
def sld_expected(strength):
    return their_estimates(StableDiffusionPipelineSafe, 3, **sld_arguments(strength))


@functools.cache
def sega_expected(K, **options):
    arguments = dict(
        editing_prompt=["a star", "a cross", "red"][:K], reverse_editing_direction=True
    )
    if "warmup" in options:
        arguments["edit_warmup_steps"] = options["warmup"]
    return their_estimates(SemanticStableDiffusionPipeline, 2 + K, **arguments)


def sld_error(strength):
    """The largest relative error of all steps, and so in sega_error."""
    expected = sld_expected(strength)
    nu, worst = 0.0, 0.0
    for i, (e_0, e_p, e_S) in enumerate(estimates(3)):
        e, nu = guidance.sld_step(e_0, e_p, e_S, S, i, nu, **guidance.SLD[strength])
        worst = max(worst, relative(e, expected[i]))
    return worst


def sega_error(K=1, **options):
    expected = sega_expected(K, **options)
    nu, worst = 0.0, 0.0
    for i, (e_0, e_p, *e_edits) in enumerate(estimates(2 + K)):
        e, nu = guidance.sega_step(e_0, e_p, torch.stack(e_edits), S, i, nu, **options)
        worst = max(worst, relative(e, expected[i]))
    return worst


@pytest.mark.parametrize("strength", guidance.SLD)
def test_sld(strength):
    assert sld_error(strength) <= TOLERANCE


@pytest.mark.parametrize(
    "K, options",
    [(1, {}), (2, {}), (3, dict(warmup=5)), (2, dict(warmup=0)), (1, dict(warmup=20))],
)
def test_sega(K, options):
    """Also with a warm-up that is longer than the run."""
    assert sega_error(K, **options) <= TOLERANCE


# ---------------------------------------------------------------------- mistakes
MOMENTUM = "    nu = beta_m * nu + (1 - beta_m) * gamma  # also during the warm-up\n"
# fmt: off
MISTAKES = [
    # (what is wrong, {text in guidance.py: the mistake}, the comparison that must see it)
    ("SLD: the mask is inverted", {"D >= threshold": "D <= threshold"}, sld_error, "medium"),
    ("SLD: s does not multiply γ",
        {"s * (e_p - e_0 - gamma)": "s * (e_p - e_0) - gamma"}, sld_error, "medium"),
    ("SLD: no momentum", {"mu * (e_S - e_0) + s_m * nu": "mu * (e_S - e_0)"}, sld_error, "medium"),
    ("SLD: eq. 8 of the SDD paper, as printed",
        {"D >= threshold": "s_S * D >= threshold", ".clamp(max=1)": ".clamp(min=1)"},
        sld_error, "medium"),
    ("SLD: no momentum during the warm-up",
        {f"{MOMENTUM}    if i < delta:\n": f"    if i >= delta:\n    {MOMENTUM}    else:\n"},
        sld_error, "medium"),
    ("SEGA: one quantile for all channels",
        {"flatten(3)": "flatten(2)", "dim=3": "dim=2", "[..., None": "[..., None, None"},
        sega_error, 2),
    ("SEGA: one quantile for all images",
        {"flatten(3)": "flatten(1)", "dim=3": "dim=1", "[..., None": "[..., None, None, None"},
        sega_error, 2),
    ("SEGA: s multiplies γ", {"(e_p - e_0) + gamma": "(e_p - e_0 + gamma)"}, sega_error, 2),
    ("SEGA: no momentum", {"g.sum(0) + s_m * nu": "g.sum(0)"}, sega_error, 2),
    ("SEGA: towards the concept", {"g = -s_e": "g = s_e"}, sega_error, 2),
    ("SEGA: no momentum during the warm-up",
        {f"{MOMENTUM}    if i < warmup:\n": f"    if i >= warmup:\n    {MOMENTUM}    else:\n"},
        sega_error, 2),
]
# fmt: on


@pytest.mark.parametrize("mistake", MISTAKES, ids=[name for name, *_ in MISTAKES])
def test_mistake_is_seen(mistake, monkeypatch):
    """Without the mistake, test_sld and test_sega have seen the comparison pass."""
    _, changes, error, case = mistake
    plant(monkeypatch, guidance, changes)
    assert error(case) > 100 * TOLERANCE


def test_diffusers_weak_is_another_method(monkeypatch):
    """With s_S = 20, the error is visible. δ = 0, so that "weak" acts within the tested steps."""
    expected = their_estimates(
        StableDiffusionPipelineSafe, 3, **sld_arguments("weak") | dict(sld_warmup_steps=0)
    )
    errors = {}
    for s_S in (20, 200):
        constants = guidance.SLD["weak"] | dict(s_S=s_S, delta=0)
        e_0, e_p, e_S = next(estimates(3))
        e, _ = guidance.sld_step(e_0, e_p, e_S, S, 0, 0.0, **constants)
        errors[s_S] = relative(e, expected[0])
    assert errors[200] <= TOLERANCE
    assert errors[20] > 100 * TOLERANCE


# ---------------------------------------------------------------------- images
@pytest.fixture(scope="module")
def toy():
    return weights.load("toy")


@pytest.mark.parametrize(
    "method, kind", [("sld-medium", "pndm"), ("sld-max", "ddim"), ("sega", "pndm")]
)
def test_images_equal_diffusers(toy, method, kind):
    """Up to 1 of 255 for 99.9 % of the values, and up to 3 for all.

    The masks of both methods jump, so that a rounding can flip an element.
    """
    prompt, steps = "a view of arcadia", 12
    avoid = ["a star", "red"] if method == "sega" else ["a star, red"]
    how = dict(steps=steps, scheduler=kind, guidance=method, avoid=avoid)
    ours = np.stack(list(pipeline.images(toy, [prompt] * 2, [3, 4], **how))).astype(int)

    if method == "sega":
        pipe = toy_pipeline(SemanticStableDiffusionPipeline, kind)
        arguments = dict(editing_prompt=avoid, reverse_editing_direction=True)
    else:
        pipe = toy_pipeline(StableDiffusionPipelineSafe, kind)
        pipe.safety_concept = avoid[0]
        arguments = sld_arguments(method.removeprefix("sld-"))
    theirs = pipe(
        prompt,
        num_images_per_prompt=2,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
        **arguments,
    ).images
    off = np.abs(ours - np.stack([np.asarray(image).astype(int) for image in theirs]))
    assert (off <= 1).mean() >= 0.999
    assert off.max() <= 3


@pytest.mark.parametrize("method", ["sega", *(f"sld-{strength}" for strength in guidance.SLD)])
def test_warmup_replaces_the_methods_own(method):
    """Evaluation 3 with a warm-up of 4 is plain guidance; with a warm-up of 3 the method acts."""

    def unet(z, t, c):
        return c[:, 0, 0].view(-1, 1, 1, 1) * z

    z = randn(1, 4, 8, 8)
    c_0, c_p, c_S = (torch.full((1, 77, 3), x) for x in (0.1, 0.2, 0.5))
    plain = guidance.GUIDANCE["sd"](unet, c_0, c_p, c_S, S, None)(z, 1, 3)
    waiting = guidance.GUIDANCE[method](unet, c_0, c_p, c_S, S, 4)(z, 1, 3)
    acting = guidance.GUIDANCE[method](unet, c_0, c_p, c_S, S, 3)(z, 1, 3)
    assert torch.equal(waiting, plain)
    assert not torch.equal(acting, plain)


def test_what_neg_avoids_is_the_negative_prompt(toy):
    how = dict(steps=2, size=16)
    avoided = pipeline.images(toy, "a star", guidance="neg", avoid=["red", "a star"], **how)
    negative = pipeline.images(toy, "a star", negative="red, a star", **how)
    assert np.array_equal(list(avoided), list(negative))
