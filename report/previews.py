"""What a training run shows of itself: gap and drift, previews, before and after, and the film."""

import sys

import numpy as np
import torch
from PIL import Image

from guidance import cfg, sample
from pipeline import InferenceUNet, encode_prompts, generate_images, initial_noise
from support.censor import censoring
from support.images import grid, save_png

SEED = 1000  # of the first preview prompt; the next prompts use 1001, 1002, …
FLAT = 4.0  # grey levels: an image is flat if no channel's standard deviation is larger. The least
# varied of 400 images of the toy world has 33.


def preview_seeds(settings):
    """The seeds of the preview images, one per prompt."""
    return range(SEED, SEED + len(settings["preview"]))


class Previews:
    """Previews of a train.Run: the same prompts and seeds by original, student and teacher."""

    def __init__(self, run):
        self.run = run
        self.before = None  # images of the original, generated once
        self.warned = False

    @torch.no_grad()
    def measure(self):
        """gap = mean |e(c_s) − e(c_0)|² and drift = mean |e(c_0) − e°(c_0)|², for the log.

        Measured for student and teacher, on fixed latents that the original denoised to a quarter,
        half and three quarters. The loss does not show drift: the student and its target can move
        together.
        """
        run, models = self.run, self.run.models
        c_0, original = run.prompts.c_0, models.original.unet
        T = run.settings["steps"]
        z_T = initial_noise(run.shape[1:], (0, 1)).to(run.device)
        values = {}
        for k in sorted({max(1, T // 4), max(1, T // 2), max(1, 3 * T // 4)}):
            guided = cfg(original, c_0, run.prompts.joined, run.settings["guidance_scale"])
            z = sample(guided, run.scheduler, z_T, k)
            t = run.scheduler.timesteps[k]
            e_0_before = original(z, t, c_0)
            for name, model in (("student", models.student), ("teacher", models.teacher)):
                c_s = run.prompts.joined
                if run.trains_text:
                    c_s = self.encode(model, [", ".join(run.settings["concept"])])
                e_0, e_s = model.unet(z, t, c_0), model.unet(z, t, c_s)
                values.setdefault(f"gap_{name}", []).append(mean_square(e_s - e_0))
                values.setdefault(f"drift_{name}", []).append(mean_square(e_0 - e_0_before))
        return {key: float(np.mean(figures)) for key, figures in values.items()}

    def encode(self, model, prompts):
        """Embeddings by the model's own text encoder, where the text encoder is trained."""
        return encode_prompts(model, prompts).to(self.run.device)

    def images(self, model):
        """The preview prompts' images, uint8 (H, W, 3), by one of the three models."""
        run, a = self.run, self.run.settings
        c_p = self.encode(model, a["preview"]) if run.trains_text else run.prompts.previews
        return list(
            generate_images(
                model,
                InferenceUNet(model.unet, run.device, run.dtype),
                run.prompts.c_0,
                c_p,
                preview_seeds(a),
                run.preview_scheduler,
                a["preview_guidance_scale"],
                run.dtype,
            )
        )

    def save(self, done):
        """Writes previews/<done>.png and a frame of the film. Returns the share of flat images.

        The sheet has one row per prompt, with columns original, student and teacher.
        """
        a, models = self.run.settings, self.run.models
        if self.before is None:
            self.before = self.images(models.original)
        student, teacher = self.images(models.student), self.images(models.teacher)
        flat = share_of_flat(student + teacher)
        self.warn_if_flat(flat, done)
        censor = censoring([*a["concept"], *a["preview"]], a["show_uncensored"])
        self.shown = [
            [censor(image) for image in images] for images in (self.before, student, teacher)
        ]
        before, student, teacher = self.shown
        rows = list(zip(before, student, teacher))
        sheet = grid(rows, a["preview"], ["original", "student", "teacher"])
        out = self.run.out
        save_png(sheet, out / "previews" / f"{done:06d}.png", iteration=done)
        frame = np.concatenate([student[0], teacher[0]])
        save_png(frame, out / "film" / f"{done:06d}.png", iteration=done)
        return flat

    def warn_if_flat(self, flat, done):
        """Warns once if student and teacher give more flat images than the original."""
        before = share_of_flat(self.before)
        if flat > before and not self.warned:
            self.warned = True
            print(
                f"warning: after {done} iterations {100 * flat:.0f} % of the preview images are "
                f"nearly one colour (the original's: {100 * before:.0f} %). This can be overfitting: "
                "look at previews/, and use fewer --iters or a smaller --lr.",
                file=sys.stderr,
            )

    def finish(self, output):
        """Writes before_after.png, with "teacher" or "student" as after, and film.png."""
        a, out = self.run.settings, self.run.out
        self.save(a["iters"])
        before, student, teacher = self.shown
        pairs = list(zip(before, {"student": student, "teacher": teacher}[output]))
        save_png(grid(pairs, a["preview"], ["before", "after"]), out / "before_after.png")
        files = sorted((out / "film").glob("*.png"))
        frames = [np.split(np.asarray(Image.open(file)), 2) for file in files]
        iterations = [str(int(file.stem)) for file in files]
        film = grid(list(zip(*frames)), ["student", "teacher"], iterations)
        save_png(film, out / "film.png")


def mean_square(x):
    return x.float().square().mean().item()


def share_of_flat(images):
    """The share of nearly constant images, uint8 (H, W, 3): a sign of overfitting in the paper."""
    return float(np.mean([image.std((0, 1)).max() < FLAT for image in images]))
