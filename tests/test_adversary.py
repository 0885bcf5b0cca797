"""adversaries.Adversary, the inner loop of --adversary, against a plain loop on other classes."""

import pytest
import torch
from common import TEXT, UNETS, pair, randn, relative, their_scheduler

import presets
import train
from adversaries import Adversary, noise_loss
from scheduler import DDIM

SIZES = UNETS["2 heads, plain first"] | dict(cross_attention_dim=TEXT["hidden_size"])
B, STEPS = 3, 4


class Tokenizer:
    """Words are numbers: "5 6" -> start, 5, 6, end of text, padded to 77."""

    def __call__(self, prompts, **_):
        ids = [[97, *map(int, prompt.split()), 98] for prompt in prompts]
        return type("Tokens", (), {"input_ids": [row + [98] * (77 - len(row)) for row in ids]})


@pytest.fixture
def models(monkeypatch):
    """(our model, its twins): a tiny text encoder and two UNets, random and not trained."""
    monkeypatch.setattr("adversaries.tokenize", lambda t, p: (torch.tensor(t(p).input_ids), None))
    text, their_text = pair("text_encoder", **TEXT)
    student, their_student = pair("unet", seed=1, **SIZES)
    original, their_original = pair("unet", seed=2, **SIZES)
    for module in (text, original, their_text, their_original):
        module.requires_grad_(False)
    student.requires_grad_(True)
    model = type("Model", (), dict(text_encoder=text, tokenizer=Tokenizer()))
    return model, student, original, (their_text, their_student, their_original)


def plain(words, ids, theirs, z_t, t, c_s, length):
    """The inner loop, one latent at a time. Returns (words, their prompts' states)."""
    text, student, original = theirs
    table = text.get_input_embeddings().weight
    found, states = [], []
    for b, word in enumerate(words):
        v = word.clone()
        for _ in range(STEPS):
            v.requires_grad_()
            e = student(z_t[b : b + 1], t, encode(text, table, ids[b], v)).sample
            target = original(z_t[b : b + 1], t, c_s).sample
            (g,) = torch.autograd.grad(((e - target) ** 2).mean(), v)
            v = (v - length * g / g.norm()).detach()
        found.append(v)
        states.append(encode(text, table, ids[b], v)[0])
    return torch.stack(found), torch.stack(states)


def encode(text, table, ids, v):
    """transformers' text encoder with `v` in the place of the ids beyond its table."""
    big = torch.cat([table.detach(), v[None]])
    embedding = text.get_input_embeddings()
    before = embedding.weight
    del embedding.weight
    embedding.weight = big
    try:
        return text(ids[None].clamp(max=len(table))).last_hidden_state
    finally:
        del embedding.weight
        embedding.weight = before


@pytest.mark.parametrize("i", [18, 8])  # K = 2: word 1 starts again in 18, none in 8
def test_the_inner_loop_against_a_plain_loop(models, i):
    model, student, original, theirs = models
    generator = torch.Generator().manual_seed(3)
    with torch.enable_grad():
        adversary = Adversary(model, ["5 6", "7"], B, STEPS, generator)
        again = torch.Generator().manual_seed(3)
        table = theirs[0].get_input_embeddings().weight.detach()
        start = table[torch.randint(len(table), (2, B), generator=again)]
        assert torch.equal(adversary.words, start)
        z_t, t, j = randn(B, 4, 16, 12), 401, 1
        c_s = randn(1, 77, TEXT["hidden_size"], seed=5)
        expected = start[j].clone()
        fresh = table[torch.randint(len(table), (), generator=again)]
        if i == 18:
            expected[1] = fresh
        c_v = adversary(e=student, e_original=original, z_t=z_t, t=t, c_s=c_s, i=i, j=j)
        assert all(p.grad is None for p in student.parameters())  # Receler's code leaves gradients
        # start, the word, the concept in odd latents, end of text
        rows = [[97, 99, 98], [97, 99, 7, 98], [97, 99, 98]]
        ids = torch.tensor([row + [98] * (77 - len(row)) for row in rows])
        length = 0.1 * table.norm(dim=1).mean()
        words, states = plain(expected, ids, theirs, z_t, t, c_s, length)
    # float32 through two networks, with the gradient's direction on top: 2e-5 was measured
    assert relative(adversary.words[j], words) < 2e-4
    assert relative(c_v, states) < 2e-4
    assert torch.equal(adversary.words[0], start[0])  # the other concept's words stay
    moved = (adversary.words[j] - expected).norm(dim=1)
    assert (moved > length).all()


def test_the_steps_lower_the_error(models):
    """From the same start, more steps come closer to what the original gives for the concept."""
    model, student, original, _ = models
    z_t, c_s = randn(B, 4, 16, 12), randn(1, 77, TEXT["hidden_size"], seed=5)
    errors = []
    for steps in (0, 2, 8):
        with torch.enable_grad():
            adversary = Adversary(model, ["5"], B, steps, torch.Generator().manual_seed(0))
            c_v = adversary(e=student, e_original=original, z_t=z_t, t=201, c_s=c_s, i=0, j=0)
        errors.append((student(z_t, 201, c_v) - original(z_t, 201, c_s)).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_a_full_prompt_keeps_its_end_of_text(models):
    model, *_ = models
    full = " ".join(["5"] * 75)
    adversary = Adversary(model, [full], 2, 1, torch.Generator())
    alone, named = adversary.ids[0].tolist()
    assert alone == [97, 99, *[98] * 75]
    assert named == [97, 100, *[5] * 74, 98]


def test_noise_loss_is_ordinary_training():
    """Random images, timesteps, prompts and noise, drawn in this order."""

    def unet(z, t, c):
        return z * c.mean((1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000

    z_0, c = randn(5, 4, 8, 8), randn(2, 77, 6, seed=1)
    g = torch.Generator().manual_seed(5)
    loss = noise_loss(unet, DDIM(10), z_0, c, 3, torch.Generator().manual_seed(5))
    which, t, prompt = (torch.randint(n, (3,), generator=g) for n in (5, 1000, 2))
    n = torch.randn(3, 4, 8, 8, generator=g)
    z_t = their_scheduler("ddim", 10).add_noise(z_0[which], n, t)
    expected = ((unet(z_t, t, c[prompt]) - n) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------------- flags
def test_the_concepts_own_words_are_not_kept():
    def kept(*concepts):
        args = ["--model", "toy", "--preset", "toy-hold", "--concept", *concepts]
        return presets.settle(train.parse(args))["keep"]

    assert "star" not in kept("Star")
    assert "circle" in kept("star")
    assert not {"red", "star"} & set(" ".join(kept("a red star")).split())
    assert not kept("star", "red") == kept("star")


def test_keep_reads_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("circle\n\na red square\n", encoding="utf-8")
    args = train.parse(f"--model toy --concept star --preserve 0.3 --keep {file}".split())
    assert presets.settle(args)["keep"] == ["circle", "a red square"]
