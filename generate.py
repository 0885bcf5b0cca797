"""Text to picture:   python generate.py "a red star on sand" --model toy --out pictures

Image n of a prompt starts from noise of its own, seeded with seed + n on the CPU, so that a seed means the same picture at
any batch size and on any device.
"""

import support.openmp  # noqa: F401 (before torch)

import argparse
import json
import sys
from pathlib import Path

import weights
from guidance import GUIDANCE
from pipeline import (
    InferenceUNet,
    avoided_prompts,
    encode_prompts,
    generate_images,
    make_scheduler,
    patched,
)
from scheduler import SAMPLERS
from support.censor import censoring
from support.cli import (
    add_common_arguments,
    finite,
    natural,
    one_of,
    pick_device,
    pick_dtype,
    positive,
    refuse_used,
    run_command,
)
from support.errors import UserError
from support.files import atomic_write, lock_folder
from support.images import grid, save_png


def name_of(file):
    """A patch by its run: train.py calls every file erased.safetensors."""
    return (
        "original"
        if file == "none"
        else Path(file).parent.name
        if Path(file).name == "erased.safetensors"
        else Path(file).stem
    )


def generate(args):
    with lock_folder(args.out):
        refuse_used(args.out)
        write_pictures(args)


def write_pictures(args):
    avoid, patches = avoided_prompts(args.method, args.avoid), args.patch or ["none"]
    names = [name_of(file) for file in patches]
    if len(set(names)) < len(names):
        raise UserError(
            f"Two patches would both be called {max(names, key=names.count)}: rename a file or its folder."
        )
    if args.method == "neg" and args.negative_prompt:
        raise UserError(
            "--method neg puts --avoid in the place of --negative-prompt: name one of them."
        )
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    model = weights.load(args.model, args.revision)
    if (args.resolution or 0) % model.vae.factor:
        raise UserError(
            f"--resolution {args.resolution}: it must be a multiple of {model.vae.factor} for this model."
        )
    scheduler = make_scheduler(model.scheduler, args.steps, args.scheduler)
    told = []
    for file in patches:  # what is wrong with one of them is said before any is drawn
        with patched(model, None if file == "none" else file) as about:
            told.append(about.get("concepts", ""))
    for part in (model.vae, model.text_encoder):
        part.to(device)
    shown = censoring([*args.prompts, *args.avoid, *told], args.show_uncensored)
    rows, lines = [[] for _ in args.prompts], []
    for file, name, concepts in zip(patches, names, told):
        folder = args.out / name if len(patches) > 1 else args.out
        about = dict(model=model.name, patch=f"{file} ({concepts})" if file != "none" else "none")
        about |= {"method": args.method, "avoid": "; ".join(args.avoid)} if avoid else {}
        for n, (job, picture) in enumerate(draw_jobs(model, file, avoid, args, scheduler, dtype)):
            save_png(picture, folder / job["file"], prompt=job["prompt"], seed=job["seed"], **about)
            lines.append(
                json.dumps(
                    job | {"file": (folder / job["file"]).relative_to(args.out).as_posix()},
                    ensure_ascii=False,
                )
                + "\n"
            )
            rows[n // args.num_images].append(shown(picture))
    columns = [name for name in names for _ in range(args.num_images)] if len(patches) > 1 else ()
    save_png(
        grid(rows, [p if len(p) <= 40 else p[:39] + "…" for p in args.prompts], columns),
        args.out / "grid.png",
    )
    with atomic_write(args.out / "prompts.jsonl") as beside:
        beside.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} pictures in {args.out}, side by side in {args.out / 'grid.png'}")


def draw_jobs(model, file, avoid, args, scheduler, dtype):
    """Yields ({file, prompt, seed}, picture) for each prompt and each of its seeds, by the model with the patch `file`, or with "none"."""
    with patched(model, None if file == "none" else file):
        texts = encode_prompts(model, [args.negative_prompt, *args.prompts, *avoid])
        c_0, c_p, c_S = texts.split([1, len(args.prompts), len(avoid)])
        jobs = [
            {"file": f"{p * args.num_images + n:05d}.png", "prompt": prompt, "seed": args.seed + n}
            for p, prompt in enumerate(args.prompts)
            for n in range(args.num_images)
        ]
        seeds = [job["seed"] for job in jobs]
        yield from zip(
            jobs,
            generate_images(
                model,
                InferenceUNet(model.unet, c_0.device, dtype),
                c_0,
                c_p.repeat_interleave(args.num_images, 0),
                seeds,
                scheduler,
                args.guidance_scale,
                dtype,
                size=args.resolution,
                batch_size=args.batch_size,
                bar="drawing",
                method=args.method,
                c_S=c_S,
                warmup=args.guidance_warmup,
            ),
        )


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "--model",
        default=weights.DEFAULT_MODEL,
        help="toy, a hub id or a folder in diffusers' layout",
    )
    parser.add_argument(
        "--patch",
        nargs="+",
        metavar="FILE",
        help="one erased.safetensors of train.py, or several, or none, side by side",
    )
    parser.add_argument("--scheduler", **one_of(SAMPLERS), help="default: the model's own")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--guidance-scale", type=finite, default=7.5)
    parser.add_argument(
        "--negative-prompt",
        default="",
        metavar="TEXT",
        help="takes the place of the empty prompt (NEG)",
    )
    parser.add_argument(
        "--method",
        **one_of(GUIDANCE),
        default="sd",
        help="how the sampler keeps away from --avoid; sd: not at all",
    )
    parser.add_argument(
        "--guidance-warmup",
        type=natural,
        metavar="N",
        help="evaluations before sld or sega act; default: their papers', for 50 steps",
    )
    parser.add_argument(
        "--avoid",
        nargs="+",
        default=[],
        metavar="C",
        help="what to keep away from; sega takes several one by one",
    )
    parser.add_argument(
        "--seed",
        type=natural,
        default=0,
        help="image n of a prompt starts from noise seeded with seed + n",
    )
    parser.add_argument("--num-images", type=positive, default=1, help="pictures a prompt")
    parser.add_argument(
        "--resolution", type=positive, help="pixels a side; default: what the model was trained for"
    )
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    add_common_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(generate, parse()))
