"""Text to images, as a library: prompts -> embeddings -> latents -> images.

Image n of a prompt starts from noise of its own, seeded with seed + n on the CPU. So a seed means
the same noise at any batch size and on any device, and the same image but for rounding. (Not with
adversaries.NoisyDDIM: the noise that it adds is drawn for the whole batch.)
"""

import copy
import difflib
import sys
from contextlib import contextmanager

import torch
from tqdm import tqdm

import weights
from clip_text import MAX_TOKENS, tokenize
from guidance import GUIDANCE, SEGA_WARMUP, SLD, sample
from scheduler import SAMPLERS
from support.cli import memory_is_full
from support.cuda_graph import CudaGraph, can_record
from support.errors import UserError, first_line

SAMPLER_NAMES = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm"}  # in scheduler_config.json
DECODED = 2**18  # pixels that the VAE decodes at once: an image of 512 x 512. 32 need tens of GB
# Evaluations before a method acts, by its paper.
WARMUPS = {"sega": SEGA_WARMUP} | {f"sld-{name}": row["delta"] for name, row in SLD.items()}


# ---------------------------------------------------------------------------------------- sampler
def noise_schedule(config):
    """The noise schedule of a scheduler_config.json, as arguments of a sampler."""
    return {key: value for key, value in config.items() if key in weights.ARGUMENTS["scheduler"]}


def make_scheduler(config, steps, kind=None):
    """The sampler `kind`, "ddim" or "pndm"; without it, the one that the model's config names."""
    name = config.get("_class_name")
    kind = kind or SAMPLER_NAMES.get(name)
    if kind is None:
        raise UserError(
            f"The model's own sampler, {name}, is not implemented: use --scheduler ddim or pndm."
        )
    try:
        return SAMPLERS[kind](steps, **noise_schedule(config))
    except ValueError as e:
        raise UserError(str(e)) from None


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
    return words | added  # the word of an attack, see added_word below


def check_words(model, prompts):
    """UserError for a word that a toy model does not know. It would be spelled letter by letter."""
    known = known_words(model.tokenizer)
    if known is None:
        return
    for prompt in prompts:
        for word in prompt.lower().replace(",", " ").split():
            if word in known:
                continue
            near = difflib.get_close_matches(word, known, 1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"The toy model does not know the word {word!r}. {hint}It knows: "
                f"{', '.join(sorted(known))}."
            )


@torch.no_grad()
def encode_prompts(model, prompts, warn=True):
    """Prompts -> embeddings (len(prompts), 77, D), on the text encoder's device.

    warn: print a warning if prompts were cut to 77 tokens.
    """
    check_words(model, prompts)
    tokens, cut = tokenize(model.tokenizer, prompts)
    if warn and any(cut):
        print(
            f"warning: {sum(cut)} of {len(cut)} prompts are longer than {MAX_TOKENS} tokens; the "
            f"rest is not read: {prompts[cut.index(True)][:60]!r}…",
            file=sys.stderr,
        )
    device = next(model.text_encoder.parameters()).device
    return torch.cat([model.text_encoder(part.to(device)) for part in tokens.split(64)])


# ----------------------------------------------------------------------------------------- sampling
def initial_noise(shape, seeds):
    """z_T (len(seeds), *shape), float32. Each image has a CPU generator of its own."""
    noise = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        noise.append(torch.randn((1, *shape), generator=generator))
    return torch.cat(noise)


def compiled(unet):
    """The UNet as torch.compile makes it; if that fails, a warning, and the UNet as it is."""
    fast, failed = None, False

    def evaluate(*inputs):
        nonlocal fast, failed
        if not failed:
            try:
                if fast is None:
                    fast = torch.compile(unet, dynamic=False, fullgraph=True)
                return fast(*inputs)
            except Exception as e:  # of many classes, from dynamo, Inductor, Triton or a C compiler
                recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
                if memory_is_full(e) or recording:
                    raise
                fast, failed = None, True
                why = first_line(getattr(e, "inner_exception", e))
                print(f"warning: torch.compile failed, so it is not used: {why}", file=sys.stderr)
        return unet(*inputs)

    return evaluate


class InferenceUNet:
    """A UNet for sampling only: ε(z, t, c), float32 in and out, computed in `dtype` on `device`.

    It shares the tensors that already have this type and device, and copies the others once.
    (Autocast would cast every float32 weight in each evaluation and, on CUDA, the input and output
    of each norm.) On CUDA it replays a CUDA graph (support/cuda_graph.py).
    compile: on CUDA, the graph is made of torch.compile's kernels. One of them does the work of
    several others, so fewer results travel through the GPU's memory (docs/benchmarks.md).
    """

    def __init__(self, unet, device, dtype, compile=False):
        self.device, self.dtype = device, dtype
        self.source, self.copies = [], []
        own = {}  # id of a parameter: the tensor that takes its place
        for p in unet.parameters():
            own[id(p)] = p
            if p.dtype != dtype or p.device.type != device.type:
                copied = torch.nn.Parameter(p.detach().to(device, dtype), requires_grad=False)
                own[id(p)] = copied
                self.source.append(p)
                self.copies.append(copied)
        self.unet = copy.deepcopy(unet, memo=own)
        for module in self.unet.modules():
            # --gradient-checkpointing's `forward` refers to its block, and so keeps copies alive.
            vars(module).pop("forward", None)
        self.graph = None
        if device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)  # faster, see docs/benchmarks.md
        if can_record(device):
            unet = self.unet  # not `self`, so that this object is freed with its last reference
            if compile:
                unet = compiled(unet)
            self.graph = CudaGraph(lambda *inputs: (unet(*inputs),))

    def __call__(self, z, t, context):
        z, context = z.to(self.dtype), context.to(self.dtype)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.graph is None:
                return self.unet(z, t, context).float()
            t = torch.full((len(z),), t, device=z.device)  # a graph reads t from memory
            return self.graph(z, t, context)[0].float()

    @torch.no_grad()
    def sync(self):
        """Copies the source UNet's current weights."""
        if self.copies:
            torch._foreach_copy_(self.copies, self.source)


