"""What an image of a toy world shows: a small classifier with one head per attribute.

It is to the toy models what NudeNet is to Stable Diffusion: trained on drawings alone, and used to
count how often a concept appears in generated images.

    python -m toy.probe shapes      or emoji

trains it again, overwrites toy/probe.safetensors (or toy/emoji_probe.safetensors) and prints its
accuracy on held-out drawings.
"""

import support.openmp

import json
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import weights
from support.cli import Parser, one_of, run_command
from toy import worlds


class Probe(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> {attribute: logits (B, number of values)}."""

    def __init__(self, attributes):
        super().__init__()
        self.attributes = attributes
        widths = (3, 24, 48, 96, 128)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU(), nn.MaxPool2d(2)
            )
            for a, b in zip(widths, widths[1:])
        )
        self.mix = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.GroupNorm(8, 128), nn.SiLU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(256, len(values)) for name, values in attributes.items()}
        )

    def maps(self, x):
        """The stages' feature maps (32, 16, 8, 4 pixels a side), for a perceptual distance."""
        maps = []
        for stage in self.stages:
            maps.append(x := stage(x))
        return maps

    def features(self, x):
        """(B, 256): the vector before the heads."""
        h = self.mix(self.maps(x)[-1])
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], dim=1)

    def forward(self, x):
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def name(self, x):
        """Images -> {attribute: list of B words}."""
        words = {}
        for name, logits in self(x).items():
            words[name] = [self.attributes[name][i] for i in logits.argmax(1)]
        return words


def to_tensor(images):
    """uint8 (B, 64, 64, 3) -> float (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def load(file):
    """The trained probe, in eval mode."""
    tensors, metadata = weights.read(file)
    probe = Probe(json.loads(metadata["attributes"]))
    probe.load_state_dict({k: v.float() for k, v in tensors.items()})
    return probe.eval().requires_grad_(False)


def labels(scenes, attributes):
    """Scenes -> {attribute: class indices (B,)}."""
    return {
        name: torch.tensor([values.index(getattr(s, name)) for s in scenes])
        for name, values in attributes.items()
    }


def blemish(x, generator):
    """Blur and noise, so that the probe also reads the slightly soft images of a decoder."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    amount = torch.rand(len(x), 1, 1, 1, generator=generator)
    strength = 0.15 * torch.rand(len(x), 1, 1, 1, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    return x + amount * (soft - x) + strength * noise


def main(world, batch_size=64, lr=2e-3):
    steps = world.PROBE_STEPS
    torch.manual_seed(0)
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(2)
    probe = Probe(world.ATTRIBUTES)
    optimizer = torch.optim.AdamW(probe.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        scenes, images, _ = worlds.batch(world, rng, batch_size)
        logits = probe(blemish(to_tensor(images), generator))
        truth = labels(scenes, world.ATTRIBUTES)
        loss = sum(F.cross_entropy(logits[name], truth[name]) for name in truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    scenes, images, _ = worlds.batch(world, np.random.default_rng(1_000_000), 4000)
    probe.eval()
    found = [probe.name(to_tensor(part)) for part in np.array_split(images, 20)]
    accuracy = {}
    for name in world.ATTRIBUTES:
        words = sum((part[name] for part in found), [])
        accuracy[name] = np.mean([word == getattr(s, name) for word, s in zip(words, scenes)])
    metadata = {
        "attributes": json.dumps(world.ATTRIBUTES),
        "held_out_accuracy": json.dumps(accuracy),
    }
    weights.save(world.PROBE, {k: v.half() for k, v in probe.state_dict().items()}, metadata)
    shares = "  ".join(f"{name} {100 * share:.2f} %" for name, share in accuracy.items())
    print("held out, 4,000 drawings:", shares)


if __name__ == "__main__":
    parser = Parser(prog="python -m toy.probe", description=__doc__)
    parser.add_argument("world", **one_of(worlds.WORLDS))
    sys.exit(run_command(lambda args: main(worlds.WORLDS[args.world]), parser.parse_args()))
