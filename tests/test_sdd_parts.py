"""The parts of Algorithm 1: copy and average, random numbers, rates, step, and how it is called.

test_sdd.py compares the whole loop with a plain one.
"""

import inspect
import runpy
import sys
import traceback
from pathlib import Path

import pytest
import torch
from common import SCHEDULES, randn, relative
from torch import nn

import ema
import losses
import presets
import sdd
from scheduler import DDIM
from unet import UNet


@pytest.fixture(autouse=True)
def no_gradients():
    """Replaces the fixture of conftest: these tests train."""


# ---------------------------------------------------------------------- the copy and the average
# SD 1.4's UNet has 16 transformers: 5 of width 320, 5 of 640, 6 of 1280. Each attn2 has to_q, to_k,
# to_v, to_out.0 and the bias of to_out.0.
KV = 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
TIME_EMBEDDING, CONV_OUT = 1280 * (320 + 1 + 1280 + 1), 4 * (9 * 320 + 1)


@pytest.mark.parametrize(
    "key, tensors, parameters",
    [
        ("xattn", 80, 43_962_560),
        ("kv", 32, KV),
        ("full", 686, 859_520_964),
        ("noxattn", 600, 859_520_964 - 43_962_560 - TIME_EMBEDDING - CONV_OUT),
    ],
)
def test_copy_has_only_the_trained_tensors_anew(key, tensors, parameters):
    with torch.device("meta"):
        unet = UNet()
    names = {name for name, _ in unet.named_parameters() if presets.TRAIN_PARAMS[key](name)}
    sizes = [unet.get_parameter(name).numel() for name in names]
    assert (len(sizes), sum(sizes)) == (tensors, parameters)
    mine, theirs = (dict(u.named_parameters()) for u in (unet, ema.copy_trained(unet, names)))
    assert list(mine) == list(theirs)
    assert {name for name in mine if mine[name] is not theirs[name]} == names
    assert {name for name in mine if not theirs[name].requires_grad} == names
    assert all(p.requires_grad for p in mine.values())


def test_copy_has_equal_numbers_and_shares_buffers():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    mine, theirs = net.state_dict(), ema.copy_trained(net, ["0.weight"]).state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert [name for name in mine if mine[name].data_ptr() != theirs[name].data_ptr()] == [
        "0.weight"
    ]


@pytest.mark.parametrize("m", [0.0, 0.25, 0.999, 1.0])
def test_ema_arithmetic(m):
    theta_ema, theta = ([randn(3, 4, seed=seed), randn(7, seed=seed)] for seed in (5, 6))
    old_ema, old = [x.clone() for x in theta_ema], [x.clone() for x in theta]
    ema.update(theta_ema, theta, m)  # in place
    for new, a, p in zip(theta_ema, old_ema, old):
        assert relative(new, m * a + (1 - m) * p) <= 1e-6  # two roundings
        assert m != 1 or torch.equal(new, a)
        assert m != 0 or torch.equal(new, p)
    assert all(torch.equal(p, q) for p, q in zip(theta, old))


def test_ema_of_other_tensors_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        ema.update([torch.ones(2)] * 2, [torch.ones(2)], 0.5)


