"""SDXL computes what diffusers and transformers compute. Planted mistakes must make a test fail."""

import copy
import json
import shutil

import common
import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import CROSS_DOWN, CROSS_UP, DOWN, TOLERANCE, UP, randn, relative
from safetensors.torch import load_file
from test_mistakes import passes
from test_weights import reconfigure, refused
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import pipeline
import sdd
import sdxl
import weights

# What the twins need: SDXL's numbers, which are our defaults, and tiny ones. P is 1280 and 24.
KEYS = "block_out_channels transformer_layers_per_block attention_head_dim cross_attention_dim "
KEYS += "addition_time_embed_dim projection_class_embeddings_input_dim norm_num_groups"
XL = dict(zip(KEYS.split(), [[320, 640, 1280], [1, 2, 10], [5, 10, 20], 2048, 256, 2816, 32]))
TINY = dict(zip(KEYS.split(), [[16, 32, 32], [1, 1, 3], [2, 4, 8], 40, 8, 72, 4]))
TEXT = dict(vocab_size=99, intermediate_size=48, num_hidden_layers=3)
TEXT_1 = TEXT | dict(hidden_size=16, num_attention_heads=2)
TEXT_2 = TEXT | dict(hidden_size=24, num_attention_heads=4, projection_dim=24)
XL_2 = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)


# ---------------------------------------------------------------------- twins and comparisons
def unet_twin(**sizes):
    return diffusers.UNet2DConditionModel(
        down_block_types=[DOWN, CROSS_DOWN, CROSS_DOWN],
        up_block_types=[CROSS_UP, CROSS_UP, UP],
        use_linear_projection=True,
        addition_embed_type="text_time",
        **sizes,
    )


def text_twin(**sizes):
    """The second text encoder. SDXL's config says, too, that the end token is 2."""
    sizes = dict(projection_dim=1280, hidden_act="gelu", eos_token_id=2, pad_token_id=1) | sizes
    return CLIPTextModelWithProjection(CLIPTextConfig(**sizes))


def pair(ours, theirs):
    """The twin, with the random numbers of our network."""
    common.randomise(ours.to_empty(device="cpu"))
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


def added(c, height, width):
    """The twin's further inputs for prompts (B, 78, D) and images of height x width pixels."""
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(c))
    return dict(text_embeds=c[:, -1, : 1280 if c.shape[2] == 2048 else 24], time_ids=sizes)


def unet_error(height=15, width=13, sizes=TINY, dtype=torch.float32):
    with torch.device("meta"):
        ours, theirs = sdxl.UNetXL(**sizes).to(dtype), unet_twin(**sizes).to(dtype)
    pair(ours, theirs)
    z, t = randn(2, 4, height, width).to(dtype), torch.tensor([999, 500])
    c = randn(2, 78, sizes["cross_attention_dim"]).to(dtype)
    more = added(c, 8 * height, 8 * width)
    return relative(ours(z, t, c), theirs(z, t, c[:, :-1], added_cond_kwargs=more).sample)


def text_error():
    """The rows of two prompts. In the second tokenizer's, token 0 fills up."""
    with torch.device("meta"):
        second, second_twin = sdxl.CLIPTextProjection(**TEXT_2), text_twin(**TEXT_2)
    pair(second, second_twin)
    second_twin.text_model.embeddings.position_ids = torch.arange(77)[None]  # in no file
    first, first_twin = common.pair("text_encoder", **TEXT_1)
    tokens = common.padded_tokens(99)
    tokens_2 = torch.where((tokens == 98).cumsum(1) > 1, 0, tokens)
    states = first_twin(tokens, output_hidden_states=True).hidden_states[-2]
    theirs = second_twin(tokens_2, output_hidden_states=True)
    states = torch.cat([states, theirs.hidden_states[-2]], dim=2)
    ours = sdxl.CLIPTextXL(first, second)(tokens, tokens_2)
    pooled = F.pad(theirs.text_embeds, (0, 16))
    return max(relative(ours[:, :77], states), relative(ours[:, 77], pooled))


# ---------------------------------------------------------------------- networks
def shapes_and_eps(network):
    shapes = {name: x.shape for name, x in network.state_dict().items()}
    return shapes, {name: m.eps for name, m in network.named_modules() if hasattr(m, "eps")}


def test_names_shapes_and_eps_are_sdxls():
    with torch.device("meta"):
        ours = sdxl.UNetXL(), sdxl.CLIPTextProjection()
        theirs = unet_twin(**XL), text_twin(**XL_2)
    assert [*map(shapes_and_eps, ours)] == [*map(shapes_and_eps, theirs)]
    assert [len(network.state_dict()) for network in ours] == [1680, 517]
    parameters = [sum(p.numel() for p in network.parameters()) for network in ours]
    assert parameters == [2_567_463_684, 694_659_840]


