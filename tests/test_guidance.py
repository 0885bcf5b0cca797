"""SLD and SEGA against diffusers' StableDiffusionPipelineSafe and SemanticStableDiffusionPipeline.

First the arithmetic alone: the pipelines get a stand-in for the UNet that hands out given estimates, and what reaches their
scheduler is compared. Then whole pictures. The masks are discontinuous, so a rounding can flip an element of them.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import randn, relative
from diffusers import DDIMScheduler
from diffusers.pipelines.deprecated.semantic_stable_diffusion.pipeline_semantic_stable_diffusion import (
    SemanticStableDiffusionPipeline,
)
from diffusers.pipelines.deprecated.stable_diffusion_safe import (
    SafetyConfig,
    StableDiffusionPipelineSafe,
)
from test_commands import generate, pictures, run

import guidance
import weights

STEPS, S = 14, 7.5  # further than every warm-up: 0, 7, 10, 10
TOLERANCE = 1e-6  # sums of four to seven float32 terms


def estimates(n):
    """For each step n estimates (2, 4, 6, 8), whose differences span the thresholds, 1e-5 to 3."""
    for i in range(STEPS):
        e = [randn(2, 4, 6, 8, seed=100 * i)]
        for j in range(1, n):
            size = 10 ** (
                torch.rand(e[0].shape, generator=torch.Generator().manual_seed(100 * i + j)) * 5.5
                - 5
            )
            e.append(e[0] + size * randn(2, 4, 6, 8, seed=100 * i + 50 + j))
        yield e


def theirs(make, n, **arguments):
    """The combined estimates of a pipeline of diffusers that is given `estimates(n)` instead of a UNet's."""
    pipe = make.from_pretrained(
        weights.TOY, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    given, seen, step = estimates(n), [], pipe.scheduler.step
    pipe.unet.forward = lambda *_, **__: SimpleNamespace(sample=torch.cat(next(given)))
    pipe.scheduler.step = lambda e, t, z, **more: seen.append(e) or step(e, t, z, **more)
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
    return seen


def sld_arguments(strength):
    """diffusers' preset, with the method's own 200 for its 20 (SLD's paper, table 1, weak)."""
    preset = dict(getattr(SafetyConfig, strength.upper()))
    if strength == "weak":
        assert preset["sld_guidance_scale"] == 20, (
            "diffusers follows the paper now: compare with it as it is"
        )
        preset["sld_guidance_scale"] = 200
    return preset


def sld_error(strength):
    nu, worst = 0.0, 0.0
    for i, (e, expected) in enumerate(
        zip(
            estimates(3),
            theirs(StableDiffusionPipelineSafe, 3, **sld_arguments(strength)),
            strict=True,
        )
    ):
        ours, nu = guidance.sld_step(*e, S, i, nu, strength)
        worst = max(worst, relative(ours, expected))
    return worst


def sega_error(K=1, **options):
    nu, worst = 0.0, 0.0
    arguments = dict(
        editing_prompt=["a star", "a cross", "red"][:K], reverse_editing_direction=True
    )
    if "warmup" in options:
        arguments["edit_warmup_steps"] = list(options["warmup"])
    for i, ((e_0, e_p, *edits), expected) in enumerate(
        zip(
            estimates(2 + K),
            theirs(SemanticStableDiffusionPipeline, 2 + K, **arguments),
            strict=True,
        )
    ):
        ours, nu = guidance.sega_step(e_0, e_p, torch.stack(edits), S, i, nu, **options)
        worst = max(worst, relative(ours, expected))
    return worst


@pytest.mark.parametrize("strength", guidance.SLD)
def test_sld_combines_given_estimates(strength):
    assert sld_error(strength) <= TOLERANCE


@pytest.mark.parametrize(
    "K, options", [(1, {}), (3, {}), (3, dict(warmup=(2, 5, 9))), (2, dict(warmup=(0, 20)))]
)
def test_sega_combines_given_estimates(K, options):
    """Also while only some concepts are past their warm-up, and with one that never is."""
    assert sega_error(K, **options) <= TOLERANCE


# ------------------------------------------------------------------------------------------------ planted mistakes
def sld_wrong(sign=1, inside=True, momentum=True, printed=False, only_later=False):
    def step(e_0, e_p, e_S, s, i, nu, strength, warmup=None):
        delta, s_S, threshold, s_m, beta_m = guidance.SLD[strength]
        D, zero = e_p - e_S, torch.zeros(())
        scale = (s_S * D.abs()).clamp(min=1) if printed else (s_S * D.abs()).clamp(max=1)
        mu = torch.where(sign * (s_S * D if printed else D) >= sign * threshold, zero, scale)
        gamma = mu * (e_S - e_0) + (s_m * nu if momentum else 0)
        if not only_later or i >= delta:
            nu = beta_m * nu + (1 - beta_m) * gamma
        gamma = gamma if i >= delta else 0
        return (e_0 + s * (e_p - e_0 - gamma) if inside else e_0 + s * (e_p - e_0) - gamma), nu

    return step


def sega_wrong(dims=3, inside=False, momentum=True, sign=-1, only_later=False):
    def step(e_0, e_p, edits, s, i, nu, warmup=None):
        g = sign * 5.0 * (edits - e_0)
        limit = g.abs().flatten(dims).quantile(0.9, dim=-1)
        g = torch.where(
            g.abs() >= limit.reshape(*limit.shape, *[1] * (g.dim() - limit.dim())),
            g,
            torch.zeros(()),
        )
        gamma = g.sum(0) + (0.1 * nu if momentum else 0)
        if not only_later or i >= 10:
            nu = 0.4 * nu + 0.6 * gamma
        gamma = gamma if i >= 10 else 0.0
        return (e_0 + s * (e_p - e_0 + gamma) if inside else e_0 + s * (e_p - e_0) + gamma), nu

    return step


def test_the_mistakes_written_out_are_right_but_for_the_mistake(monkeypatch):
    monkeypatch.setattr(guidance, "sld_step", sld_wrong())
    monkeypatch.setattr(guidance, "sega_step", sega_wrong())
    assert sld_error("medium") <= TOLERANCE and sega_error(2) <= TOLERANCE


@pytest.mark.parametrize(
    "mistake",
    [
        dict(sign=-1),
        dict(inside=False),
        dict(momentum=False),
        dict(printed=True),
        dict(only_later=True),
    ],
    ids=str,
)
def test_a_mistake_in_sld_is_seen(mistake, monkeypatch):
    monkeypatch.setattr(guidance, "sld_step", sld_wrong(**mistake))
    assert sld_error("medium") > 100 * TOLERANCE


@pytest.mark.parametrize(
    "mistake",
    [
        dict(dims=2),
        dict(dims=1),
        dict(inside=True),
        dict(momentum=False),
        dict(sign=1),
        dict(only_later=True),
    ],
    ids=str,
)
def test_a_mistake_in_sega_is_seen(mistake, monkeypatch):
    monkeypatch.setattr(guidance, "sega_step", sega_wrong(**mistake))
    assert sega_error(2) > 100 * TOLERANCE


def test_diffusers_own_weak_preset_is_another_method(monkeypatch):
    monkeypatch.setitem(guidance.SLD, "weak", (15, 20, 0.0, 0.0, 0.0))
    monkeypatch.setattr(
        guidance, "sld_step", lambda *a, right=guidance.sld_step: right(*a[:4], a[4] + 15, *a[5:])
    )  # warm from the start
    assert sld_error("weak") > 100 * TOLERANCE


# ------------------------------------------------------------------------------------------------ pictures
def same(ours, theirs):
    off = np.abs(ours - np.stack([np.asarray(picture).astype(int) for picture in theirs]))
    return (off <= 1).mean() >= 0.999 and off.max() <= 3


@pytest.mark.parametrize("kind", ["pndm", "ddim"])
@pytest.mark.parametrize("method", [*(f"sld-{strength}" for strength in guidance.SLD), "sega"])
def test_pictures_equal_diffusers_pipelines(method, kind, tmp_path):
    prompt, avoid, steps = (
        "a view of arcadia",
        ["a star", "red"] if method == "sega" else ["a star, red"],
        18,
    )
    assert (
        run(
            generate,
            prompt,
            "--model",
            "toy",
            "--scheduler",
            kind,
            "--steps",
            steps,
            "--num-images",
            2,
            "--seed",
            3,
            "--method",
            method,
            "--avoid",
            *avoid,
            "--device",
            "cpu",
            "--out",
            tmp_path / "ours",
        )
        == 0
    )
    make = SemanticStableDiffusionPipeline if method == "sega" else StableDiffusionPipelineSafe
    pipe = make.from_pretrained(
        weights.TOY, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    if kind == "ddim":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    arguments = (
        sld_arguments(method[4:])
        if method != "sega"
        else dict(editing_prompt=avoid, reverse_editing_direction=True)
    )
    if method != "sega":
        pipe.safety_concept = avoid[0]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipe(
        prompt,
        num_images_per_prompt=2,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=generators,
        **arguments,
    ).images
    assert same(pictures(tmp_path / "ours"), images)


def test_warm_up_can_be_set():
    """With the others' 0 for the warm-up, from the first evaluation on."""
    e_0, e_p, e_S = next(estimates(3))
    for strength in guidance.SLD:
        early, late = (
            guidance.sld_step(e_0, e_p, e_S, S, 3, 0.0, strength, warmup)[0] for warmup in (3, 4)
        )
        assert torch.equal(late, e_0 + S * (e_p - e_0)) and not torch.equal(early, late)

    def unet(z, t, c):
        return c[:, 0, 0].view(-1, 1, 1, 1) * z

    z, c = randn(1, 4, 8, 8), [torch.full((1, 77, 3), x) for x in (0.1, 0.2, 0.5)]
    for method in ("sega", "sld-medium"):
        plain, never, at_once = (
            guidance.GUIDANCE[name](unet, *c, S, warmup)(z, 1, 0)
            for name, warmup in (("sd", None), (method, 1), (method, 0))
        )
        assert torch.equal(plain, never) and not torch.equal(plain, at_once)


def test_what_is_avoided_is_said_and_told(tmp_path, capsys):
    from PIL import Image

    run(
        generate,
        "a red star",
        "--model",
        "toy",
        "--method",
        "neg",
        "--avoid",
        "red",
        "a star",
        "--steps",
        3,
        "--device",
        "cpu",
        "--out",
        tmp_path / "a",
    )
    run(
        generate,
        "a red star",
        "--model",
        "toy",
        "--negative-prompt",
        "red, a star",
        "--steps",
        3,
        "--device",
        "cpu",
        "--out",
        tmp_path / "b",
    )
    assert np.array_equal(pictures(tmp_path / "a"), pictures(tmp_path / "b"))
    text = Image.open(tmp_path / "a" / "00000.png").text
    assert text["method"] == "neg" and text["avoid"] == "red; a star"
    for words, said in (
        (["--method", "sega"], "--avoid"),
        (["--avoid", "red"], "--method"),
        (["--method", "neg", "--avoid", " "], "empty"),
        (["--method", "neg", "--avoid", "red", "--negative-prompt", "blue"], "one of them"),
    ):
        assert run(generate, "a star", "--model", "toy", *words, "--out", tmp_path / "c") == 2
        assert said in capsys.readouterr().err and not (tmp_path / "c").exists()
