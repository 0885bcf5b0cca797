"""The teacher: a twin of the student whose trained tensors are a moving average of the student's."""
import copy

import torch


def twin(module, trained):
    """A copy of `module` with its own copies of the parameters named in `trained`, and every other tensor shared.

    The copies require no gradient. For SD 1.4 and cross-attention that is 176 MB instead of 3.4 GB.
    """
    trained = set(trained)
    shared = {id(p): p for name, p in module.named_parameters() if name not in trained}
    shared |= {id(b): b for b in module.buffers()}
    other = copy.deepcopy(module, memo=shared)
    for name in trained:
        other.get_parameter(name).requires_grad_(False)
    return other


@torch.no_grad()
def update(teacher, student, m):
    """θ* ← m θ* + (1 − m) θ, in place, over two lists of tensors. Keep both in float32: at m = 0.999 an average in
    bfloat16 would not move."""
    torch._foreach_lerp_(teacher, student, 1 - m)