FULL = pytest.param((16, 16, XL, torch.bfloat16), marks=pytest.mark.long)  # 10 GB of memory


@pytest.mark.parametrize("size", [(16, 8), (15, 13), FULL])
def test_unet(size):
    assert unet_error(*size) <= TOLERANCE


def test_text_encoders():
    assert text_error() <= TOLERANCE


# ---------------------------------------------------------------------- a whole model
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random SDXL, saved by diffusers. "!" is token 0, and fills tokenizer_2's prompts."""
    path = tmp_path_factory.mktemp("xl") / "tiny"
    common.write_vocabulary(path, [])
    words = json.loads((path / "tokenizer" / "vocab.json").read_text())
    words = {"!": 0} | {word: n + 1 for word, n in words.items()}
    (path / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    shutil.copytree(path / "tokenizer", path / "tokenizer_2")
    file = path / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(pad_token="!")))
    size, euler = dict(vocab_size=len(words)), dict(timestep_spacing="leading")
    networks = dict(
        unet=unet_twin(**TINY, sample_size=8),
        vae=common.vae_twin(**common.VAE, scaling_factor=0.13025, sample_size=32),
        text_encoder=common.text_twin(**TEXT_1 | size),
        text_encoder_2=text_twin(**TEXT_2 | size),
    )
    diffusers.StableDiffusionXLPipeline(
        **{name: common.randomise(net, n) for n, (name, net) in enumerate(networks.items())},
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(path / "tokenizer_2"),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(common.SCHEDULER | euler),
        add_watermarker=False,
    ).save_pretrained(path)
    return path


