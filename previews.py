"""What a training run shows of itself: gap and drift, preview grids, before and after, the film of student and teacher."""
import sys

import numpy as np
import torch
from PIL import Image

from cover import covering
from generate import Painter, draw, encode, grid, noise, save_png
from guidance import cfg, sample

SEED = 1000  # of the first preview prompt; the next ones count on
FLAT = 4.0  # standard deviation of a near-constant picture's liveliest channel; of 400 drawings of the miniature the least has 33


@torch.no_grad()
def measure(r):
    """gap = mean |e(c_s) − e(c_0)|² and drift = mean |e(c_0) − e°(c_0)|² of student and teacher, on fixed latents that the
    original drew to a quarter, half and three quarters. The loss does not see drift: student and target can move together."""
    T, z_T, figures = r.a["steps"], noise(r.shape, (0, 1)).to(r.device), {}
    for k in {max(1, T // 4), max(1, T // 2), max(1, 3 * T // 4)}:
        z = sample(cfg(r.original.unet, r.c_0, r.joined, r.a["guidance_scale"]), r.scheduler, z_T, k)
        t = r.scheduler.levels[k]
        before = r.original.unet(z, t, r.c_0)
        for name, net in (("student", r.student), ("teacher", r.teacher)):
            c_s = texts(r, net, [", ".join(r.a["concept"])]) if r.reads else r.joined
            e_0, e_s = net.unet(z, t, r.c_0), net.unet(z, t, c_s)
            for key, d in ((f"gap_{name}", e_s - e_0), (f"drift_{name}", e_0 - before)):
                figures.setdefault(key, []).append(d.float().square().mean().item())
    return {key: float(np.mean(values)) for key, values in figures.items()}


def texts(r, net, prompts):
    """Embeddings by the text encoder of `net`: the three have one each where it is trained."""
    return encode(net, prompts).to(r.device)


def seeds(a):
    """Of the noise that the preview pictures start from, one a prompt."""
    return range(SEED, SEED + len(a["preview"]))


def pictures(r, net):
    """The preview prompts' pictures by one of the three models: same seeds, whichever it is."""
    c_p = texts(r, net, r.a["preview"]) if r.reads else r.previews
    return [*draw(net, Painter(net.unet, r.device, r.dtype), r.c_0, c_p, seeds(r.a), r.preview_scheduler,
                  r.a["preview_guidance_scale"], r.dtype)]


def preview(r, i):
    """previews/i.png: rows prompts, columns original, student, teacher; and a frame of the film, the first prompt's."""
    if not r.before:
        r.before = pictures(r, r.original)
    drawn = [r.before, pictures(r, r.student), pictures(r, r.teacher)]
    watch(r, i, drawn[1] + drawn[2])
    shown = covering([*r.a["concept"], *r.a["preview"]], r.a["show_uncensored"])
    before, student, teacher = ([shown(picture) for picture in some] for some in drawn)
    sheet = grid(list(zip(before, student, teacher)), r.a["preview"], ["original", "student", "teacher"])
    save_png(sheet, r.out / "previews" / f"{i:06d}.png", iteration=i)
    save_png(np.concatenate([student[0], teacher[0]]), r.out / "film" / f"{i:06d}.png", iteration=i)
    return before, student, teacher


def share_of_flat(pictures):
    """The share of near-constant ones among pictures, uint8 (H, W, 3): a sign of overfitting in the paper (arXiv 2307.05977)."""
    return float(np.mean([picture.std((0, 1)).max() < FLAT for picture in pictures]))


def watch(r, i, pictures):
    """Notes the share as r.flat, and says once if the models draw more near-constant pictures than the original did."""
    r.flat, before = share_of_flat(pictures), share_of_flat(r.before)
    if r.flat > before and not r.warned:
        print(f"warning: after {i} iterations {100 * r.flat:.0f} % of the preview pictures are nearly one colour (of the original's "
              f"{100 * before:.0f} %): this can be overfitting; look at previews/, and take fewer --iters or a smaller --lr.",
              file=sys.stderr)
        r.warned = True


def finish(r, output):
    """before_after.png, after by `output` ("teacher" or "student"), and film.png from the frames."""
    before, student, teacher = preview(r, r.a["iters"])
    pairs = list(zip(before, {"student": student, "teacher": teacher}[output]))
    save_png(grid(pairs, r.a["preview"], ["before", "after"]), r.out / "before_after.png")
    files = sorted((r.out / "film").glob("*.png"))
    frames = [np.split(np.asarray(Image.open(file)), 2) for file in files]
    save_png(grid(list(zip(*frames)), ["student", "teacher"], [str(int(f.stem)) for f in files]), r.out / "film.png")
