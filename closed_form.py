"""Erasure without training: UCE, MACE's closed-form stage, RECE and SPEED.

Cross-attention reads the prompt through two matrices per layer, to_k and to_v. Each matrix W
(C × D) maps a text state c to a key or a value. A prompt has 77 text states, one per token, and
each of them is a vector of D numbers. These methods change each W (SPEED: of to_v only) so that the
states of the concept give the keys and values of another prompt (the anchor). They need no image
and no gradient. The result is always

    W ← W° R        with a matrix R (D × D)

as if a linear map R changed the text states in front of the keys and values. UCE, MACE and RECE use
one R for all W; SPEED has one for each W.

    UCE    arXiv 2308.14761   min Σ ‖W c − W° a‖² + Σ ‖W p − W° p‖² + λ ‖W − W°‖²
    MACE   arXiv 2403.06135   UCE's objective; c and a are other states of the prompts
    RECE   arXiv 2407.12383   UCE, then rounds against the states that would revive the concept
    SPEED  arXiv 2503.07392   an edit (of to_v only) in the null space of the states to keep
    c: states of the concept; a: of the anchor; p: of prompts to keep; W°: the original

Where this file differs from the official codes:

1. UCE's code reads one state of each prompt, that of the last word's last token (`--states last`).
   In the empty prompt this position holds the *start token*, which all prompts share and which
   says nothing about an image. So UCE without an anchor may leave the concept: train.py prints a
   warning. `--states all` takes all 77 states of each pair. Then the empty prompt is an anchor.
   The code's weights erase_scale and preserve_scale are 1 by default. Here they are always 1.
   For a style without an anchor the code's anchor is "art".
2. UCE's code has an option that adds five templates ("painting by …", "image of …") to the word
   alone: --template gives all six here. The default is the word alone; the toy model has five
   templates.
3. MACE's code keeps the captions of COCO, and celebrities or artists. Here the prompts of --keep
   take their place. It applies the captions' weight twice: 1e-4 (celebrities) acts as 1e-8, and
   7e-7 (nudity) as 4.9e-13. Celebrities and artists weigh 8,000 to 200,000 times as much as
   captions. Here the weight is 1e-4, once, for all of --keep. Without captions the code's ridge is
   10, 100 or 1000 (bird, automobile, ship); here 1000. With captions it is 0; here nearly 0.
   Its 30 sentences per concept are --template, with ten of our own as default. Its stages 2 and 3
   (a LoRA per concept, and their fusion) are not here, and stage 1 alone is not all of MACE.
4. RECE's code measures each round on a validation list and selects the round with the lowest
   detection rate (nudity, unsafe). Here the last round is the result. Its rounds keep the empty
   prompt: once per concept (nudity, unsafe), or once for all of them (styles, objects). For styles
   they keep the other artists too. Here the rounds keep the empty prompt once per prompt with the
   concept, and --keep. --ridge sets λ of UCE and of the rounds together; without it they are the
   code's.
5. SPEED's code clusters the empty prompt's states from random starts. Here each start is the state
   farthest from those before it. The code compares a variant's change with the mean of its chunk
   (the variants of 128 kept states). Here the mean is over all variants. The code leaves out
   prompts to keep that name a concept. Here --keep is taken as it is given.
6. Everything is computed in float64 on the CPU, and written in the type of the weights.
"""

import math
from typing import NamedTuple

import torch

from clip_text import MAX_TOKENS, tokenize
from pipeline import encode_prompts
from sdd import Iteration


class States(NamedTuple):
    """Text states in float64: rows of D numbers."""

    concept: torch.Tensor  # c (n, D); SPEED: (n, D) or (n, 76, D), for n prompts
    anchor: torch.Tensor  # a (n, D): row i is what row i of `concept` should become
    keep: torch.Tensor  # p (m, D)
    empty: torch.Tensor  # (77, D): the empty prompt


# ------------------------------------------------------------------------------------ text states
def template_pairs(concepts, anchors, templates):
    """[(prompt with the concept, the same prompt with the anchor)]; {} in a template is for it."""
    anchors = anchors or [""]
    pairs = []
    for j, concept in enumerate(concepts):
        anchor = anchors[j % len(anchors)]
        for template in templates:
            pairs.append((template.replace("{}", concept), template.replace("{}", anchor).strip()))
    return pairs