def count_evaluations(estimator, bar):
    """The same estimator; each call moves the progress bar by one."""

    def counted(z, t, i):
        e = estimator(z, t, i)
        bar.update()
        return e

    return counted


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
    """Yields latents (batch, 4, h, w), float32, n in all.

    unet: the model's own, another one (an erased one), or an InferenceUNet.
    c_0 (1, 77, D), c_p (n, 77, D): embeddings; z_T goes to their device. seeds: n.
    size: pixels, a number or (height, width); default: the model's resolution.
    bar: the title of a progress bar, which counts denoising steps; default: none.
    method: one of GUIDANCE. It moves away from c_S after `warmup` evaluations.
    """
    size = size or model.resolution
    height, width = size if isinstance(size, tuple) else (size, size)
    shape = (4, height // model.vae.factor, width // model.vae.factor)
    evaluations = scheduler.evaluations
    starts = range(0, len(seeds), batch_size)
    with tqdm(
        total=len(starts) * evaluations, desc=bar, unit="step", disable=None if bar else True
    ) as progress:
        for i in starts:
            part = slice(i, i + batch_size)
            # A new estimator for each batch, because SLD and SEGA have momentum.
            estimator = GUIDANCE[method](unet, c_0, c_p[part], c_S, guidance_scale, warmup)
            z_T = initial_noise(shape, seeds[part]).to(c_0.device)
            yield sample(count_evaluations(estimator, progress), scheduler, z_T)


@torch.no_grad()
def generate_images(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, dtype, **how):
    """Like generate_latents, then decoded in `dtype`: yields n images, uint8 (H, W, 3)."""
    for z in generate_latents(model, unet, c_0, c_p, seeds, scheduler, guidance_scale, **how):
        pixels = model.vae.factor**2 * z.shape[2] * z.shape[3]
        few = max(1, DECODED // pixels)
        with torch.autocast(
            z.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
        ):
            images = torch.cat([model.vae.decode(part) for part in z.split(few)])
        images = (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        yield from (images * 255).round().astype("uint8")


# --------------------------------------------------------------------- guidance away from a concept
def avoided_prompts(method, texts):
    """The prompts of c_S for a method of GUIDANCE: SEGA's one by one; the others' joined in one."""
    if method == "sd" and texts:
        raise UserError(
            "--avoid needs a method that moves away from something: add --method neg, sld-… or "
            "sega."
        )
    if method != "sd" and not texts:
        raise UserError(f"--method {method} needs --avoid: name what to move away from.")
    if not all(text.strip() for text in texts):
        raise UserError("--avoid has an empty concept: name what to move away from.")
    if method == "sd":
        return []
    if method == "sega":
        return list(texts)
    return [", ".join(texts)]


def check_warmup(method, warmup, scheduler):
    """UserError for a guidance warm-up without effect, or one that leaves no evaluation to act.

    warmup: the value of --guidance-warmup, None without it.
    """
    if method not in WARMUPS:
        if warmup is not None:
            raise UserError(
                f"--guidance-warmup has no effect with --method {method}: remove it, or choose "
                "sld-… or sega."
            )
        return
    evaluations = scheduler.evaluations
    used = WARMUPS[method] if warmup is None else warmup
    if used >= evaluations:
        raise UserError(
            f"The guidance warm-up of --method {method} ({used} evaluations) is not shorter than "
            f"the run ({evaluations}), so it would never act: use a smaller "
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
    changed = weights.read(file)[0].keys()
    before = []  # (tensor of the model, its values)
    for part in parts:
        for name, x in part.state_dict().items():
            if name in changed:
                before.append((x, x.clone()))
    try:
        yield weights.load_patch(file, *parts)
    finally:
        for x, values in before:
            x.copy_(values)


@contextmanager
def added_word(model, file):
    """The model with one more word, from a textual-inversion file.

    Afterwards the model's table of words is as it was. Its tokenizer keeps the word, so the same
    word can be added again, but no other one.
    file: a safetensors file with one tensor, (D,) or (1, D), whose name is the word; None for none.
    attack.py writes such files, and diffusers' load_textual_inversion reads them.
    """
    if not file:
        yield None
        return
    tensors, _ = weights.read(file)
    embedding = model.text_encoder.text_model.embeddings.token_embedding
    table = embedding.weight
    vectors = [x.reshape(1, -1) for x in tensors.values()]
    if len(vectors) != 1 or vectors[0].shape[1] != table.shape[1]:
        raise UserError(
            f"{file} does not hold one word of {table.shape[1]} numbers: use a word.safetensors "
            "that attack.py wrote for this model."
        )
    word = next(iter(tensors))
    if model.tokenizer.convert_tokens_to_ids(word) != len(table):  # not added by an earlier call
        if word in model.tokenizer.get_vocab():
            raise UserError(f"The model already has a word {word!r}: rename the one in {file}.")
        if len(model.tokenizer) != len(table):
            raise UserError(f"This model had another word before {word!r}: load it again.")
        model.tokenizer.add_tokens([word])
    embedding.weight = torch.nn.Parameter(
        torch.cat([table, vectors[0].to(table)]), requires_grad=False
    )
    try:
        yield word
    finally:
        embedding.weight = table
