"""A loss of the user's own, `--loss FILE:FUNCTION`: loading, checking and calling it.

Every mistake in it becomes one sentence that names the function.
"""

import hashlib
import importlib.util
import inspect
import traceback
from functools import partial
from pathlib import Path

import torch

from support.cli import memory_is_full
from support.errors import UserError


def loss_file(text):
    return Path(text.rpartition(":")[0] or text)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_loss(text, file=None):
    """The function that --loss FILE:FUNCTION names; `file`: a copy of FILE to load instead."""
    name = text.rpartition(":")[2]
    file = Path(file or loss_file(text))
    if not file.is_file():
        raise UserError(f"--loss {text}: there is no file {file}. Write --loss FILE.py:FUNCTION.")
    try:
        spec = importlib.util.spec_from_file_location("own_loss", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # the user's own file can fail in any way
        raise UserError(
            f"--loss {text}: {file} cannot be imported ({type(e).__name__}: {e}).",
            details=traceback.format_exc(),
        ) from e
    functions = [key for key, x in vars(module).items() if inspect.isfunction(x)]
    if ":" not in text or name not in functions:
        names = " or ".join(f"--loss {file}:{key}" for key in functions) or "a file with a function"
        raise UserError(f"--loss {text} does not name a function of the file: use {names}.")
    return vars(module)[name]


def own_loss(text, copy):
    """The loss of --loss, from the run's own copy if there is one. Its errors are sentences."""
    return partial(call_loss, load_loss(text, copy if copy.exists() else None), text)


def check_loss(function, text, noise):
    """Calls a user's loss once on small random tensors, before the run creates its folder.

    noise: does this method know the noise n in z_t? UserError names the mistake.
    """
    name = text.rpartition(":")[2]
    theta = torch.ones((), requires_grad=True)

    def e(z, t, c):
        return theta * z + c.mean()

    generator = torch.Generator().manual_seed(0)
    z_t, n = torch.randn(2, 2, 4, 8, 8, generator=generator)
    c_s, c_0, c_a = torch.randn(3, 1, 77, 8, generator=generator)
    t = 501
    if noise:  # each latent has its own timestep and prompt
        t = torch.tensor([501, 7])
        c_s, c_a = c_s.repeat(2, 1, 1), c_a.repeat(2, 1, 1)
    values = dict(e=e, e_original=lambda z, t, c: e(z, t, c).detach(), z_t=z_t, t=t)
    values |= dict(c_s=c_s, c_0=c_0, c_a=c_a, erase_scale=1.0, quantile=0.0)
    if noise:
        values["n"] = n
    try:
        inspect.signature(function).bind(**values)
    except TypeError as error:
        raise UserError(
            f"--loss {text}: {name} cannot be called ({error}). Its arguments may be "
            f"{', '.join(values)}, and must end with **_, which takes what it does not need."
        ) from None
    with torch.enable_grad():
        loss = call_loss(function, text, **values)
    if not isinstance(loss, torch.Tensor) or loss.dim() > 0:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
        raise UserError(
            f"--loss {text}: {name} returns a {type(loss).__name__}{shape}; it must return a "
            "scalar tensor, for example with .mean()."
        )
    if not loss.requires_grad:
        raise UserError(
            f"--loss {text}: the result of {name} has no gradient, so nothing can be learned. "
            "Compute at least e(z_t, t, c_s) outside torch.no_grad(), without .detach()."
        )


def call_loss(function, text, **values):
    """function(**values). An exception of the user's own code becomes a sentence."""
    try:
        return function(**values)
    except Exception as e:
        if isinstance(e, UserError) or memory_is_full(e):
            raise
        raise UserError(
            f"--loss {text} failed with {type(e).__name__}: {e}. Correct it and start a new "
            "run in another folder.",
            details=traceback.format_exc(),
        ) from e
