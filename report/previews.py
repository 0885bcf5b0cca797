"""What a training run shows of itself: gap and drift, previews, before and after, and the film."""

import re

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import pipeline
from guidance import cfg, sample
from pipeline import encode_prompts, initial_noise, latent_shape, make_scheduler
from presets import PREVIEW_PROMPTS
from support.errors import warning
from support.files import atomic_write
from support.images import grid, save_png
from support.nudity import censoring

MODELS = ("student", "teacher")  # that a run changes
SEED = 1000  # of the first preview prompt; the next prompts use 1001, 1002, …
FLAT = 4.0  # grey levels: an image is flat if no channel's standard deviation is larger. The least
# varied of 400 images of the toy world has 33.

FILM_PROMPTS = 3  # the first prompts are in film.webp
FILM_FRAMES = 24  # at most, in both films
FILM_SIDE = 160  # pixels; smaller images are enlarged as in every sheet
FILM_TITLE = 24  # pixels above the sheet, for the iteration
FILM_BYTES = 1_000_000  # at most: the film stands on the first screen of the README
FRAME_TIME, LAST_FRAME_TIME = 600, 2400  # milliseconds


def preview_seeds(settings):
    return range(SEED, SEED + len(settings["preview"]))


def preview_kinds(settings, world=None):
    """What each preview is to the erased concepts.

    "erased" (it names one), "member" (it names a member of one: beer of alcohol), "implied",
    "stay" (it is something else), or None if unknown. world: the module of a toy model's world, see
    toy/worlds.py. Without it, only the presets' own prompts are known to stay.
    """
    concepts, kinds = settings["concept"], []
    texts = {"erased": concepts}
    if world:
        texts["member"] = [word for kind in concepts for word in world.MEMBERS.get(kind, ())]
        texts["implied"] = [place for place, word in world.PLACES.items() if word in concepts]
    for prompt in settings["preview"]:
        other = "stay" if world or prompt in PREVIEW_PROMPTS else None
        kinds.append(next((kind for kind in texts if names_any(prompt, texts[kind])), other))
    return kinds


def names_any(prompt, texts):
    return any(
        re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt, re.IGNORECASE) for text in texts
    )


