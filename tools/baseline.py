"""The authors' training loop on diffusers' classes. Only bench.py uses it, to compare with ours."""

import copy

import torch
import torch.nn.functional as F

import weights

PROMPT = "star"  # a word that the toy model's tokenizer knows
SD14_SCHEDULER = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    clip_sample=False,
    set_alpha_to_one=False,
)


def their_parts(size, device):
    """{unet, vae, text_encoder, tokenizer} by diffusers and transformers.

    size: "toy" for the toy model; "sd14" for random weights with SD 1.4's sizes.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(weights.TOY / "tokenizer")
    if size == "toy":
        return dict(
            unet=UNet2DConditionModel.from_pretrained(weights.TOY, subfolder="unet").to(device),
            vae=AutoencoderKL.from_pretrained(weights.TOY, subfolder="vae").to(device),
            text_encoder=CLIPTextModel.from_pretrained(weights.TOY / "text_encoder").to(device),
            tokenizer=tokenizer,
        )
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    )
    with torch.device(device):
        return dict(
            unet=UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
            vae=AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                sample_size=512,
                block_out_channels=[128, 256, 512, 512],
                layers_per_block=2,
                latent_channels=4,
            ),
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
        )


class Authors:
    """The loop of the authors' script, with autocast in `dtype`, which a user would add.

    It has two whole UNets in float32, a gradient for every tensor and an average over every tensor,
    and it encodes the prompts in each iteration.
    """

    def __init__(self, size, device, batch_size, steps, dtype):
        from diffusers import DDIMScheduler

        parts = their_parts(size, device)
        self.unet, self.text_encoder = parts["unet"], parts["text_encoder"]
        self.tokenizer = parts["tokenizer"]
        self.ema = copy.deepcopy(self.unet).requires_grad_(False)
        self.text_encoder.requires_grad_(False)
        self.unet.requires_grad_(True)
        self.trained = [p for name, p in self.unet.named_parameters() if "attn2" in name]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=1e-4)
        self.scheduler = DDIMScheduler(**SD14_SCHEDULER)
        self.scheduler.set_timesteps(steps, device=device)
        side = self.unet.config.sample_size
        self.device, self.dtype = device, dtype
        self.shape = (batch_size, 4, side, side)

    def encode(self, prompts):
        """Embeddings, each (batch size, 77, D)."""
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
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
