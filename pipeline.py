"""Text to images, as a library: prompts -> embeddings -> latents -> images.

    model = weights.load("emoji")
    for image in images(model, ["a fox by noto", "a beer"]):
        ...  # uint8 (64, 64, 3)

Each image starts from noise of its own, drawn on the CPU from the image's seed. So a seed means the
same noise at any batch size and on any device, and the same image but for rounding. (Not with
adversaries.NoisyDDIM: the noise that it adds is drawn for the whole batch.)
"""

import copy
import difflib
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import weights
from clip_text import MAX_TOKENS, tokenize
from guidance import GUIDANCE, SEGA_WARMUP, SLD, sample
from scheduler import SAMPLERS
from support.cli import autocast, refuse_unused
from support.errors import UserError, warn_once, warning
from support.fast import InferenceUNet

SAVED = 64  # latents between two writes: whole batches, so a stopped run generates the same images
DECODED = 2**18  # pixels that the VAE decodes at once: an image of 512 x 512. 32 need tens of GB
# Evaluations before a method acts, by its paper.
WARMUPS = {"sega": SEGA_WARMUP} | {f"sld-{name}": row["delta"] for name, row in SLD.items()}


# ---------------------------------------------------------------------------------------- sampler
def noise_schedule(config):
    """The noise schedule of a scheduler_config.json, as arguments of a sampler."""
    return {key: value for key, value in config.items() if key in weights.ARGUMENTS["scheduler"]}


def make_scheduler(config, steps, kind=None):
    """The sampler `kind`, "ddim" or "pndm"; without it, the one that the model's config names."""
    kind = kind or weights.own_sampler(config)
    if kind not in SAMPLERS:
        raise UserError(f"There is no sampler {kind!r}: use ddim or pndm.")
    try:
        return SAMPLERS[kind](steps, **noise_schedule(config))
    except ValueError as e:
        raise UserError(f"{e}: ask for fewer.") from None


# ---------------------------------------------------------------------------------------- prompts
def known_words(tokenizer):
    """The words of a toy model's small vocabulary; None for CLIP's, which can spell anything."""
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > 1000:
        return None
    words = set()
    for token in vocabulary:
        # "a</w>" is a word; other single letters are there to spell unknown words.
        if token.endswith("</w>") and (len(token) > 5 or token == "a</w>"):
            words.add(token.removesuffix("</w>"))
    added = tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)
    return words | added  # the word of an attack, see with_word below


def words_of(prompt):
    """The words of a prompt, as a toy model's tokenizer reads them."""
    return prompt.lower().replace(",", " ").split()


def check_words(model, prompts):
    """UserError for a word that a toy model does not know. It would be spelled letter by letter."""
    known = known_words(model.tokenizer)
    if known is None:
        return
    for word in words_of(" ".join(prompts)):
        if word not in known:
            near = difflib.get_close_matches(word, known, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"The toy model does not know the word {word!r}. {hint}It knows: "
                f"{', '.join(sorted(known))}."
            )


def token_ids(model, prompts, device):
    """([ids (n, 77) of each of the model's tokenizers], which prompts are cut)."""
    found = [tokenize(model.tokenizer, prompts)]
    if model.tokenizer_2:
        found.append(tokenize(model.tokenizer_2, prompts))
    return [ids.to(device) for ids, _ in found], found[0][1]


@torch.no_grad()
def encode_prompts(model, *groups, warn=True):
    """Prompts -> embeddings, on the text encoder's device: one tensor (n, 77, D) per group.

    SDXL's have 78 rows (sdxl.py).

    A group is a list of n prompts, or one prompt. With one group the result is its tensor. So
    `c_0, c_p = encode_prompts(model, "", ["a star", "a moon"])` has (1, 77, D) and (2, 77, D).
    A group that has its embeddings already, a tensor, stays as it is.
    warn: print a warning if prompts were cut to 77 tokens.
    UserError for a word that a toy model does not know.
    """
    groups = [[group] if isinstance(group, str) else group for group in groups]
    texts = [group for group in groups if not isinstance(group, torch.Tensor)]
    prompts = [prompt for group in texts for prompt in group]
    if not prompts:
        return groups
    check_words(model, prompts)
    tokens, cut = token_ids(model, prompts, next(model.text_encoder.parameters()).device)
    if warn and any(cut):
        warning(
            f"{sum(cut)} of {len(cut)} prompts are longer than {MAX_TOKENS} tokens; the rest is "
            f"not read: {prompts[cut.index(True)][:60]!r}…"
        )
    parts = zip(*(ids.split(64) for ids in tokens))
    states = torch.cat([model.text_encoder(*part) for part in parts])
    states = iter(states.split([len(group) for group in texts]))
    found = [group if isinstance(group, torch.Tensor) else next(states) for group in groups]
    return found[0] if len(found) == 1 else found


