"""Text to picture:   python generate.py "a red star on sand" --model toy --out pictures

Image n of a prompt starts from noise of its own, seeded with seed + n on the CPU, so that a seed means the same picture at
any batch size and on any device.
"""
import argparse
import copy
import difflib
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

import weights
from clip_text import MAX_TOKENS, tokenize
from command import add_common_arguments, finite, natural, one_of, pick_device, pick_dtype, positive, refuse_used, run
from cover import covering
from folder import alone
from guidance import GUIDANCE, sample
from scheduler import SAMPLERS
from weights import UserError

DECODED = 2**20  # pixels at once: 4 pictures of 512 x 512; eval.py's 32 would need tens of GB and tensors of 2³¹ elements


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


class Painter:
    """A UNet that only draws: ε(z, t, c) from float32 to float32, computed in `dtype` throughout, on `device`. Autocast would cast every
    float32 weight in each evaluation and, on CUDA, what goes into and comes out of each norm. Shares the tensors that are so already."""

    def __init__(self, unet, device, dtype):
        self.device, self.dtype = device, dtype
        self.source = [p for p in unet.parameters() if p.dtype != dtype or p.device.type != device.type]
        self.copies = [torch.nn.Parameter(p.detach().to(device, dtype), requires_grad=False) for p in self.source]
        own = {id(p): p for p in unet.parameters()} | {id(p): copied for p, copied in zip(self.source, self.copies)}
        self.unet = copy.deepcopy(unet, memo=own)
        for module in self.unet.modules():
            vars(module).pop("forward", None)  # --gradient-checkpointing's: in a circle with its block, it would keep the copies alive

    def __call__(self, z, t, context):
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.unet(z.to(self.dtype), t, context.to(self.dtype)).float()

    @torch.no_grad()
    def follow(self):
        """Takes over what the UNet that it was made from has become."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.source)


@torch.no_grad()
def draw_latents(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, size=None, batch_size=4, bar=None, method="sd", c_S=None,
                 warmup=None):
    """Embeddings c_0 (1, 77, D) and c_p (n, 77, D), and n seeds -> yields latents (batch, 4, h, w), float32, n in all.

    `unet` may be another than the model's own (an erased one), or a Painter; z_T goes to the device of c_0. `bar` names a progress bar.
    `method`, one of GUIDANCE, keeps away from c_S after `warmup` evaluations; each batch is a trajectory of its own.
    """
    size = size or model.resolution
    device, shape = c_0.device, (4, *(side // model.vae.factor for side in (size if isinstance(size, tuple) else (size, size))))
    for i in tqdm(range(0, len(seeds), batch_size), bar, unit="batch", disable=None if bar else True):
        part = slice(i, i + batch_size)
        estimate = GUIDANCE[method](unet, c_0, c_p[part], c_S, guidance_scale, warmup)
        yield sample(estimate, scheduler, noise(shape, seeds[part]).to(device))


@torch.no_grad()
def draw(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, dtype, **how):
    """The same, decoded in `dtype`: yields n pictures, uint8 (H, W, 3)."""
    for z in draw_latents(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, **how):
        few = max(1, DECODED // (model.vae.factor**2 * z.shape[2] * z.shape[3]))
        with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            pictures = torch.cat([model.vae.decode(part) for part in z.split(few)])
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


def avoided(method, texts):
    """The prompts that a method of GUIDANCE keeps away from: SEGA's one by one, for the others all in one."""
    if (method == "sd") == bool(texts):
        raise UserError("--avoid says what --method neg, sld-… or sega keeps away from: name both, or neither.")
    if not all(text.strip() for text in texts):
        raise UserError("--avoid has an empty concept: say what to keep away from.")
    return list(texts) if method == "sega" else [", ".join(texts)] * bool(texts)


@contextmanager
def patched(model, file):
    """The model with a patch in it, if there is a file, and what the patch says of itself; then the model as it was."""
    changed, parts = weights.read(file)[0].keys() if file else (), (model.unet, model.text_encoder)
    base = {x: x.clone() for part in parts for name, x in part.state_dict().items() if name in changed}
    try:
        yield weights.load_patch(file, *parts) if file else {}
    finally:
        for x, before in base.items():
            x.copy_(before)


def name_of(file):
    """A patch by its run: train.py calls every file erased.safetensors."""
    return "original" if file == "none" else Path(file).parent.name if Path(file).name == "erased.safetensors" else Path(file).stem


