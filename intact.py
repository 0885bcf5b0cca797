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
    """What is wrong with a file's tensors, in words that follow its name; None if nothing is. A file without a digest passes."""
    numbers = {name: x.float() for name, x in tensors.items() if x.is_floating_point() and x.numel()}
    bad = [name for name, x in numbers.items() if not torch.stack(x.aminmax()).isfinite().all()]  # both show in the extremes
    if bad:
        return f"holds NaN or infinity in {len(bad)} tensors ({min(bad)})"
    changed = "sha256" in metadata and metadata["sha256"] != digest(tensors)
    return "holds other tensors than it was written with" if changed else None