# ---------------------------------------------------------------------- random numbers, the rate
class Line(nn.Module):
    """ε = w z: so cheap that a run of 500 iterations takes a second."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, z, t, c):
        return self.w * z


def run_line(line, generator=None, shape=(1, 4, 2, 2), K=3, iters=1, **options):
    """sdd.sdd on a Line."""
    prompts = sdd.Prompts(*torch.zeros(K + 2, 77, 1).split([1, K, 1]))
    optimizer = torch.optim.AdamW(line.parameters())
    return sdd.sdd(
        *(line, line, line, optimizer, [torch.ones(())], DDIM(50), prompts, shape, generator),
        rates=sdd.learning_rates(iters),
        **options,
    )


@pytest.mark.parametrize("roles", ["paper", "official"])
def test_draw(roles, monkeypatch):
    """z_T, then k, then j (paper) or the timestep (official), all from one generator."""
    z_Ts, times, timesteps = [], [], DDIM(50).timesteps
    monkeypatch.setattr(sdd, "sample", lambda estimate, scheduler, z, k: z_Ts.append(z) or z)

    def loss(e, z_t, t, c_s, **_):
        times.append(t)
        return e(z_t, t, c_s).mean()

    generator = torch.Generator().manual_seed(11)
    run = list(run_line(Line(), generator, iters=500, roles=roles, loss=loss))
    g = torch.Generator().manual_seed(11)
    for it, z, t in zip(run, z_Ts, times, strict=True):
        assert torch.equal(z, torch.randn(1, 4, 2, 2, generator=g))
        if roles == "paper":
            assert it.k == torch.randint(1, 51, (), generator=g)
            assert it.j == torch.randint(3, (), generator=g)
            assert t == timesteps[it.k]
        else:
            low, high = 980 - 20 * it.k, 1000 - 20 * it.k
            assert it.k == torch.randint(0, 50, (), generator=g)
            assert t == torch.randint(low, high, (), generator=g)
            assert low <= timesteps[it.k] < high
            assert it.j == it.i % 3
    assert len(run) == 500
    assert {it.k for it in run} == set(range(1, 51) if roles == "paper" else range(50))
    assert {it.j for it in run} == {0, 1, 2}


def test_officials_timestep_is_one_of_the_schedule():
    """Also with steps_offset 0, where z_t can be at 0 and the script would draw from -1 on."""
    scheduler, generator = DDIM(5, steps_offset=0), torch.Generator().manual_seed(0)
    drawn = {sdd.random_timestep("official", scheduler, 1, 0, generator)[1] for _ in range(3000)}
    assert min(drawn) == 0
    assert max(drawn) == 998


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "warmup, iters", [(0, 10), (3, 10), (500, 1500), (10, 10), (12, 10), (0, 1)]
)
def test_learning_rates(warmup, iters, schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    theirs, expected = SCHEDULES[schedule](optimizer, warmup, iters), []
    for i in range(iters):
        expected.append((i, pytest.approx(theirs.get_last_lr()[0], abs=1e-15)))
        optimizer.step()
        theirs.step()
    assert list(sdd.learning_rates(iters, 2.0, warmup, schedule)) == expected
    assert list(sdd.learning_rates(iters, 2.0, warmup, schedule, start=7)) == expected[7:]


# ---------------------------------------------------------------------- what a user calls
def test_a_misspelled_choice_is_not_another_method():
    with pytest.raises(ValueError, match="offical.*official"):
        sdd.choose_prompts("offical", None, None)
    with pytest.raises(ValueError, match="cosin'"):
        sdd.lr_factor(800, 500, 1500, "cosin")


@pytest.mark.parametrize("shape", [(4, 2, 2), (1, 3, 2, 2), (0, 4, 2, 2)])
def test_latents_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"z_t cannot have the shape \("):
        next(run_line(Line(), shape=shape))


def test_tensors_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match="call requires_grad_"):
        next(run_line(Line().requires_grad_(False)))


@pytest.mark.parametrize(
    "loss, gradient, said",
    [
        (float("nan"), 1.0, "iteration 3 .loss nan"),
        (float("inf"), 1.0, "loss inf"),
        (1.1e5, 1.0, "loss 1.1e.05"),
        (1.0, float("inf"), "gradient norm inf"),
        (1.0, float("nan"), "gradient norm nan"),
    ],
)
def test_divergence_is_an_error_before_the_step(loss, gradient, said):
    p = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([p])
    with pytest.raises(FloatingPointError, match=said):
        sdd.adamw_step(optimizer, loss + gradient * (p - 1).sum(), 0.1, 3)
    assert torch.equal(p, torch.ones(3))


def test_with_float16_an_overflow_is_normal_until_the_scale_is_below_1():
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    sdd.stop_if_diverged(3, 1.0, float("inf"), scaler)
    scaler.update(new_scale=0.5)
    with pytest.raises(FloatingPointError):
        sdd.stop_if_diverged(3, 1.0, float("inf"), scaler)


def test_the_defaults_are_the_papers_numbers():
    paper = presets.PRESETS["paper"]
    # fmt: off
    names = {
        sdd.sdd: dict(s_g="guidance_scale", m="ema", roles="roles"),
        sdd.learning_rates: dict(iters="iters", lr="lr", warmup="warmup", schedule="lr_schedule"),
        sdd.adamw_step: dict(max_grad_norm="max_grad_norm"),
    }
    # fmt: on
    for function, keys in names.items():
        parameters = inspect.signature(function).parameters
        for argument, key in keys.items():
            assert parameters[argument].default == paper[key], argument
    assert inspect.signature(sdd.sdd).parameters["loss"].default is losses.sdd_loss


def test_a_beginner_can_call_sdd_and_follow_train_py(tmp_path, monkeypatch):
    """sdd() has few arguments, and few frames of ours stand between train.py and backward()."""
    assert len(inspect.signature(sdd.sdd).parameters) <= 18
    root, stacks, right = Path(sdd.__file__).parent, [], torch.Tensor.backward

    def backward(loss, *args, **options):
        files = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
        files = [(file.parent, name) for file, name in files if file != Path(__file__)]
        # not root in file.parents: an environment may be in the project's folder
        stacks.append([name for folder, name in files if root in (folder, folder.parent)])
        return right(loss, *args, **options)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    words = "--model toy --concept star --device cpu --iters 1 --batch-size 1 --preview-every 0"
    monkeypatch.setattr(sys, "argv", ["train.py", *words.split(), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(root / "train.py"), run_name="__main__")
    assert end.value.code == 0
    assert stacks == [["<module>", "run_command", "main", "sdd", "adamw_step"]]
