"""Is what a file holds still what was written into it?"""
import hashlib

import torch


def digest(tensors):
    """A hash of {name: tensor}, their names, types, shapes and bytes, for a file's metadata (SHA-256, 64 hexadecimal digits)."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def damage(tensors, metadata):
    """What is wrong with a file's tensors, in words that follow its name; None if nothing is. Files of before there was a digest pass."""
    numbers = {name: x.float() for name, x in tensors.items() if x.is_floating_point() and x.numel()}  # NaN and infinity show in the extremes
    bad = [name for name, x in numbers.items() if not torch.stack(x.aminmax()).isfinite().all()]
    if bad:
        return f"holds NaN or infinity in {len(bad)} tensors ({min(bad)})"
    return "holds other tensors than it was written with" if "sha256" in metadata and metadata["sha256"] != digest(tensors) else None