def generate(args):
    with alone(args.out):
        refuse_used(args.out)
        write_pictures(args)


def write_pictures(args):
    avoid, patches = avoided(args.method, args.avoid), args.patch or ["none"]
    names = [name_of(file) for file in patches]
    if len(set(names)) < len(names):
        raise UserError(f"Two patches would both be called {max(names, key=names.count)}: rename a file or its folder.")
    if args.method == "neg" and args.negative_prompt:
        raise UserError("--method neg puts --avoid in the place of --negative-prompt: name one of them.")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = weights.load(args.model, args.revision)
    if (args.resolution or 0) % model.vae.factor:
        raise UserError(f"--resolution {args.resolution}: it must be a multiple of {model.vae.factor} for this model.")
    scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
    told = []
    for file in patches:  # what is wrong with one of them is said before any is drawn
        with patched(model, None if file == "none" else file) as about:
            told.append(about.get("concepts", ""))
    for part in (model.vae, model.text_encoder):
        part.to(device)
    shown = covering([*args.prompts, *args.avoid, *told], args.show_uncensored)
    rows, lines = [[] for _ in args.prompts], []
    for file, name, concepts in zip(patches, names, told):
        folder = args.out / name if len(patches) > 1 else args.out
        about = dict(model=model.name, patch=f"{file} ({concepts})" if file != "none" else "none")
        about |= {"method": args.method, "avoid": "; ".join(args.avoid)} if avoid else {}
        for n, (job, picture) in enumerate(draw_jobs(model, file, avoid, args, scheduler, dtype)):
            save_png(picture, folder / job["file"], prompt=job["prompt"], seed=job["seed"], **about)
            lines.append(json.dumps(job | {"file": (folder / job["file"]).relative_to(args.out).as_posix()}, ensure_ascii=False) + "\n")
            rows[n // args.num_images].append(shown(picture))
    columns = [name for name in names for _ in range(args.num_images)] if len(patches) > 1 else ()
    save_png(grid(rows, [p if len(p) <= 40 else p[:39] + "…" for p in args.prompts], columns), args.out / "grid.png")
    with weights.whole(args.out / "prompts.jsonl") as beside:
        beside.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} pictures in {args.out}, side by side in {args.out / 'grid.png'}")


def draw_jobs(model, file, avoid, args, scheduler, dtype):
    """Yields ({file, prompt, seed}, picture) for each prompt and each of its seeds, by the model with the patch `file`, or with "none"."""
    with patched(model, None if file == "none" else file):
        texts = encode(model, [args.negative_prompt, *args.prompts, *avoid])
        c_0, c_p, c_S = texts.split([1, len(args.prompts), len(avoid)])
        jobs = [{"file": f"{p * args.num_images + n:05d}.png", "prompt": prompt, "seed": args.seed + n}
                for p, prompt in enumerate(args.prompts) for n in range(args.num_images)]
        seeds = [job["seed"] for job in jobs]
        yield from zip(jobs, draw(model, Painter(model.unet, c_0.device, dtype), c_0, c_p.repeat_interleave(args.num_images, 0), seeds,
                                  scheduler, args.guidance_scale, dtype, size=args.resolution, batch_size=args.batch_size, bar="drawing",
                                  method=args.method, c_S=c_S, warmup=args.guidance_warmup))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--model", default=weights.DEFAULT_MODEL, help="toy, a hub id or a folder in diffusers' layout")
    parser.add_argument("--patch", nargs="+", metavar="FILE", help="one erased.safetensors of train.py, or several, or none, side by side")
    parser.add_argument("--scheduler", **one_of(SAMPLERS), help="default: the model's own")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--guidance-scale", type=finite, default=7.5)
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="takes the place of the empty prompt (NEG)")
    parser.add_argument("--method", **one_of(GUIDANCE), default="sd", help="how the sampler keeps away from --avoid; sd: not at all")
    parser.add_argument("--guidance-warmup", type=natural, metavar="N",
                        help="evaluations before sld or sega act; default: their papers', for 50 steps")
    parser.add_argument("--avoid", nargs="+", default=[], metavar="C", help="what to keep away from; sega takes several one by one")
    parser.add_argument("--seed", type=natural, default=0, help="image n of a prompt starts from noise seeded with seed + n")
    parser.add_argument("--num-images", type=positive, default=1, help="pictures a prompt")
    parser.add_argument("--resolution", type=positive, help="pixels a side; default: what the model was trained for")
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_common_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(generate, parse()))
