"""UCE and MACE against independent solutions of their objectives, and what closed forms share."""

import math
import shlex
from argparse import Namespace

import pytest
import torch

import closed_form
import ema
import presets
import train
import weights
from closed_form import States
from support.errors import UserError

D = 12
TOY = "--model toy --concept star --device cpu --preview-every 0"
METHODS = sorted(presets.CLOSED)


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(seed=0):
    return {"a.to_k": randn(5, D, seed=seed), "b.to_v": randn(20, D, seed=seed + 1)}


def random_states(n=4, m=6):
    return States(
        randn(n, D, seed=10), randn(n, D, seed=11), randn(m, D, seed=12), randn(77, D, seed=13)
    )


def least_squares(rows):
    """X (k, D) for which X x ≈ y for each group of rows: [(weight, x (n, D), y (n, k))]."""
    left = torch.cat([math.sqrt(weight) * x for weight, x, _ in rows])
    right = torch.cat([math.sqrt(weight) * y for weight, _, y in rows])
    return torch.linalg.lstsq(left, right).solution.T


def settings(method, **given):
    """What closed_form reads of a run's settings."""
    defaults = dict(ridge=None, seed=0, rho=0.1, gamma=0.0, threshold=0.1, filter=True)
    return Namespace(method=method, **defaults | given)


def check(edited, expected):
    assert edited.dtype == expected.dtype
    assert (edited - expected).abs().max() < 1e-9 * max(1.0, expected.abs().max().item())


# ------------------------------------------------------------------------------------ closed forms
@pytest.mark.parametrize("ridge, erase, keep", [(0.5, 1.0, 1.0), (3.0, 2.0, 0.25), (1e-3, 1.0, 0)])
def test_uce_is_the_least_squares_solution(ridge, erase, keep):
    W_0, (c, a, p, empty) = random_weights(), random_states()
    edited = closed_form.uce(W_0, States(c, a, p, empty), ridge, erase, keep)
    for name, W in W_0.items():
        rows = [(erase, c, a @ W.T), (keep, p, p @ W.T), (ridge, torch.eye(D).to(W), W.T)]
        check(edited[name], least_squares(rows))
        assert not torch.allclose(edited[name], W)


def test_mace_is_the_least_squares_solution_with_and_without_a_prior():
    W_0, states = random_weights(), random_states(m=40)
    c, a, p, _ = states
    eye = torch.eye(D, dtype=torch.float64)
    edited = closed_form.mace(W_0, states, keep=0.5)
    alone = closed_form.mace(W_0, states._replace(keep=p[:0]))
    for name, W in W_0.items():
        ridge = 1e-6 * 0.5 * (p**2).sum(0).mean()
        rows = [(1, c, a @ W.T), (0.5, p, p @ W.T), (ridge, eye, W.T)]
        check(edited[name], least_squares(rows))
        check(alone[name], least_squares([(1, c, a @ W.T), (1000, eye, W.T)]))


def test_edits_do_not_change_their_input_and_keep_the_type():
    W_0 = {name: W.half() for name, W in random_weights().items()}
    before = {name: W.clone() for name, W in W_0.items()}
    for method in METHODS:
        edited = closed_form.edit(settings(method), 0, W_0, before, random_states())
        assert all(edited[name].dtype == torch.float16 for name in W_0)
        assert all(torch.equal(W_0[name], before[name]) for name in W_0)


def test_k_means_finds_separate_groups():
    groups = [
        torch.full((5, 2), float(x)) + 0.01 * randn(5, 2, seed=i).float()
        for i, x in enumerate((0, 10, 20))
    ]
    centres = closed_form.cluster_centres(torch.cat(groups), 3)
    assert sorted(centres[:, 0].round().tolist()) == [0, 10, 20]


def test_what_speed_keeps_and_varies():
    W, states = randn(5, D, seed=0), randn(3, D, seed=1)
    edit = torch.diag(torch.tensor([3.0, 1.0, 0.0])).double()  # changes the states by 3, 1 and 0
    assert closed_form.influenced(torch.eye(3).double(), edit).tolist() == [[1, 0, 0]]
    varied = closed_form.vary(states, W, 4, torch.Generator().manual_seed(0))
    change = varied - states.repeat(4, 1)
    assert varied.shape == (12, D)
    assert torch.linalg.matrix_rank(change) == 1
    gain = (change @ W.T).norm(dim=1) / change.norm(dim=1)
    assert torch.allclose(gain, torch.linalg.svdvals(W)[-1])  # of what W reads, the least
    assert len(change[:, 0].unique()) == 12


@pytest.mark.parametrize(
    "method, number, ridge",
    [("uce", 0, 0.5), ("rece", 0, 0.5), ("rece", 1, 0.1), ("speed", 0, 1.0), ("mace", 0, 1000.0)],
)
def test_each_round_has_the_ridge_that_help_names(method, number, ridge):
    W_0, W, states = random_weights(), random_weights(seed=5), random_states()
    if method == "mace":  # with prompts to keep it is nearly 0
        states = states._replace(keep=states.keep[:0])
    default, given, other = (
        closed_form.edit(settings(method, ridge=x), number, W, W_0, states)
        for x in (None, ridge, 2 * ridge)
    )
    for name in W:
        assert torch.equal(default[name], given[name])
        assert not torch.allclose(default[name], other[name])