def their_pipeline(folder, kind=None):
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    if kind == "ddim":
        config = dict(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    return pipe


def images_error(folder, kind=None, pipe=None):
    """The largest difference of a number in 0 .. 255, for two prompts. Not square."""
    model, pipe, worst = weights.load(folder), pipe or their_pipeline(folder, kind), 0
    for seed, prompt in enumerate(["a red star on sand", "a moon"]):
        how = dict(guidance_scale=5.0, num_inference_steps=8, height=32, width=48)
        z_T = pipeline.initial_noise((4, 8, 12), [seed])
        theirs = 255 * pipe(prompt, latents=z_T, output_type="np", **how).images[0]
        how = dict(guidance_scale=5.0, steps=8, size=(32, 48), scheduler=kind)
        (ours,) = pipeline.images(model, [prompt], [seed], **how)
        assert theirs.std() > 10
        worst = max(worst, np.abs(ours - theirs).max())
    return worst


@pytest.mark.parametrize("kind", [None, "ddim"])
def test_images(folder, kind):
    assert images_error(folder, kind) <= 1


@torch.enable_grad()
def test_three_iterations_against_diffusers(folder, tmp_path):
    """SDD, with diffusers' UNet, text encoders and DDIM. One latent, guidance 3."""
    line = f"train.py --model {folder} --device cpu --concept star --iters 3 --steps 4 --lr 1e-3"
    line += " --warmup 0 --lr-schedule constant --ema 0.9"
    ours = [it.loss for it in sdd.sdd(**common.training(line, tmp_path / "ours"))]
    pipe, generator = their_pipeline(folder, "ddim"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = pipe.encode_prompt("star", negative_prompt="")
    c_s, c_0 = (torch.cat([c, F.pad(p, (0, 16))[:, None]], dim=1) for c, p in zip(rows, rows[2:]))
    pipe.scheduler.set_timesteps(4)
    timesteps = [*pipe.scheduler.timesteps.tolist(), 0]
    student, teacher = pipe.unet.requires_grad_(False), copy.deepcopy(pipe.unet)
    theta, average = (
        [p for name, p in unet.named_parameters() if ".attn2." in name]
        for unet in (student, teacher)
    )
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in theta], 1e-3, weight_decay=0.01)

    def estimate(unet, z, t, c):
        return unet(z, t, c[:, :77], added_cond_kwargs=added(c, 32, 32)).sample

    for loss in ours:
        z = torch.randn((1, 4, 8, 8), generator=generator)
        k = int(torch.randint(1, 5, (), generator=generator))
        torch.randint(1, (), generator=generator)
        with torch.no_grad():
            for t in timesteps[:k]:
                e_0 = estimate(teacher, z, t, c_0)
                e = e_0 + 3 * (estimate(teacher, z, t, c_s) - e_0)
                z = pipe.scheduler.step(e, t, z).prev_sample
            target = estimate(student, z, timesteps[k], c_0)
        L = F.mse_loss(estimate(student, z, timesteps[k], c_s), target)
        assert loss == pytest.approx(L.item(), rel=1e-3)
        L.backward()
        torch.nn.utils.clip_grad_norm_(theta, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_([p.data for p in average], [p.data for p in theta], 0.1)


def test_commands(folder, tmp_path):
    """Train, stop, resume, generate, measure, attack, convert; diffusers loads the results."""
    train = f"train.py --model {folder} --device cpu --concept star moon"
    line = f"{train} --iters 4 --steps 2 --preview-every 2 --preview-steps 2 --save-every 1"
    line += " --lr 1e-2 --warmup 0"
    assert common.run(line, tmp_path / "whole") == 0
    with common.stopped("SIGTERM", "ema.update", 3):
        common.run(line, tmp_path / "run")
    assert common.run("train.py --resume", tmp_path / "run") == 0
    assert not common.differences(tmp_path / "whole", tmp_path / "run")
    patch = tmp_path / "run" / "erased.safetensors"
    attack = f"attack.py --concept star --patch {patch} --steps 2 --samples 2"
    for name, line in {
        "images": f"generate.py 'a star' --steps 2 --guidance neg --avoid moon --patch {patch}",
        "table": f"eval.py artists --limit 1 --steps 1 --template 'a {{}}' --patch {patch}",
        "relearn": f"{attack} --kind relearn --num-images 2 --at 0 1",
        "uce": f"{train} --method uce --anchor circle --preview-every 0",
        "esd": f"{train} --method esd-x --preset esd-sdxl --iters 1 --steps 1 --preview-every 0 "
        "--dtype bf16 --gradient-checkpointing",
        "folder": f"tools.convert --format diffusers --patch {patch}",
    }.items():
        assert common.run(line, tmp_path / name) == 0, name
    changed, before = load_file(patch), weights.load_network(folder, "unet").state_dict()
    assert changed.keys() == {name for name in before if ".attn2." in name}
    assert not any(torch.equal(x, before[name]) for name, x in changed.items())
    pipe = their_pipeline(folder)
    pipe.unet.load_state_dict(changed, strict=False)
    assert images_error(tmp_path / "folder", pipe=pipe) <= 1
    assert images_error(tmp_path / "folder") <= 1
    assert "StableDiffusionXLPipeline" in (tmp_path / "folder" / "README.md").read_text()


def test_what_is_not_implemented_is_one_sentence(folder, tmp_path, capsys):
    train = f"train.py --model {folder} --device cpu --concept star --preview-every 0"
    for line, said in {
        f"{train} --adversary 2": "--adversary needs a model with one text encoder",
        f"attack.py --model {folder} --concept star --patch none --kind tokens": "--kind tokens",
        f"tools.convert --model {folder} --format single-file": "only --format diffusers",
    }.items():
        assert common.run(line, tmp_path / f"{len(said)}.safetensors") == 2
        assert said in capsys.readouterr().err
    other = shutil.copytree(folder, tmp_path / "other")
    reconfigure(other, "scheduler", timestep_spacing="trailing")  # as XL Turbo
    refused(other, "timestep_spacing = 'trailing'", f"use {weights.SDXL}")
    text = (other / "model_index.json").read_text()
    (other / "model_index.json").write_text(text.replace("XLPipeline", "XLInpaintPipeline"))
    refused(other, "StableDiffusionXLInpaintPipeline", f"use {weights.SDXL}")


# ---------------------------------------------------------------------- mistakes
# fmt: off
MISTAKES = [  # (what is wrong, our module, {text in its source: the mistake}, comparison)
    ("the last layer's states", sdxl, {'["layers"][:-1]': '["layers"]'}, text_error),
    ("the final LayerNorm", sdxl, {"    return x\n": "    return text_model.final_layer_norm(x)\n"},
        text_error),
    ("quick_gelu", sdxl, {'hidden_act="gelu"': 'hidden_act="quick_gelu"'}, text_error),
    ("width before height", sdxl,
        {"[height, width, 0, 0, height, width]": "[width, height, 0, 0, width, height]"},
        unet_error),
    ("the sizes first", sdxl, {"[pooled, self.sizes(z)]": "[self.sizes(z), pooled]"}, unet_error),
    ("padded with the end token", pipeline,
        {"tokenize(model.tokenizer_2,": "tokenize(model.tokenizer,"}, images_error),
    ("ᾱ_0 at the end", pipeline, {"SAMPLERS[kind](": "SAMPLERS['ddim']("}, images_error),
    ("the encoded empty prompt", pipeline, {"torch.zeros_like(c_0) if": "c_0 if"}, images_error),
]
# fmt: on


@pytest.mark.parametrize("mistake", MISTAKES, ids=[name for name, *_ in MISTAKES])
def test_mistake_is_seen(mistake, monkeypatch, folder):
    _, module, changes, comparison = mistake
    common.plant(monkeypatch, module, changes)
    if comparison is images_error:
        assert images_error(folder) > 1
    else:
        assert not passes(comparison)
