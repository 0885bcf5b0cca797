"""What a training run is made of: three models that share what is not trained, the prompts' embeddings, the optimizer, checkpoints."""
import json
import os
import platform
from functools import partial

import torch
import transformers
from torch.utils.checkpoint import checkpoint

import anchors
import ema
import weights
from clip_text import tokenize
from command import pick_device, pick_dtype
from generate import Painter, encode, make_scheduler
from intact import digest
from losses import METHODS, TRAIN_PARAMS
from sdd import half_drawn, sdd
from unet import ResnetBlock, Transformer
from weights import UserError

VERSIONS = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
EMBEDDING = "text_model.embeddings.token_embedding.weight"


class Run:
    """`a`: the settled arguments of train.py. Everything that an iteration needs, and what a checkpoint has to hold."""

    def __init__(self, out, a, model=None):
        self.out, self.a = out, a
        self.device = pick_device(a["device"])
        self.dtype = pick_dtype(a["dtype"], self.device, training=True)
        if a["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        model = model or weights.load(a["model"], a["revision"])
        for text in [*a["concept"], ", ".join(a["concept"])]:
            if len(model.tokenizer(text, verbose=False).input_ids) > model.tokenizer.model_max_length:
                raise UserError(f"A concept has to fit 77 tokens, all of them joined too: {text[:60]!r}… does not.")
        self.scheduler = make_scheduler(model.scheduler, a["steps"], "ddim")
        self.preview_scheduler = make_scheduler(model.scheduler, a["preview_steps"], "ddim")
        self.shape = (4, model.resolution // model.vae.factor, model.resolution // model.vae.factor)
        self.warned, self.before, self.generator = False, None, torch.Generator("cpu").manual_seed(a["seed"])
        self.split(model)
        self.asked = self.encode_prompts()
        print(f"training {len(self.theta)} tensors, {sum(p.numel() for p in self.theta.values()):,} parameters, on {self.device} "
              f"({str(self.dtype)[6:]} where frozen); output: {out}")

    def split(self, model):
        """student, teacher and original, which share all that is not trained; θ, θ* and the optimizer. `reads`: is the text encoder
        trained? Otherwise it is let go once the prompts are encoded."""
        a, parts = self.a, (model.unet, model.text_encoder)
        theta = {name: p for part in parts for name, p in part.named_parameters() if TRAIN_PARAMS[a["train_params"]](name)}
        self.reads = any(name.startswith("text_model.") for name in theta)
        self.base = weights.fingerprint(theta)
        for name, p in model.unet.named_parameters():
            # CUDA's autocast (not the CPU's) computes norms in fp32, and would cast their weights in each evaluation
            wide = name in theta or self.device.type == "cuda" and "norm" in name
            p.data = p.data.to(self.device, torch.float32 if wide else self.dtype)
        if self.device.type == "cpu":  # 4 to 6 % faster; CUDA's GroupNorm would only copy it back
            model.unet.to(memory_format=torch.channels_last)
        model.text_encoder.to(self.device)
        if a["preview_every"]:  # nothing else decodes
            model.vae.to(self.device)
        names = [[name for name, _ in part.named_parameters() if name in theta] for part in parts]
        self.student = model
        self.teacher, self.original = (model._replace(unet=ema.twin(model.unet, names[0]),
                                                      text_encoder=ema.twin(model.text_encoder, names[1])) for _ in range(2))
        if a["gradient_checkpointing"]:  # of each block only the input is kept for the backward pass, what is within is made again
            for block in model.unet.modules():
                if isinstance(block, (ResnetBlock, Transformer)):
                    block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        averages = dict(self.teacher.unet.named_parameters()) | dict(self.teacher.text_encoder.named_parameters())
        self.theta = {name: p.requires_grad_() for name, p in theta.items()}
        self.theta_ema = {name: averages[name] for name in theta}
        decay = 0.0 if self.reads else a["weight_decay"]  # it would shrink the rows of words that are not trained
        self.optimizer = torch.optim.AdamW(self.theta.values(), a["lr"], betas=(0.9, 0.999), weight_decay=decay)

    def encode_prompts(self):
        """c_0, the concepts one by one and joined, the previews; for Ablating the anchor's prompts, and how they reach the loss."""
        a, joined = self.a, ", ".join(self.a["concept"])
        K, pictures = len(a["concept"]), a["latents"] == "anchor"
        self.pairs = anchors.prompt_pairs(a["concept"], a["anchor"], a["anchor_prompts"]) if pictures else []
        shown, asked = [pair[1] for pair in self.pairs] or [", ".join(a["anchor"])], [pair[2] for pair in self.pairs]
        texts = encode(self.student, ["", joined, *a["concept"], *a["preview"], *shown, *asked])
        lengths = [1, 1, K, len(a["preview"]), len(shown), len(asked)]
        self.c_0, self.joined, self.concepts, self.previews, self.anchor, c_s = texts.split(lengths)
        if not self.reads:
            models = self.student, self.teacher, self.original
            self.student, self.teacher, self.original = (model._replace(text_encoder=None) for model in models)
            return lambda which: c_s[which]
        rows = torch.zeros(len(self.theta[EMBEDDING]), 1, device=self.device)
        rows[[i for text in a["concept"] for i in self.student.tokenizer(text, add_special_tokens=False).input_ids]] = 1
        self.theta[EMBEDDING].register_hook(lambda grad: grad * rows)
        tokens = tokenize(self.student.tokenizer, asked)[0].to(self.device)
        return lambda which: self.student.text_encoder(tokens[which])

    def make_latents(self):
        """`latents`, the function that makes z_t; Ablating draws its pictures here, which takes a while."""
        a, pictures = self.a, self.a["latents"] == "anchor"
        painter = Painter(getattr(self, "original" if pictures else a["latents"]).unet, self.device, self.dtype)
        if not pictures:
            draw = half_drawn(painter, self.scheduler, self.concepts, self.joined, self.c_0, (a["batch_size"], *self.shape), self.generator,
                              a["roles"], a["guidance_scale"], c_a=self.anchor)

            def latents(i):
                painter.follow()
                return draw(i)

            self.latents = latents
            return
        z_0 = anchors.make(self.out / "anchors.safetensors", self.original, painter, self.c_0, self.anchor, self.scheduler,
                           a["anchor_images"], a["guidance_scale"], a["seed"])
        if a["detach_start"]:
            anchors.detach_start(self.student.unet)
        self.latents = anchors.noised(z_0, [pair[0] for pair in self.pairs], self.asked, self.anchor, self.scheduler, a["batch_size"],
                                      self.generator)

    def iterations(self, start=0, loss=None):
        """Algorithm 1 with this run's arguments, from iteration `start` on; `loss`: instead of the method's."""
        a, loss = self.a, loss or METHODS[self.a["method"]].loss
        named = {key: a[key] for key in ("iters", "lr", "lr_schedule", "warmup", "preserve", "prior", "max_grad_norm")}
        for it in sdd(self.student.unet, self.original.unet, self.optimizer, [*self.theta_ema.values()], self.latents, self.c_0,
                      loss=partial(loss, erase_scale=a["erase_scale"], quantile=a["quantile"]), start=start, ema_decay=a["ema"],
                      loss_scale=1024.0 if self.dtype == torch.float16 else 1.0, **named):
            self.done, self.settled = it.i + 1, self.generator.get_state()
            yield it

    def checkpoint_groups(self, generator_state):
        return {"student": self.theta, "teacher": self.theta_ema, "generator": {"state": generator_state}}

    def save(self):
        """The run as it was after its last whole iteration."""
        groups = self.checkpoint_groups(self.settled)
        weights.save_checkpoint(self.out / "checkpoint.safetensors", groups, self.optimizer, {"iterations": str(self.done)})

    def restore(self):
        """The number of iterations that are done, after putting everything back as it was then."""
        file, log = self.out / "checkpoint.safetensors", self.out / "log.csv"
        done, state = 0, self.generator.get_state()
        if file.exists():
            done = int(weights.load_checkpoint(file, self.checkpoint_groups(state), self.optimizer)["iterations"])
            self.generator.set_state(state)
        self.done, self.settled = done, state
        rows = log.read_text(encoding="utf-8").splitlines(keepends=True)[:done + 1] if log.exists() else []
        with weights.whole(log) as beside:  # rows past the checkpoint are made again
            beside.write_text("".join(rows), encoding="utf-8")
        return done

    def export(self, file, which):
        """A patch: the trained tensors of "student" or "teacher", and what they are."""
        metadata = {"model": self.a["model"], "concepts": ", ".join(self.a["concept"]), "method": self.a["method"],
                    "base_fingerprint": self.base, "args": json.dumps(self.a), "versions": json.dumps(VERSIONS)}
        tensors = {"teacher": self.theta_ema, "student": self.theta}[which]
        weights.save(self.out / file, tensors, metadata | {"sha256": digest(tensors)})