def states_of(model, a):
    """The states of each round, [States]; the last are for all further rounds. a: the settings."""
    pairs = template_pairs(a.concept, a.anchor, a.template)
    states = gather_states(model, a.method, pairs, a.keep, a.states)
    if a.method != "rece":
        return [states]
    return [gather_states(model, "rece", pairs, [], "ends")._replace(keep=states.keep), states]


def gather_states(model, method, pairs, keep, which="last"):
    """The states that a method needs.

    pairs: [(prompt with the concept, the same prompt with the anchor)]. keep: prompts to keep.
    which: "last" or "all", for UCE and SPEED (all but the start token's). Of the kept prompts,
    SPEED takes the last. MACE takes the states that both prompts share. RECE takes all, and in
    round 0 those from the last word on ("ends").
    """
    concepts = [concept for concept, _ in pairs]
    anchors = [anchor for _, anchor in pairs]
    c, a, p = (encode(model, prompts) for prompts in (concepts, anchors, keep))
    if which == "last" or method == "speed":
        p = last_states(model, keep, p)
    if method == "mace":
        c, a = shared_states(model, concepts, anchors, c, a)
    elif which == "last":
        c, a = last_states(model, concepts, c), last_states(model, anchors, a)
    elif which == "ends":
        c, a = end_states(model, concepts, anchors, c, a)
    elif method == "speed":
        c, a = c[:, 1:], a[:, 1:]
    if method != "speed":
        c, a = c.flatten(0, -2), a.flatten(0, -2)
    return States(c, a, p.flatten(0, -2), encode(model, [""])[0])


def encode(model, prompts):
    """Prompts -> states (n, 77, D) in float64; (0, 77, D) for no prompt."""
    if not prompts:
        return encode(model, [""])[:0]
    states = encode_prompts(model, prompts)[:, :MAX_TOKENS]  # without SDXL's pooled state
    return states.cpu().double()  # on the CPU: not every GPU has float64


def lengths(model, prompts):
    """The number of tokens of each prompt, with the start and the end of text, at most 77."""
    ids = model.tokenizer(prompts, verbose=False).input_ids if prompts else []
    return [min(len(tokens), MAX_TOKENS) for tokens in ids]


def last_states(model, prompts, states):
    """(n, 77, D) -> (n, D): the state of the last token before the end of text."""
    positions = [length - 2 for length in lengths(model, prompts)]
    return states[torch.arange(len(prompts)), positions]


def shared_states(model, concepts, anchors, c, a):
    """MACE: the states of tokens that both prompts of a pair have.

    These are the tokens before the first difference, those after the last one, the end of text and
    the padding, which counts from the end of each prompt. The concept's own tokens are left out.
    """
    ids_c, ids_a = (tokenize(model.tokenizer, prompts)[0] for prompts in (concepts, anchors))
    ends = zip(lengths(model, concepts), lengths(model, anchors))
    rows_c, rows_a = [], []
    for i, (end_c, end_a) in enumerate(ends):
        words_c, words_a = ids_c[i, :end_c].tolist(), ids_a[i, :end_a].tolist()
        before = common_prefix(words_c, words_a)
        limit = min(end_c, end_a) - before
        after = min(common_prefix(words_c[::-1], words_a[::-1]), limit)
        padding = MAX_TOKENS - max(end_c, end_a)
        for rows, states, end in ((rows_c, c[i], end_c), (rows_a, a[i], end_a)):
            rows += [states[:before], states[end - after : end + padding]]
    return torch.cat(rows_c), torch.cat(rows_a)


def end_states(model, concepts, anchors, c, a):
    """RECE's round 0: pairs of states from the last token before the end of text on.

    In the empty prompt this is the start token. The longer prompt of a pair gives the number.
    """
    rows_c, rows_a = [], []
    for i, ends in enumerate(zip(lengths(model, concepts), lengths(model, anchors))):
        starts = [end - 2 for end in ends]
        n = MAX_TOKENS - max(starts)
        for rows, states, start in zip((rows_c, rows_a), (c[i], a[i]), starts):
            rows.append(states[start : start + n])
    return torch.cat(rows_c), torch.cat(rows_a)


