"""The noise schedule of Stable Diffusion 1.x and its two samplers: DDIM, and PNDM as SD 1.4's own default.

z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) n for t in 0..999. A sampler visits `levels`, from noisy to clean: `step(z, e, i)` takes z at
levels[i], with the noise estimate e made there, on to levels[i + 1]. SD 1.4's constants are the defaults
(`scheduler/scheduler_config.json`); ᾱ are kept in float32 as there, so that a trajectory agrees to rounding.
"""

import torch


class DDIM:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 with σ = 0. `steps` is T in SDD; levels[T] is the end, 0."""

    def __init__(
        self, steps, num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, steps_offset=1
    ):
        self.stride = num_train_timesteps // steps if steps >= 1 else 0  # "leading" spacing
        if not self.stride or (steps - 1) * self.stride + steps_offset >= num_train_timesteps:
            raise ValueError(
                f"{steps} sampling steps do not fit a schedule of {num_train_timesteps}: "
                f"ask for 1 to {num_train_timesteps - steps_offset}."
            )
        betas = (
            torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32)
            ** 2
        )
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)  # ᾱ (num_train_timesteps,)
        self.timesteps = [*(i * self.stride + steps_offset for i in reversed(range(steps))), 0]

    def _alpha(self, t):
        return self.alphas_cumprod[
            max(t, 0)
        ]  # set_alpha_to_one false: past the last level it is still ᾱ_0

    def add_noise(self, z_0, noise, t):
        """z_t for z_0 and noise (B, 4, H, W) at timesteps (B,)."""
        alpha = self.alphas_cumprod.to(z_0.device)[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * z_0 + (1 - alpha).sqrt() * noise

    def step(self, z, e, i):
        """z (B, 4, H, W) at levels[i] and the estimate e of its noise -> z at levels[i + 1]."""
        t = self.timesteps[i]
        alpha, alpha_next = self._alpha(t), self._alpha(t - self.stride)
        z_0 = (z - (1 - alpha).sqrt() * e) / alpha.sqrt()
        return alpha_next.sqrt() * z_0 + (1 - alpha_next).sqrt() * e


class PNDM(DDIM):
    """Liu et al. 2022 (arXiv 2202.09778) without its Runge-Kutta start ("PLMS"): N steps, N + 1 evaluations.

    The second level is visited twice, first as a guess and then to correct the first step. The estimates of the last
    four levels are mixed (Adams-Bashforth), so a sampler serves one trajectory at a time; `step` with i = 0 starts anew.
    """

    def __init__(self, steps, **schedule):
        super().__init__(steps, **schedule)
        self.timesteps[1:1] = self.timesteps[1:2] if steps > 1 else []  # 981, 961, 961, 941, …

    def step(self, z, e, i):
        t, t_next = self.timesteps[i], self.timesteps[i] - self.stride
        if i == 0:
            self.start, self.past = z, []
        if (
            i == 1
        ):  # the corrector: from the start again, with the mean of the estimates at both ends
            z, e, t, t_next = self.start, (e + self.past[0]) / 2, t + self.stride, t
        else:
            self.past = [*self.past[-3:], e]
            e = self._mix()
        alpha, alpha_next = self._alpha(t), self._alpha(t_next)
        scale = alpha * (1 - alpha_next).sqrt() + (alpha * (1 - alpha) * alpha_next).sqrt()
        return (alpha_next / alpha).sqrt() * z - (alpha_next - alpha) * e / scale  # eq. 11

    def _mix(self):
        """Adams-Bashforth of order 1 to 4; written as diffusers writes it, so that a trajectory agrees bit for bit."""
        match self.past[::-1]:
            case [e]:
                return e
            case [e, e1]:
                return (3 * e - e1) / 2
            case [e, e1, e2]:
                return (23 * e - 16 * e1 + 5 * e2) / 12
            case [e, e1, e2, e3]:
                return (1 / 24) * (55 * e - 59 * e1 + 37 * e2 - 9 * e3)


SAMPLERS = {"ddim": DDIM, "pndm": PNDM}
