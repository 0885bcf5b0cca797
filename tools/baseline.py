"""The authors' loop, rebuilt on diffusers' classes: what bench.py measures ours against, and no part of the product."""

import copy

import torch
import torch.nn.functional as F

import weights

PROMPT = "star"  # a word that the embedded model's tokenizer knows


def their_parts(size, device):
    """unet, vae, text_encoder, tokenizer by diffusers and transformers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(weights.TOY / "tokenizer")
    if size == "toy":
        return (
            UNet2DConditionModel.from_pretrained(weights.TOY, subfolder="unet").to(device),
            AutoencoderKL.from_pretrained(weights.TOY, subfolder="vae").to(device),
            CLIPTextModel.from_pretrained(weights.TOY / "text_encoder").to(device),
            tokenizer,
        )
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            sample_size=512,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=4,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        return UNet2DConditionModel(cross_attention_dim=768, sample_size=64), vae, text, tokenizer


class Authors:
    """The authors' script's loop: two whole UNets in fp32, a gradient for every tensor, prompts encoded in each iteration, an average over
    everything. As a user would have it who adds `dtype` autocast to it."""

    def __init__(self, size, device, batch_size, steps, dtype):
        from diffusers import DDIMScheduler

        self.unet, _, self.text_encoder, self.tokenizer = their_parts(size, device)
        self.ema = copy.deepcopy(self.unet).requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        self.unet.requires_grad_(True)
        self.trained = [p for name, p in self.unet.named_parameters() if "attn2" in name]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=1e-4)
        self.scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
        )
        self.scheduler.set_timesteps(steps, device=device)
        side = self.unet.config.sample_size if size == "toy" else 64
        self.device, self.shape, self.dtype = device, (batch_size, 4, side, side), dtype
        self.parts = [self.unet, self.ema, self.optimizer]

    def iteration(self, k, z=None):
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            with torch.no_grad():
                ids = self.tokenizer(
                    ["", PROMPT, PROMPT], padding="max_length", max_length=77, return_tensors="pt"
                ).input_ids
                c_0, c_p, c_s = (
                    c.expand(self.shape[0], -1, -1)
                    for c in self.text_encoder(ids.to(self.device))[0].split(1)
                )
                z = torch.randn(self.shape, device=self.device) if z is None else z
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