def common_prefix(a, b):
    """The number of equal items at the beginning of two lists."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


# --------------------------------------------------------------------------------- closed forms
def gram(x, y=None):
    """Σ x_i y_iᵀ over the rows of x and y (n, D): (D, D)."""
    return x.T @ (x if y is None else y)


def float64(W):
    return W.detach().cpu().double()


def multiply(weights, R):
    """{name: W R}: the edit that is the same for every W."""
    return {name: (float64(W) @ R).to(W) for name, W in weights.items()}


def uce(weights, states, ridge=0.5, erase=1.0, keep=1.0):
    """UCE: min over W of  erase Σ ‖W c − W° a‖² + keep Σ ‖W p − W° p‖² + ridge ‖W − W°‖².

    weights: {name: W° (C, D)}; in a round of RECE, the current W in the place of W°.
    The gradient is 0 where W B = W° A, with
    A = erase Σ a cᵀ + keep Σ p pᵀ + ridge I and B = erase Σ c cᵀ + keep Σ p pᵀ + ridge I.
    """
    c, a, p, _ = states
    rest = keep * gram(p) + ridge * torch.eye(c.shape[1]).to(c)
    A = erase * gram(a, c) + rest
    B = erase * gram(c) + rest
    R = torch.linalg.solve(B, A, left=False)  # A B⁻¹
    return multiply(weights, R)


def mace(weights, states, ridge=None, keep=1e-4):
    """MACE, stage 1: UCE's objective on the states that the prompts share (shared_states).

    The kept prompts are a prior with the weight `keep`. In MACE's code the ridge is 0 with a prior.
    This needs a prior of at least D independent states. So here it is 1e-6 of the mean of the
    prior's diagonal. Point 3 at the top names the code's weights.
    """
    if ridge is None and len(states.keep):
        ridge = 1e-6 * keep * gram(states.keep).diagonal().mean().item()
    elif ridge is None:
        ridge = 1000.0
    return uce(weights, states, ridge=ridge, keep=keep)


def revived_states(weights, original, c, rho):
    """RECE: states c′ (n, D) for which the edited W give what W° gave for the concept's c.

    min over c′ of  Σ_W ‖W c′ − W° c‖² + rho ‖c′‖², over all keys and values at once. So
    c′ = (Σ WᵀW + rho I)⁻¹ (Σ WᵀW°) c.
    """
    B = rho * torch.eye(c.shape[1]).to(c)
    A = torch.zeros_like(B)
    for name, W in weights.items():
        B += gram(float64(W))
        A += gram(float64(W), float64(original[name]))
    return torch.linalg.solve(B, A @ c.T).T


def rece_start(weights, states, ridge=0.5):
    """Round 0 of RECE: the UCE of its own code, with the pairs of `end_states`.

    The empty prompt and the prompts to keep, n in all, have the weight 1/n, but at least 0.1.
    """
    kept = torch.cat([states.keep, states.empty])
    n = len(kept) // MAX_TOKENS
    keep = round(max(0.1, 1 / n), 3)  # the code rounds too
    return uce(weights, states._replace(keep=kept), ridge=ridge, keep=keep)


def rece_round(weights, original, states, rho=0.1, ridge=0.1, keep=0.1):
    """One round of RECE: UCE of the *current* weights on the states that revive the concept.

    The states of the empty prompt are kept too, once for each prompt with the concept. RECIPES in
    presets.py has rho and the number of rounds of the official README.
    """
    revived = revived_states(weights, original, states.concept, rho)
    n = math.ceil(len(revived) / MAX_TOKENS)
    kept = torch.cat([states.keep, states.empty.repeat(n, 1)])
    return uce(weights, states._replace(concept=revived, keep=kept), ridge=ridge, keep=keep)


def speed(weights, states, ridge=1.0, gamma=0.0, threshold=0.1, filtered=True, copies=10, seed=0):
    """SPEED: min over Δ of  mean ‖(W° + Δ) c − W° a‖² + ridge ‖Δ‖²,  with Δ = Δ P and Δ K = 0.

    P projects onto the null space of the states to keep (`null_space`), so Δ hardly changes what W
    gives for them. Without prompts to keep, these are the empty prompt's states but the start
    token's. If `filtered`, only those that an edit would change most are kept (`influenced`). To
    them come their variants that the edit would change most (`vary`). K (D, 4): the empty prompt's
    start token and three centres of its other states. With gamma > 0, Δ K = 0 is replaced by a
    penalty ‖Δ K‖² / gamma. With C = mean c cᵀ, A = mean a cᵀ (over prompts; `--states all` sums
    the states of a prompt) and M = (C P + ridge I)⁻¹ the solution is
    Δ = W° (A − C) P [I − M K (Kᵀ P M K + gamma I)⁻¹ Kᵀ P] M.

    The states to keep are chosen for each W, so P and Δ are computed for each W.
    """
    c, a, p, empty = states
    n, D = len(c), c.shape[-1]
    c, a, identity = c.reshape(-1, D), a.reshape(-1, D), torch.eye(D).to(c)
    C, A = gram(c) / n, gram(a, c) / n
    if not len(p):
        p = empty[1:]
    K = torch.cat([empty[:1], cluster_centres(empty[1:], 3)]).T
    generator = torch.Generator().manual_seed(seed)
    edited = {}
    for name, W in weights.items():
        W_0 = float64(W)
        # The edit without constraints; the ridge is 1 here, as in SPEED's code.
        first = W_0 @ (A - C) @ torch.linalg.inv(identity + C)
        kept = influenced(p, first) if filtered else p
        kept = torch.cat([kept, influenced(vary(kept, W_0, copies, generator), first)])
        P = null_space(kept, threshold)
        M = torch.linalg.inv(C @ P + ridge * identity)
        inner = torch.linalg.pinv(K.T @ P @ M @ K + gamma * torch.eye(K.shape[1]).to(K))
        step = (A - C) @ P @ (identity - M @ K @ inner @ K.T @ P) @ M
        edited[name] = (W_0 @ (identity + step)).to(W)
    return edited


def influenced(states, edit):
    """The states that an edit Δ (C, D) changes more than the mean: rows r with a large ‖Δ r‖."""
    if not len(states):
        return states
    change = (states @ edit.T).norm(dim=1)
    return states[change >= change.mean()]


def vary(states, W, copies, generator):
    """Random variants of states along one direction: (copies · n, D).

    Of the directions that W (C × D) reads, it reads this one least: the last singular vector. With
    C < D it is not in the null space of W. So the variants change what W gives, as in SPEED's code.
    """
    least = torch.linalg.svd(W, full_matrices=False).Vh[-1]
    states = states.repeat(copies, 1)
    noise = torch.randn(states.shape, generator=generator, dtype=torch.float64).to(states.device)
    return states + (noise @ least)[:, None] * least


def null_space(states, limit):
    """The projector P (D, D) onto directions in which the states' mean r rᵀ is below `limit`."""
    values, vectors = torch.linalg.eigh(gram(states) / len(states))
    free = vectors[:, values < limit]
    return free @ free.T