# ------------------------------------------------------------------------------------ text states
def test_states_of_a_pair():
    model = weights.load("toy")
    pairs = [("a star on sand", "a circle on sand")]
    all_states = closed_form.encode(model, ["a star on sand", "a circle on sand"])
    last = closed_form.gather_states(model, "uce", pairs, ["red"], "last")
    assert torch.equal(last.concept[0], all_states[0, 4])  # start, a, star, on, sand
    assert last.keep.shape == (1, 64)
    every = closed_form.gather_states(model, "uce", pairs, [], "all")
    assert every.concept.shape == (77, 64) and every.keep.shape == (0, 64)
    shared = closed_form.gather_states(model, "mace", pairs, ["red"], None)
    assert len(shared.concept) == len(shared.anchor) == 76  # all but the concept's own token
    assert torch.equal(shared.concept, torch.cat([all_states[0, :2], all_states[0, 3:]]))
    assert torch.equal(shared.concept[:2], shared.anchor[:2])  # causal: nothing differs before it


def test_the_empty_prompts_last_state_is_the_start_token():
    model = weights.load("toy")
    states = closed_form.gather_states(model, "uce", [("star", "")], [], "last")
    assert torch.equal(states.anchor[0], states.empty[0])


# -------------------------------------------------------------------------------- rounds, train.py
def test_pairs_of_prompts():
    pairs = closed_form.template_pairs(["star", "moon"], ["circle"], ["{}", "a {} on sand"])
    assert pairs[:2] == [("star", "circle"), ("a star on sand", "a circle on sand")]
    assert pairs[2:] == [("moon", "circle"), ("a moon on sand", "a circle on sand")]
    each = closed_form.template_pairs(["star", "moon"], ["red", "blue"], ["{}"])
    assert each == [("star", "red"), ("moon", "blue")]
    assert closed_form.template_pairs(["star"], [], ["{}", "a {}"]) == [
        ("star", ""),
        ("a star", "a"),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_rounds_map_the_concept_to_the_anchor(method):
    original = weights.load("toy").unet
    trained = presets.TRAIN_PARAMS[presets.METHODS[method].train_params]
    names = [name for name, _ in original.named_parameters() if trained(name)]
    theta, theta_ema = (
        {name: copy.get_parameter(name) for name in names}
        for copy in (ema.copy_trained(original, names) for _ in range(2))
    )
    a = settings(method, iters=3, keep=[], states="all")
    a.concept, a.anchor, a.template = ["star"], ["circle"], ["{}", "a {}"]
    states = closed_form.states_of(weights.load("toy"), a)
    base = {name: original.get_parameter(name) for name in names}
    before = closed_form.residual(base, base, states[-1])
    rounds = list(closed_form.rounds(a, theta, theta_ema, original, states, start=1))
    assert [it.i for it in rounds] == [1, 2]
    assert all(torch.equal(theta[name], theta_ema[name]) for name in names)
    assert rounds[-1].loss == pytest.approx(closed_form.residual(theta, base, states[-1]))
    assert rounds[-1].loss < 0.5 * before


def test_the_error_of_the_edit_in_numbers():
    """(W c − W° a)² on one tensor with two rows, by hand: ((2 − 3)² + (4 − 9)²) / 2."""
    one = torch.ones(1, 1).double()
    W, W_0 = torch.tensor([[2.0], [4.0]]).double(), torch.tensor([[1.0], [3.0]]).double()
    states = States(one, 3 * one, one, one)
    assert closed_form.residual({"w": W}, {"w": W_0}, states) == 13


def test_command_writes_a_patch_and_a_log(tmp_path):
    words = f"{TOY} --method speed --anchor circle --out {tmp_path}/run"
    train.main(train.parse(shlex.split(words)))
    tensors, metadata = weights.read(tmp_path / "run" / "erased.safetensors")
    assert metadata["method"] == "speed"
    assert tensors
    assert all(".attn2.to_v." in name for name in tensors)
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 2


def settle(words):
    return presets.settle(train.parse(shlex.split(f"{TOY} {words}")))


def test_the_last_states_without_an_anchor_warn(capsys):
    for method in ("uce", "speed"):
        settle(f"--method {method} --states last")
        assert "the start token" in capsys.readouterr().err
        settle(f"--method {method} --states all")
    settle("--method uce --states last --anchor red")
    assert not capsys.readouterr().err


def test_a_large_model_needs_no_gpu_without_previews(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    words = "--concept nudity --method uce --anchor person".split()
    with pytest.raises(UserError, match="generating the previews .* --preview-every 0"):
        presets.settle(train.parse(words))
    assert presets.settle(train.parse([*words, "--preview-every", "0"]))["states"] == "last"