def without_prompt(model, c_0):
    """What images without a negative prompt use in the place of c_0: for SDXL zeros."""
    return torch.zeros_like(c_0) if model.zeros else c_0


def refuse_words(model, what):
    """UserError for words that are learned or searched: SDXL has two tables of words."""
    if model.tokenizer_2:
        raise UserError(f"{what} needs a model with one text encoder, and {model.name} has two.")


# ----------------------------------------------------------------------------------------- sampling
def initial_noise(shape, seeds):
    """z_T (len(seeds), *shape), float32. Each image has a CPU generator of its own."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])


def latent_shape(model, size=None):
    """(4, h, w) for images of `size` pixels, a number or (height, width); None: the model's own."""
    size = size or model.resolution
    height, width = size if isinstance(size, tuple) else (size, size)
    factor = model.vae.factor
    if height % factor or width % factor:
        raise UserError(f"Images of {height} x {width} pixels: use multiples of {factor}.")
    return 4, height // factor, width // factor


@torch.no_grad()
def generate_latents(
    model,
    prompts,
    seeds=None,
    *,
    unet=None,
    scheduler=None,
    steps=50,
    guidance_scale=7.5,
    negative="",
    guidance="sd",
    avoid=(),
    warmup=None,
    size=None,
    batch_size=4,
    dtype=torch.float32,
    bar=None,
):
    """Generates latents of one image per prompt: yields batches (B, 4, h, w), float32.

    prompts, negative, avoid: texts, or their embeddings on the UNet's device, (n, 77, D),
    (1, 77, D) and (K, 77, D). seeds: one number per image (default: 0, 1, ..).
    unet: an InferenceUNet that is used several times (default: one of the model's UNet).
    scheduler: a sampler, or its name (default: the model's own). steps: of a sampler by name.
    guidance: one of GUIDANCE. It moves away from `avoid` after `warmup` evaluations.
    size: pixels, a number or (height, width) (default: the model's resolution).
    dtype: of the computation. bar: the title of a progress bar, which counts denoising steps.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    n = len(prompts)
    seeds = range(n) if seeds is None else seeds
    if len(seeds) != n:
        raise UserError(f"There are {n} prompts and {len(seeds)} seeds: use one seed per prompt.")
    if guidance not in GUIDANCE:
        raise UserError(f"There is no guidance {guidance!r}. There are: {', '.join(GUIDANCE)}.")
    if isinstance(avoid, str):
        avoid = [avoid]
    if not isinstance(avoid, torch.Tensor):
        avoid = avoided_prompts(guidance, avoid)
    c_0, c_S, c_p = encode_prompts(model, negative, avoid, prompts)
    if isinstance(negative, str) and not negative:
        c_0 = without_prompt(model, c_0)
    if scheduler is None or isinstance(scheduler, str):
        scheduler = make_scheduler(model.scheduler, steps, scheduler)
    unet = unet or InferenceUNet(model.unet, c_p.device, dtype)
    shape = latent_shape(model, size)
    starts = range(0, n, batch_size)
    total = len(starts) * scheduler.evaluations
    with tqdm(total=total, desc=bar, unit="step", disable=None if bar else True) as progress:
        for i in starts:
            part = slice(i, i + batch_size)
            # A new estimator for each batch, because SLD and SEGA have momentum.
            estimator = GUIDANCE[guidance](unet, c_0, c_p[part], c_S, guidance_scale, warmup)

            def counted(z, t, i, estimator=estimator):
                progress.update()
                return estimator(z, t, i)

            z_T = initial_noise(shape, seeds[part]).to(c_p.device)
            z_0 = sample(counted, scheduler, z_T)
            if not z_0.isfinite().all():
                raise UserError(
                    "The UNet gives latents with NaN or infinity, which are no images: use --dtype "
                    "fp32. If it is fp32, the model or its patch is broken."
                )
            yield z_0


def saved_latents(file, title, model, c_p, n, seed, **how):
    """Latents z_0 (n, 4, h, w) of images of the prompts c_p (P, 77, D) in turn, saved in `file`.

    Image i has the seed `seed` + i. Latents that the file already holds are not generated again.
    title: what the progress bar shows. how: arguments of generate_latents.
    """
    settings = {"n": str(n), "seed": str(seed), "prompts": str(len(c_p))}
    z_0 = torch.empty(0, device=c_p.device)
    if file.exists():
        tensors, metadata = weights.read(file)
        if metadata != settings:
            raise UserError(f"{file} holds other images than this run needs: choose a new folder.")
        z_0 = tensors["z_0"].to(c_p.device)
    while len(z_0) < n:
        which = torch.arange(len(z_0), min(len(z_0) + SAVED, n))
        prompts = c_p[which.to(c_p.device) % len(c_p)]
        seeds = (seed + which).tolist()
        bar = f"{title}, {len(z_0)} of {n} kept"
        more = generate_latents(model, prompts, seeds, bar=bar, **how)
        z_0 = torch.cat([z_0, *more])
        weights.save(file, {"z_0": z_0}, settings)
    return z_0


@torch.no_grad()
def images(model, prompts, seeds=None, *, dtype=torch.float32, **how):
    """Generates one image per prompt: yields uint8 (H, W, 3). Arguments: see generate_latents.

    An image is made when you ask for it. So inside `patched`, also iterate inside it.
    """
    for z in generate_latents(model, prompts, seeds, dtype=dtype, **how):
        pixels = model.vae.factor**2 * z.shape[2] * z.shape[3]
        few = max(1, DECODED // pixels)
        with autocast(z.device, torch.float32 if model.float32_vae else dtype):
            decoded = torch.cat([model.vae.decode(part) for part in z.split(few)])
        if not decoded.isfinite().all():
            warn_once("the VAE's numbers are too large for --dtype: images are decoded in float32.")
            with autocast(z.device, torch.float32):
                decoded = torch.cat([model.vae.decode(part) for part in z.split(few)])
        if not decoded.isfinite().all():
            raise UserError("The VAE gives images with NaN or infinity: its weights are broken.")
        decoded = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        yield from (decoded * 255).round().astype("uint8")


# --------------------------------------------------------------------- guidance away from a concept
def avoided_prompts(method, texts):
    """The prompts of c_S for a method of GUIDANCE: SEGA's one by one; the others' joined in one."""
    if method == "sd":
        if texts:
            raise UserError(
                "--avoid needs a method that moves away from something: add --guidance neg, sld-… "
                "or sega."
            )
        return []
    if not texts:
        raise UserError(f"--guidance {method} needs --avoid: name what to move away from.")
    if not all(text.strip() for text in texts):
        raise UserError("--avoid has an empty concept: name what to move away from.")
    return list(texts) if method == "sega" else [", ".join(texts)]


def check_warmup(method, warmup, scheduler):
    """UserError for a guidance warm-up without effect, or one that leaves no evaluation to act.

    warmup: the value of --guidance-warmup, None without it.
    """
    if method not in WARMUPS:
        if warmup is not None:
            where = f"with --guidance {method}"
            refuse_unused(["guidance_warmup"], where, ", or choose sld-… or sega")
        return
    used = WARMUPS[method] if warmup is None else warmup
    if used >= scheduler.evaluations:
        raise UserError(
            f"The guidance warm-up of --guidance {method} ({used} evaluations) is not shorter than "
            f"the run ({scheduler.evaluations}), so it would never act: use a smaller "
            "--guidance-warmup, or more --steps."
        )


@contextmanager
def patched(model, file):
    """The model with a patch in it; afterwards the model as it was. Yields the patch's metadata.

    file: the patch; None for the model as it is, and empty metadata.
    """
    if not file:
        yield {}
        return
    parts = (model.unet, model.text_encoder)
    own = parts[0].state_dict() | parts[1].state_dict()
    before = {name: own[name].clone() for name in weights.read(file)[0] if name in own}
    try:
        yield weights.load_patch(file, *parts)
    finally:
        for name, x in before.items():
            own[name].copy_(x)


def with_word(model, file):
    """(a copy of the model with one more word, the word), from a textual-inversion file.

    file: a safetensors file with one tensor, (D,) or (1, D), whose name is the word; None for the
    model as it is. attack.py writes such files, and diffusers' load_textual_inversion reads them.
    """
    if not file:
        return model, None
    refuse_words(model, f"The word of {file}")
    tensors, _ = weights.read(file)
    text_encoder, tokenizer = copy.deepcopy((model.text_encoder, model.tokenizer))
    embedding = text_encoder.text_model.embeddings.token_embedding
    vectors = [x.reshape(-1, x.shape[-1] if x.dim() else 1) for x in tensors.values()]
    if [tuple(x.shape) for x in vectors] != [(1, embedding.embedding_dim)]:
        held = ", ".join(f"{len(x)} vectors of {x.shape[1]} numbers" for x in vectors) or "nothing"
        raise UserError(
            f"{file} does not hold one word of {embedding.embedding_dim} numbers, but {held}: use "
            "a word.safetensors that attack.py wrote for this model."
        )
    (word,) = tensors
    if word == "emb_params":  # in other programs the file's name is the word
        word = Path(file).stem
    if word in tokenizer.get_vocab():
        raise UserError(f"The model already has a word {word!r}: rename the one in {file}.")
    rows = embedding.weight[: len(tokenizer)]  # the new word's number is the next one
    table = torch.cat([rows, vectors[0].to(rows)])
    embedding.weight = torch.nn.Parameter(table, requires_grad=False)
    tokenizer.add_tokens([word])
    return model._replace(text_encoder=text_encoder, tokenizer=tokenizer), word
