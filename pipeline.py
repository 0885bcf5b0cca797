"""Text to images: prompts -> embeddings -> latents -> images, as a library (the command is generate.py).

Image n of a prompt starts from noise of its own, seeded with seed + n on the CPU. So a seed means
the same image at any batch size and on any device.
"""

import copy
import difflib
import sys
from contextlib import contextmanager

import torch
from tqdm import tqdm

import weights
from clip_text import MAX_TOKENS, tokenize
from guidance import GUIDANCE, sample
from scheduler import SAMPLERS
from support.errors import UserError

DECODED = (
    2**20
)  # pixels at once: 4 pictures of 512 x 512; eval.py's 32 would need tens of GB and tensors of 2³¹ elements


def make_scheduler(config, steps, kind=None):
    """The sampler `kind`, by default the one that scheduler_config.json names."""
    kind = kind or {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm"}.get(config.get("_class_name"))
    if kind is None:
        raise UserError(
            f"The model's own sampler, {config.get('_class_name')}, is not implemented: say --scheduler ddim or pndm."
        )
    schedule = {
        key: config[key]
        for key in ("num_train_timesteps", "beta_start", "beta_end", "steps_offset")
        if key in config
    }
    try:
        return SAMPLERS[kind](steps, **schedule)
    except ValueError as e:
        raise UserError(str(e)) from None


def check_words(model, prompts):
    """A miniature vocabulary spells words it does not know letter by letter; refuse those, and say which it knows."""
    vocabulary = model.tokenizer.get_vocab()
    if len(vocabulary) > 1000:
        return
    known = {
        word[:-4]
        for word in vocabulary
        if word.endswith("</w>") and (len(word) > 5 or word == "a</w>")
    }
    for prompt in prompts:
        for word in prompt.lower().replace(",", " ").split():
            if word not in known:
                near = (
                    "".join(
                        f"did you mean {x!r}? It" for x in difflib.get_close_matches(word, known, 1)
                    )
                    or "it"
                )
                raise UserError(
                    f"The embedded model does not know the word {word!r}; {near} knows: {', '.join(sorted(known))}."
                )


@torch.no_grad()
def encode_prompts(model, prompts, tell=True):
    """Prompts -> embeddings (len(prompts), 77, D), on its device; prompts that were cut to 77 tokens are told once."""
    check_words(model, prompts)
    tokens, cut = tokenize(model.tokenizer, prompts)
    if tell and any(cut):
        print(
            f"{sum(cut)} of {len(cut)} prompts are longer than {MAX_TOKENS} tokens; what is beyond is not read: "
            f"{prompts[cut.index(True)][:60]!r}…",
            file=sys.stderr,
        )
    device = next(model.text_encoder.parameters()).device
    return torch.cat([model.text_encoder(part.to(device)) for part in tokens.split(64)])


def initial_noise(shape, seeds):
    """z_T (len(seeds), *shape): float32, each image's from a CPU generator of its own."""
    return torch.cat(
        [
            torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))
            for seed in seeds
        ]
    )


class InferenceUNet:
    """A UNet that only draws: ε(z, t, c) from float32 to float32, computed in `dtype` throughout, on `device`. Autocast would cast every
    float32 weight in each evaluation and, on CUDA, what goes into and comes out of each norm. Shares the tensors that are so already."""

    def __init__(self, unet, device, dtype):
        self.device, self.dtype = device, dtype
        self.source = [
            p for p in unet.parameters() if p.dtype != dtype or p.device.type != device.type
        ]
        self.copies = [
            torch.nn.Parameter(p.detach().to(device, dtype), requires_grad=False)
            for p in self.source
        ]
        own = {id(p): p for p in unet.parameters()} | {
            id(p): copied for p, copied in zip(self.source, self.copies)
        }
        self.unet = copy.deepcopy(unet, memo=own)
        for module in self.unet.modules():
            vars(module).pop(
                "forward", None
            )  # --gradient-checkpointing's: in a circle with its block, it would keep the copies alive

    def __call__(self, z, t, context):
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.unet(z.to(self.dtype), t, context.to(self.dtype)).float()

    @torch.no_grad()
    def sync(self):
        """Takes over what the UNet that it was made from has become."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.source)


@torch.no_grad()
def generate_latents(
    model,
    unet,
    c_0,
    c_p,
    seeds,
    scheduler,
    guidance_scale,
    size=None,
    batch_size=4,
    bar=None,
    method="sd",
    c_S=None,
    warmup=None,
):
    """Embeddings c_0 (1, 77, D) and c_p (n, 77, D), and n seeds -> yields latents (batch, 4, h, w), float32, n in all.

    `unet` may be another than the model's own (an erased one), or a InferenceUNet; z_T goes to the device of c_0. `bar` names a progress bar.
    `method`, one of GUIDANCE, keeps away from c_S after `warmup` evaluations; each batch is a trajectory of its own.
    """
    size = size or model.resolution
    device, shape = (
        c_0.device,
        (
            4,
            *(
                side // model.vae.factor
                for side in (size if isinstance(size, tuple) else (size, size))
            ),
        ),
    )
    for i in tqdm(
        range(0, len(seeds), batch_size), bar, unit="batch", disable=None if bar else True
    ):
        part = slice(i, i + batch_size)
        estimate = GUIDANCE[method](unet, c_0, c_p[part], c_S, guidance_scale, warmup)
        yield sample(estimate, scheduler, initial_noise(shape, seeds[part]).to(device))


@torch.no_grad()
def generate_images(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, dtype, **how):
    """The same, decoded in `dtype`: yields n pictures, uint8 (H, W, 3)."""
    for z in generate_latents(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, **how):
        few = max(1, DECODED // (model.vae.factor**2 * z.shape[2] * z.shape[3]))
        with torch.autocast(
            z.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        ):
            pictures = torch.cat([model.vae.decode(part) for part in z.split(few)])
        pictures = (pictures.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        yield from (pictures * 255).round().astype("uint8")


def avoided_prompts(method, texts):
    """The prompts that a method of GUIDANCE keeps away from: SEGA's one by one, for the others all in one."""
    if (method == "sd") == bool(texts):
        raise UserError(
            "--avoid says what --method neg, sld-… or sega keeps away from: name both, or neither."
        )
    if not all(text.strip() for text in texts):
        raise UserError("--avoid has an empty concept: say what to keep away from.")
    return list(texts) if method == "sega" else [", ".join(texts)] * bool(texts)


@contextmanager
def patched(model, file):
    """The model with a patch in it, if there is a file, and what the patch says of itself; then the model as it was."""
    changed, parts = weights.read(file)[0].keys() if file else (), (model.unet, model.text_encoder)
    base = {
        x: x.clone() for part in parts for name, x in part.state_dict().items() if name in changed
    }
    try:
        yield weights.load_patch(file, *parts) if file else {}
    finally:
        for x, before in base.items():
            x.copy_(before)
