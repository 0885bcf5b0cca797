"""The noise schedule and the samplers: DDIM, PNDM (SD 1.4's default) and Euler (SDXL's default).

diffusers calls a sampler a *scheduler*. So do this file's name, the variables and --scheduler.

The schedule defines z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) n, with noise n ~ N(0, I) and t in 0 .. 999.
ᾱ_t = (1 − β_0) (1 − β_1) .. (1 − β_t) is the part of the signal's variance that is left at t.

A sampler visits `timesteps`, from noisy to clean. `step(z, e, i)` takes latents z at timesteps[i],
with the estimate e of their noise, and returns latents at timesteps[i + 1].

The defaults are SD 1.4's (`scheduler/scheduler_config.json`). ᾱ is kept in float32, as in
diffusers, so that both compute the same trajectory.
"""

import torch


class DDIM:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 with σ = 0.

    steps: the number of denoising steps, T in SDD. `timesteps` has steps + 1 entries. The last one
    is 0, the end. ValueError if the schedule is too short for that many steps.
    As in diffusers, few steps start far below 999 (50 steps: 981; 6 steps: 831; 1 step: 1), though
    z_T is pure noise. So images of one or two steps are poor.
    """

    def __init__(
        self, steps, num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, steps_offset=1
    ):
        # "Leading" spacing: multiples of the stride, plus an offset. For 50 steps: 981, 961, .. 1.
        self.stride = num_train_timesteps // steps if steps >= 1 else 0
        first = (steps - 1) * self.stride + steps_offset
        if self.stride == 0 or first >= num_train_timesteps:
            raise ValueError(
                f"{steps} sampling steps do not fit a schedule of {num_train_timesteps} timesteps"
            )
        self.timesteps = [i * self.stride + steps_offset for i in reversed(range(steps))] + [0]
        sqrt_betas = torch.linspace(
            beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32
        )
        self.alphas_cumprod = torch.cumprod(1 - sqrt_betas**2, dim=0)  # ᾱ (num_train_timesteps,)

    @property
    def evaluations(self):
        """How many estimates lead from z_T to z_0. At the last timestep, the end, none is made."""
        return len(self.timesteps) - 1

    def alpha(self, t):
        """ᾱ_t. Below timestep 0 it stays ᾱ_0 (in the config: set_alpha_to_one false)."""
        return self.alphas_cumprod[max(t, 0)]

    def add_noise(self, z_0, noise, t):
        """z_t for latents z_0 and noise, both (B, 4, h, w), at timesteps t (B,)."""
        alpha = self.alphas_cumprod.to(z_0.device)[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * z_0 + (1 - alpha).sqrt() * noise

    def step(self, z, e, i):
        """Latents z (B, 4, h, w) at timesteps[i] and their noise e -> latents at timesteps[i + 1].

        The next timestep is t − stride. In the last step this is at most 0, and ᾱ is ᾱ_0; so
        `timesteps` ends with 0.
        """
        t = self.timesteps[i]
        alpha = self.alpha(t)
        alpha_next = self.alpha(t - self.stride)
        z_0 = (z - (1 - alpha).sqrt() * e) / alpha.sqrt()
        return alpha_next.sqrt() * z_0 + (1 - alpha_next).sqrt() * e


class PNDM(DDIM):
    """Liu et al. 2022 (arXiv 2202.09778) without its Runge-Kutta start ("PLMS").

    N > 1 steps need N + 1 estimates. The first estimate gives a provisional z at the second
    timestep. The second estimate, made there, repeats the first step with the mean of the two.
    Later steps combine up to four estimates (Adams-Bashforth).

    The object remembers estimates, so it handles one batch at a time. i = 0 starts a new one.
    """

    def __init__(self, steps, **schedule):
        super().__init__(steps, **schedule)
        if steps > 1:
            self.timesteps.insert(1, self.timesteps[1])  # 981, 961, 961, 941, ..

    def step(self, z, e, i):
        t = self.timesteps[i]
        t_next = t - self.stride
        if i == 0:
            self.z_first = z
            self.estimates = []
        if i == 1:
            # e was estimated at the provisional z: repeat the first step with the mean of both.
            z, e = self.z_first, (e + self.estimates[0]) / 2
            t, t_next = t + self.stride, t
        else:
            self.estimates = [*self.estimates[-3:], e]
            e = self.mix()
        alpha = self.alpha(t)
        alpha_next = self.alpha(t_next)
        scale = alpha * (1 - alpha_next).sqrt() + (alpha * (1 - alpha) * alpha_next).sqrt()
        return (alpha_next / alpha).sqrt() * z - (alpha_next - alpha) * e / scale  # eq. 11

    def mix(self):
        """Adams-Bashforth of order 1 to 4. diffusers uses the same operations, in this order."""
        match self.estimates[::-1]:  # the newest first
            case [e]:
                return e
            case [e, e1]:
                return (3 * e - e1) / 2
            case [e, e1, e2]:
                return (23 * e - 16 * e1 + 5 * e2) / 12
            case [e, e1, e2, e3]:
                return (1 / 24) * (55 * e - 59 * e1 + 37 * e2 - 9 * e3)


class Euler(DDIM):
    """DDIM that ends at ᾱ = 1, without noise (sdxl.py, point 7)."""

    def alpha(self, t):
        at_the_end = t < self.timesteps[-2]
        return torch.ones(()) if at_the_end else self.alphas_cumprod[t]


SAMPLERS = {"ddim": DDIM, "pndm": PNDM, "euler": Euler}
