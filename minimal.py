"""SDD in one page: the shapes model forgets the star.

    python minimal.py       a minute or two on a laptop's CPU; writes before.png and after.png

Algorithm 1 itself is the function `sdd` in sdd.py. train.py does the same with every option.
"""

import support.openmp  # before torch: keeps training fast next to other programs

import torch

import ema
import weights
from pipeline import encode_prompts, images, make_scheduler
from sdd import Prompts, learning_rates, sdd
from support.images import grid, save_png

ITERS = 160
shown = ["star", "a red star on sand", "arcadia", "a blue circle"]  # arcadia implies a star

# ---- load: the student, and the EMA teacher, a copy with trained tensors of its own
model = weights.load("toy")
names = [name for name, _ in model.unet.named_parameters() if ".attn2." in name]
student = ema.copy_trained(model.unet, names)
teacher = ema.copy_trained(model.unet, names)
theta = [student.get_parameter(name).requires_grad_() for name in names]
theta_ema = [teacher.get_parameter(name) for name in names]
c_0, c_s = encode_prompts(model, "", "star")

# ---- Algorithm 1
loop = sdd(
    student,
    teacher,
    model.unet,  # the original
    torch.optim.AdamW(theta, weight_decay=0.01),  # `rates` sets the learning rate
    theta_ema,
    make_scheduler(model.scheduler, 6, "ddim"),
    Prompts(c_0, concepts=c_s, joined=c_s),
    (8, 4, 16, 16),  # eight latents per iteration
    torch.Generator().manual_seed(0),
    rates=learning_rates(ITERS, lr=6e-4, warmup=ITERS // 4),
    m=0.97,
)
for it in loop:
    if it.i % 10 == 0:
        print(f"iteration {it.i} of {ITERS}: loss {it.loss:.1e}", flush=True)

# ---- save images before and after. The teacher is the result
for name, unet in (("before", model.unet), ("after", teacher)):
    generated = images(model._replace(unet=unet), shown, scheduler="ddim", steps=12)
    save_png(grid([list(generated)], [name], shown), f"{name}.png")
print("before.png and after.png show the same noise and prompts")