class Previews:
    """Previews of a run: the same prompts and seeds by original, student and teacher.

    a: the run's settings. models: [student, teacher, original]. c: the run's embeddings, with c_0,
    joined and previews.
    """

    def __init__(self, out, a, models, c, device, dtype):
        self.out, self.a, self.c = out, a, c
        self.student, self.teacher, self.original = models
        self.device, self.dtype = device, dtype
        self.before = None  # images of the original, generated once
        self.warned = False

    @torch.no_grad()
    def measure(self):
        """gap = mean |e(c_s) − e(c_0)|² and drift = mean |e(c_0) − e°(c_0)|², for the log.

        Measured for student and teacher, on fixed latents that the original denoised to a quarter,
        half and three quarters. The loss does not show drift: the student and its target can move
        together.
        """
        c_0, original, T = self.c.c_0, self.original.unet, self.a.steps
        scheduler = make_scheduler(self.original.scheduler, T, "ddim")
        z_T = initial_noise(latent_shape(self.original), (0, 1)).to(self.device)
        values = {}
        for k in sorted({max(1, T // 4), max(1, T // 2), max(1, 3 * T // 4)}):
            guided = cfg(original, c_0, self.c.joined, self.a.guidance_scale)
            z = sample(guided, scheduler, z_T, k)
            t = scheduler.timesteps[k]
            e_0_before = original(z, t, c_0)
            for name, model in (("student", self.student), ("teacher", self.teacher)):
                c_s = self.embed(model, [", ".join(self.a.concept)], self.c.joined)
                gap, drift = gap_and_drift(model.unet, z, t, c_s, c_0, e_0_before)
                values.setdefault(f"gap_{name}", []).append(gap)
                values.setdefault(f"drift_{name}", []).append(drift)
        return {key: float(np.mean(figures)) for key, figures in values.items()}

    def embed(self, model, prompts, c):
        """c, the prompts' embeddings; where the text encoder is trained, those of the model's."""
        if self.a.train_params != "embedding":
            return c
        return encode_prompts(model, prompts).to(self.device)

    def images(self, model):
        """The preview prompts' images, uint8 (H, W, 3), by one of the three models."""
        generated = pipeline.images(
            model,
            self.embed(model, self.a.preview, self.c.previews),
            preview_seeds(vars(self.a)),
            negative=self.c.c_0,
            scheduler="ddim",
            steps=self.a.preview_steps,
            guidance_scale=self.a.preview_guidance_scale,
            dtype=self.dtype,
        )
        return list(generated)

    def save(self, done):
        """Writes the previews after `done` iterations. Returns the share of flat images.

        Single images: image_file. One sheet for all, previews/<done>.png: one row per prompt, with
        columns original, student and teacher. The sheet is written last, so it marks a preview
        whose images are all there.
        """
        a, first = self.a, self.before is None
        if first:
            self.before = self.images(self.original)
        student, teacher = self.images(self.student), self.images(self.teacher)
        flat = share_of_flat(student + teacher)
        self.warn_if_flat(flat, done)

        censor = censoring([*a.concept, *a.preview], a.show_uncensored)
        columns = {"original": self.before, "student": student, "teacher": teacher}
        for model, images in columns.items():
            columns[model] = [censor(image) for image in images]
            if model == "original" and not first:
                continue  # this process has written it; a resumed run may censor, or not any more
            trained = 0 if model == "original" else done
            for n, image in enumerate(columns[model]):
                file = image_file(self.out, model, n, done)
                save_png(image, file, prompt=a.preview[n], iteration=trained)
        rows = list(zip(*columns.values()))
        save_png(grid(rows, a.preview, columns), sheet_file(self.out, done), iteration=done)
        return flat

    def warn_if_flat(self, flat, done):
        """Warns once if student and teacher give more flat images than the original."""
        before = share_of_flat(self.before)
        if flat > before and not self.warned:
            self.warned = True
            warning(
                f"after {done} iterations {100 * flat:.0f} % of the preview images are "
                f"nearly one colour (the original's: {100 * before:.0f} %). This can be "
                "overfitting: look at previews/, and use fewer --iters or a smaller --lr."
            )

    def finish(self, output):
        """The last preview; before_after.png, film.png and film.webp.

        output: the model that is the result, "teacher" or "student".
        """
        self.save(self.a.iters)
        save_before_after(self.out, self.a.preview, output, self.a.iters)
        save_film(self.out, self.a.preview[:FILM_PROMPTS])


# ------------------------------------------------------------------------------- files of a run
def sheet_file(out, done):
    return out / "previews" / f"{done:06d}.png"


def image_file(out, model, n, done):
    """The image of the n-th prompt by "original", "student" or "teacher" after `done` iterations.

    The original does not change, so it has one file per prompt.
    """
    if model == "original":
        return out / "previews" / f"original-{n}.png"
    return out / "previews" / f"{done:06d}" / f"{model}-{n}.png"


def finished_previews(out):
    """The iterations at which previews were made, in order.

    A preview that a kill cut short has no sheet and does not count.
    """
    done = [int(file.stem) for file in (out / "previews").glob("*.png") if file.stem.isdigit()]
    return sorted(i for i in done if image_file(out, "student", 0, i).exists())


def sheet(out, models, cells, labels, columns, side=None):
    """A PIL image of previews: a row per model, a column per cell (prompt's number, iterations).

    side: the pixels of an image, at most.
    """
    rows = []
    for model in models:
        rows.append([])
        for n, done in cells:
            image = Image.open(image_file(out, model, n, done)).convert("RGB")
            if side:
                image.thumbnail((side, side))
            rows[-1].append(np.asarray(image))
    return grid(rows, labels, columns)


def save_before_after(out, prompts, output, done):
    """before_after.png: one column per prompt, with rows before and after."""
    cells = [(n, done) for n in range(len(prompts))]
    image = sheet(out, ["original", output], cells, ["before", "after"], prompts)
    save_png(image, out / "before_after.png")


def save_film(out, prompts):
    """The film of student and teacher; its frames are previews.

    film.png: the first prompt, one column per frame. film.webp: an animation that repeats for
    ever, one column per prompt, with the iteration on top.
    """
    iterations, frames = thin_out(finished_previews(out), FILM_FRAMES), []
    cells = [(0, done) for done in iterations]
    save_png(sheet(out, MODELS, cells, MODELS, map(str, iterations)), out / "film.png")
    for done in iterations:
        cells = [(n, done) for n in range(len(prompts))]
        images = sheet(out, MODELS, cells, MODELS, prompts, FILM_SIDE)
        frame = Image.new("RGB", (images.width, images.height + FILM_TITLE), "white")
        frame.paste(images, (0, FILM_TITLE))
        title, font = f"after {done} iterations", ImageFont.load_default(16)
        ImageDraw.Draw(frame).text((frame.width / 2, 14), title, "black", font, anchor="mm")
        frames.append(frame)
    durations = [FRAME_TIME] * (len(frames) - 1) + [LAST_FRAME_TIME]
    animation = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    for quality in (90, 70, 50, 30, 10):
        with atomic_write(out / "film.webp") as temporary:
            frames[0].save(temporary, "WEBP", quality=quality, **animation)
        if (out / "film.webp").stat().st_size <= FILM_BYTES:
            break


def thin_out(values, n):
    """At most n of the values, evenly spaced, with the first and the last."""
    if len(values) <= n:
        return list(values)
    return [values[round(i * (len(values) - 1) / (n - 1))] for i in range(n)]


# ------------------------------------------------------------------------------------- measures
def gap_and_drift(unet, z, t, c_s, c_0, e_0_before):
    """(mean |e(c_s) − e(c_0)|², mean |e(c_0) − e°(c_0)|²). e_0_before: e°(c_0), the original's."""
    e_0, e_s = unet(z, t, c_0), unet(z, t, c_s)
    distances = (e_s - e_0, e_0 - e_0_before)
    return tuple(x.float().square().mean().item() for x in distances)


def share_of_flat(images):
    """The share of nearly constant images, uint8 (H, W, 3): a sign of overfitting in the paper."""
    return float(np.mean([image.std((0, 1)).max() < FLAT for image in images]))
