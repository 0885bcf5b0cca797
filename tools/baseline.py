"""The authors' training loop on diffusers' classes. Only bench.py uses it, to compare with ours."""

import copy

import torch
import torch.nn.functional as F
from transformers import CLIPTextConfig, CLIPTextModel

import weights
from tools.convert import sd14_configs

PROMPT = "star"  # a word that the toy model's tokenizer knows


def their_pipeline(size, device):
    """A StableDiffusionPipeline with DDIM.

    size: "toy" for the toy model; "sd14" for random weights with SD 1.4's sizes, and the toy
    model's tokenizer.
    """
    import diffusers

    parts = {}
    if size == "sd14":
        configs = sd14_configs()
        with torch.device(device):
            parts = dict(
                unet=diffusers.UNet2DConditionModel.from_config(configs["unet"]),
                vae=diffusers.AutoencoderKL.from_config(configs["vae"]),
                text_encoder=CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
            )
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(weights.TOY, **parts).to(device)
    config = pipeline.scheduler.config
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Authors:
    """The loop of the authors' script, with autocast in `dtype`, which a user would add.

    It has two whole UNets in float32, a gradient for every tensor and an average over every tensor,
    and it encodes the prompts in each iteration.
    """

    def __init__(self, size, device, batch_size, steps, dtype):
        pipeline = their_pipeline(size, device)
        self.unet, self.text_encoder = pipeline.unet, pipeline.text_encoder
        self.tokenizer, self.scheduler = pipeline.tokenizer, pipeline.scheduler
        self.ema = copy.deepcopy(self.unet).requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        self.trained = [p for name, p in self.unet.named_parameters() if "attn2" in name]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=1e-4)
        self.scheduler.set_timesteps(steps, device=device)
        side = self.unet.config.sample_size
        self.device, self.dtype = device, dtype
        self.shape = (batch_size, 4, side, side)

    def encode(self, prompts):
        """Embeddings, each (batch size, 77, D)."""
        ids = self.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        embeddings = self.text_encoder(ids.to(self.device))[0].split(1)
        return [c.expand(self.shape[0], -1, -1) for c in embeddings]

    def iteration(self, k, z=None):
        """One iteration with k denoising steps from the noise z; returns the loss."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                c_0, c_p, c_s = self.encode(["", PROMPT, PROMPT])
                if z is None:
                    z = torch.randn(self.shape, device=self.device)
                for t in self.scheduler.timesteps[:k]:
                    e_0, e_p = self.ema(torch.cat([z, z]), t, torch.cat([c_0, c_p])).sample.chunk(2)
                    z = self.scheduler.step(e_0 + 3.0 * (e_p - e_0), t, z).prev_sample
                t = self.scheduler.timesteps[min(k, len(self.scheduler.timesteps) - 1)]
                target = self.unet(z, t, c_0).sample
            loss = F.mse_loss(self.unet(z, t, c_s).sample.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.unet.zero_grad()
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), self.unet.parameters()):
                average.lerp_(p, 0.001)
        return loss.item()