def cluster_centres(x, k, rounds=20):
    """k-means: x (n, D) -> centres (k, D). Each start is the row farthest from those before it."""
    centres = x[:1]
    while len(centres) < k:
        distance = torch.cdist(x, centres).amin(dim=1)
        centres = torch.cat([centres, x[distance.argmax()][None]])
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(dim=1)
        means = [x[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(k)]
        centres = torch.stack(means)
    return centres


# ----------------------------------------------------------------------------------- all rounds
@torch.no_grad()
def rounds(a, theta, theta_ema, original, states, start=0):
    """Yields an sdd.Iteration after each round; its loss is the error of the edit.

    a: the run's settings. theta, theta_ema: {name: W}, both receive the result. original: the UNet.
    states: [States] of `states_of`. The error is that of the last.
    """
    parameters = dict(original.named_parameters())
    original = {name: parameters[name] for name in theta}
    for i in range(start, a.iters):
        edited = edit(a, i, theta, original, states[min(i, len(states) - 1)])
        left = residual(edited, original, states[-1])
        for name, W in edited.items():
            theta[name].copy_(W)
            theta_ema[name].copy_(W)
        yield Iteration(i, loss=left, lr=0.0, grad_norm=0.0, k=None, j=0)


def edit(a, number, weights, original, states):
    """Round `number` of a method: {name: W} -> {name: W}, of the same types and on the same device.

    Only RECE has more than one round. a: the run's settings; a.ridge: None for the method's own.
    """
    given = {} if a.ridge is None else {"ridge": a.ridge}
    if a.method == "speed":
        given |= dict(gamma=a.gamma, threshold=a.threshold, filtered=a.filter, seed=a.seed)
        return speed(weights, states, **given)
    if a.method == "rece" and number > 0:
        return rece_round(weights, original, states, a.rho, **given)
    return {"uce": uce, "mace": mace, "rece": rece_start}[a.method](weights, states, **given)


def residual(weights, original, states):
    """The mean of (W c − W° a)² over all tensors, states and elements: the error of the edit."""
    c, a = states.concept, states.anchor
    errors = [
        (c @ float64(W).T - a @ float64(original[name]).T).square().mean().item()
        for name, W in weights.items()
    ]
    return sum(errors) / len(errors)
