"""Text to picture:   python generate.py "a red star on sand" --model toy --out pictures

Image n of a prompt starts from noise of its own, seeded with seed + n on the CPU, so that a seed means the same picture at
any batch size and on any device.
"""
import argparse
import difflib
import json
import math
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import weights
from clip_text import MAX_TOKENS, tokenize
from folder import alone
from guidance import GUIDANCE, sample
from scheduler import SAMPLERS
from weights import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name):
    """`auto` is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch raises either, by device
        raise UserError(f"--device {name} cannot be used here ({str(e).splitlines()[0]}): say --device cpu, or check the driver.") from e
    return device


def pick_dtype(name, device):
    """`auto` is float32, but on CUDA bfloat16, or float16 on cards without it."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def make_scheduler(config, steps, kind=None):
    """The sampler `kind`, by default the one that scheduler_config.json names."""
    kind = kind or {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm"}.get(config.get("_class_name"))
    if kind is None:
        raise UserError(f"The model's own sampler, {config.get('_class_name')}, is not implemented: say --scheduler ddim or pndm.")
    schedule = {key: config[key] for key in ("num_train_timesteps", "beta_start", "beta_end", "steps_offset") if key in config}
    try:
        return SAMPLERS[kind](steps, **schedule)
    except ValueError as e:
        raise UserError(str(e)) from None


def check_words(model, prompts):
    """A miniature vocabulary spells words it does not know letter by letter; refuse those, and say which it knows."""
    vocabulary = model.tokenizer.get_vocab()
    if len(vocabulary) > 1000:
        return
    known = {word[:-4] for word in vocabulary if word.endswith("</w>") and (len(word) > 5 or word == "a</w>")}
    for prompt in prompts:
        for word in prompt.lower().replace(",", " ").split():
            if word not in known:
                near = "".join(f"did you mean {x!r}? It" for x in difflib.get_close_matches(word, known, 1)) or "it"
                raise UserError(f"The embedded model does not know the word {word!r}; {near} knows: {', '.join(sorted(known))}.")


@torch.no_grad()
def encode(model, prompts, tell=True):
    """Prompts -> embeddings (len(prompts), 77, D), on its device; prompts that were cut to 77 tokens are told once."""
    check_words(model, prompts)
    tokens, cut = tokenize(model.tokenizer, prompts)
    if tell and any(cut):
        print(f"{sum(cut)} of {len(cut)} prompts are longer than {MAX_TOKENS} tokens; what is beyond is not read: "
              f"{prompts[cut.index(True)][:60]!r}…", file=sys.stderr)
    device = next(model.text_encoder.parameters()).device
    return torch.cat([model.text_encoder(part.to(device)) for part in tokens.split(64)])


def noise(shape, seeds):
    """z_T (len(seeds), *shape): float32, each image's from a CPU generator of its own."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def draw_latents(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, dtype, size=None, batch_size=4, bar=None, method="sd", c_S=None,
                 warmup=None):
    """Embeddings c_0 (1, 77, D) and c_p (n, 77, D), and n seeds -> yields latents (batch, 4, h, w), n in all.

    `unet` may be another than the model's own (an erased one). Runs on the device of its weights; `bar` names a progress bar.
    `method`, one of GUIDANCE, keeps away from c_S after `warmup` evaluations; each batch is a trajectory of its own.
    """
    size = size or model.resolution
    device, shape = c_0.device, (4, *(side // model.vae.factor for side in (size if isinstance(size, tuple) else (size, size))))
    for i in tqdm(range(0, len(seeds), batch_size), bar, unit="batch", disable=None if bar else True):
        part = slice(i, i + batch_size)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):  # cached casts go stale
            z = noise(shape, seeds[part]).to(device)
            z = sample(GUIDANCE[method](unet, c_0, c_p[part], c_S, guidance_scale, warmup), scheduler, z)
        yield z


@torch.no_grad()
def draw(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, dtype, **how):
    """The same, decoded: yields n pictures, uint8 (H, W, 3)."""
    for z in draw_latents(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, dtype, **how):
        with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            pictures = model.vae.decode(z)
        pictures = (pictures.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        yield from (pictures * 255).round().astype("uint8")


def grid(rows, labels=(), columns=()):
    """A picture of pictures: rows of equally large arrays (H, W, 3), a label beside each row, one above each column."""
    H, W, _ = rows[0][0].shape
    zoom = max(1, 128 // H)
    H, W, pad, font = H * zoom, W * zoom, 4, ImageFont.load_default(14)
    left = int(max((font.getlength(label) for label in labels), default=0)) + (2 * pad if labels else 0)
    top = 22 if columns else 0
    sheet = Image.new("RGB", (left + max(map(len, rows)) * (W + pad) + pad, top + len(rows) * (H + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        y = top + pad + i * (H + pad)
        for j, picture in enumerate(row):
            x = left + pad + j * (W + pad)
            sheet.paste(Image.fromarray(picture).resize((W, H), Image.Resampling.NEAREST), (x, y))
            if i == 0 and j < len(columns):
                pen.text((x + W / 2, top / 2 + 2), columns[j], "black", font, anchor="mm")
        if i < len(labels):
            pen.text((pad, y + H / 2), labels[i], "black", font, anchor="lm")
    return sheet


def save_png(picture, file, **text):
    """An array (H, W, 3) or an image -> file, with `text` in the PNG's text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, str(value))
    with weights.whole(file) as beside:
        (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(beside, pnginfo=info)


def refuse_used(folder, advice=""):
    """An output folder that already holds something is refused."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose a new folder with --out{advice}.")


def avoided(method, texts):
    """The prompts that a method of GUIDANCE keeps away from: SEGA's one by one, for the others all in one."""
    if (method == "sd") == bool(texts):
        raise UserError("--avoid says what --method neg, sld-… or sega keeps away from: name both, or neither.")
    if not all(text.strip() for text in texts):
        raise UserError("--avoid has an empty concept: say what to keep away from.")
    return list(texts) if method == "sega" else [", ".join(texts)] * bool(texts)


def generate(args):
    with alone(args.out):
        refuse_used(args.out)
        write_pictures(args)


def write_pictures(args):
    avoid = avoided(args.method, args.avoid)
    if args.method == "neg" and args.negative_prompt:
        raise UserError("--method neg puts --avoid in the place of --negative-prompt: name one of them.")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = weights.load(args.model, args.revision)
    patch = weights.load_patch(args.patch, model.unet, model.text_encoder) if args.patch else None
    if (args.resolution or 0) % model.vae.factor:
        raise UserError(f"--resolution {args.resolution}: it must be a multiple of {model.vae.factor} for this model.")
    scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
    texts = encode(model, [args.negative_prompt, *args.prompts, *avoid]).to(device)
    c_0, c_p, c_S = texts.split([1, len(args.prompts), len(avoid)])
    model.unet.to(device), model.vae.to(device)
    jobs = [{"file": f"{p * args.num_images + n:05d}.png", "prompt": prompt, "seed": args.seed + n}
            for p, prompt in enumerate(args.prompts) for n in range(args.num_images)]
    drawn = draw(model, model.unet, c_0, c_p.repeat_interleave(args.num_images, 0), [job["seed"] for job in jobs], scheduler,
                 args.guidance_scale, dtype, size=args.resolution, batch_size=args.batch_size, bar="drawing", method=args.method, c_S=c_S,
                 warmup=args.guidance_warmup)
    pictures, erased = [], f"{args.patch} ({patch.get('concepts')})" if patch else "none"
    told = {"method": args.method, "avoid": "; ".join(args.avoid)} if avoid else {}
    for job, picture in zip(jobs, drawn):
        save_png(picture, args.out / job["file"], prompt=job["prompt"], seed=job["seed"], model=model.name, patch=erased, **told)
        pictures.append(picture)
    rows = [pictures[i:i + args.num_images] for i in range(0, len(pictures), args.num_images)]
    save_png(grid(rows, [p if len(p) <= 40 else p[:39] + "…" for p in args.prompts]), args.out / "grid.png")
    with weights.whole(args.out / "prompts.jsonl") as beside:
        beside.write_text("".join(json.dumps(job, ensure_ascii=False) + "\n" for job in jobs), encoding="utf-8")
    print(f"{len(pictures)} pictures in {args.out}, side by side in {args.out / 'grid.png'}")


def positive(text):
    """An argument that counts something: 1, 2, … up to a million, as a list of them has to fit the memory."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    if value > 1_000_000:
        raise argparse.ArgumentTypeError(f"{text} is more than a million")
    return value


def finite(text):
    """An argument that is a number, neither NaN nor infinite."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def one_of(names):
    """An argument that is one of `names`; for another the nearest is suggested."""
    def name(text):
        if text not in names:
            near = "".join(f"did you mean {x}? " for x in difflib.get_close_matches(text, names, 1))
            raise argparse.ArgumentTypeError(f"there is no {text!r}: {near}There are: {', '.join(names)}")
        return text
    return name


def natural(text):
    """An argument that starts a count or seeds a generator: 0, 1, … up to 2⁶² (seeds are counted on from it)."""
    if not 0 <= (value := int(text)) <= 2**62:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 … 2^62")
    return value


def add_common_arguments(parser):
    parser.add_argument("--revision", help="a branch, tag or commit of the hub's model")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu")
    parser.add_argument("--dtype", default="auto", type=one_of(["auto", *DTYPES]), choices=["auto", *DTYPES], help="auto: fp32; on CUDA bf16, or fp16 without it")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--model", default=weights.DEFAULT_MODEL, help="toy, a hub id or a folder in diffusers' layout")
    parser.add_argument("--patch", type=Path, help="an erased.safetensors that train.py wrote")
    parser.add_argument("--scheduler", type=one_of(SAMPLERS), choices=[*SAMPLERS], help="default: the model's own")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--guidance-scale", type=finite, default=7.5)
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="takes the place of the empty prompt (NEG)")
    parser.add_argument("--method", type=one_of(GUIDANCE), choices=[*GUIDANCE], default="sd", help="how the sampler keeps away from --avoid; sd: not at all")
    parser.add_argument("--guidance-warmup", type=natural, metavar="N", help="evaluations before sld or sega act; default: their papers', for 50 steps")
    parser.add_argument("--avoid", nargs="+", default=[], metavar="C", help="what to keep away from; sega takes several one by one")
    parser.add_argument("--seed", type=natural, default=0, help="image n of a prompt starts from noise seeded with seed + n")
    parser.add_argument("--num-images", type=positive, default=1, help="pictures a prompt")
    parser.add_argument("--resolution", type=positive, help="pixels a side; default: what the model was trained for")
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_common_arguments(parser)
    return parser.parse_args(argv)


def run(main, args, stopped="what is written so far stays; choose a new folder with --out to begin again"):
    """A command's exit status: 0; 2 after one sentence about what the user can do; 130 after Ctrl-C or SIGTERM and the sentence
    `stopped`, which may name {out}."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as e:
        if type(e) is RuntimeError and "can't allocate memory" not in str(e):  # torch's class is of a GPU's memory only
            raise
        print("error: the memory is full: try a smaller --batch-size or --resolution, or --dtype bf16.", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"error: {e}: check the disk's space and the folder's permissions, and run the same command again.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped: {stopped.format(out=getattr(args, 'out', ''))}.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(run(generate, parse()))
