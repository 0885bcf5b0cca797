"""What brings an erased concept back: four kinds of attack, and an adversary for training.

    Word       one new word: its embedding is learned from images (textual inversion)
    Tokens     a few existing words in front of the prompt are searched
    Relearn    the trained tensors are fine-tuned on images
    NoisyDDIM  nothing is learned: the sampler adds noise (attack.py tries 24 ways)
    Adversary  train.py --adversary: words that are learned, and then unlearned, in each iteration

attack.py uses the first four. Word, Tokens and Relearn have the same three methods. `states` gives
the prompts' embeddings, through which `noise_loss` is differentiated. `step` follows its gradient.
`report` names what was found. Their attribute `tensors` is what a checkpoint holds.

Where this file differs from the papers:

1. Word (CCE, arXiv 2308.01508): one vector, and one template by default (the word alone). The
   official code uses some 25 templates, 1000 to 5000 steps and the rate 5e-3 × 16. It flips the
   images at random and samples the VAE's posterior. Here images stay, and the VAE gives its mean.
2. Tokens (UnlearnDiffAtk, arXiv 2310.11868): t is random in each step; the official code takes 40
   steps at each t from 10, 30, .. to 990, and attacks each prompt and image on its own. Only whole
   words are used, so the words that are printed give the same tokens. The projection to the simplex
   is exact, not by bisection. The code searches 5 words for nudity, violence and illegal activity,
   and 3 for the others. It samples with LMS and stops when one of its 50 images shows the concept.
   Here --words is 3 by default, the sampler is DDIM, and attack.py counts the images. The weight
   decay is the code's 0.1, but 0.001 for the toy models: with 0.1 the words did not settle there
   (50 to 160 steps).
3. Relearn: ordinary fine-tuning of the tensors in the patch, with the concept's own name. It
   also teaches a concept that the model never knew, so compare the steps, not the end.
4. NoisyDDIM (arXiv 2505.17013): attack.py counts an image if one of 24 attempts shows the
   concept, so this also succeeds by chance. It repeats the attempts with the empty prompt. The
   paper's code starts each attempt from another z_T. Here all attempts on an image share one.
5. Adversary: the inner loop of AdvUnlearn (arXiv 2405.15234) and Receler (arXiv 2311.17717).
   AdvUnlearn takes 30 steps of Adam from a random word in front of the concept. Receler takes 50
   steps on 16 words behind it. Here the words stay from one iteration to the next, so a few steps
   are enough. A step has a fixed length. Half of the words stand alone.
"""

import torch
import torch.nn.functional as F

import weights
from clip_text import TOKEN_EMBEDDING, tokenize
from losses import mean_squared_error
from pipeline import check_words, known_words, token_ids
from presets import TRAIN_PARAMS
from scheduler import DDIM
from support.errors import UserError


def encode_with_rows(text_encoder, ids, rows):
    """Token ids (B, 77) -> states (B, 77, D). Ids beyond the table read the vectors in `rows`."""
    table = text_encoder.text_model.embeddings.token_embedding.weight
    return torch.func.functional_call(
        text_encoder, {TOKEN_EMBEDDING: torch.cat([table, rows])}, (ids,)
    )


def add_tokens(tokenizer, names, table):
    """Adds new tokens, whose ids follow the table's rows."""
    if len(tokenizer) != len(table):
        raise UserError("The tokenizer and the text encoder have different numbers of words.")
    if tokenizer.add_tokens(names) != len(names):
        raise UserError(f"The tokenizer already knows one of {', '.join(names)}.")


class Word:
    """One new word: its embedding (1, D) is learned, all else is frozen."""

    def __init__(self, model, settings, device):
        self.model, self.name = model, f"<{settings['concept'].lower().replace(' ', '-')}>"
        table = model.text_encoder.text_model.embeddings.token_embedding.weight
        check_words(model, [settings["init"]])
        first = model.tokenizer(settings["init"], add_special_tokens=False).input_ids
        self.row = torch.nn.Parameter(table[first].mean(0, keepdim=True).clone())
        add_tokens(model.tokenizer, [self.name], table)
        prompts = [text.replace("{}", self.name) for text in settings["template"]]
        self.ids = tokenize(model.tokenizer, prompts)[0].to(device)
        self.tensors = {"word": self.row}
        self.optimizer = torch.optim.AdamW([self.row], settings["lr"])

    def states(self, generator=None):
        """Embeddings of the prompts, one per template: (P, 77, D), with a gradient."""
        return encode_with_rows(self.model.text_encoder, self.ids, self.row)

    def step(self):
        self.optimizer.step()

    def report(self, out):
        """Saves the word in diffusers' format: one tensor with the name of the word."""
        weights.save(out / "word.safetensors", {self.name: self.row})
        return self.name


class Tokens:
    """k words in front of the prompt: a distribution over the vocabulary for each of them.

    Each step draws words from the rows of `simplex` (k, V'). The gradient with respect to the
    one-hot rows is used as if it were the distributions' own (straight-through). The weight decay
    is a part of the gradient (Adam, not AdamW), as in the official code.
    """

    def __init__(self, model, settings, device):
        self.model = model
        table = model.text_encoder.text_model.embeddings.token_embedding.weight
        self.words, allowed = whole_words(model)
        self.vectors = table[allowed.to(device)]  # (V', D)
        k = settings["words"]
        names = [f"<hard-{i}>" for i in range(k)]
        add_tokens(model.tokenizer, names, table)
        self.prompt = settings["prompt"]
        text = " ".join([*names, self.prompt])
        self.ids = tokenize(model.tokenizer, [text])[0].to(device)
        simplex = torch.full((k, len(self.words)), 1 / len(self.words), device=device)
        self.simplex = torch.nn.Parameter(simplex)
        self.tensors = {"simplex": self.simplex}
        decay = settings["weight_decay"]
        self.optimizer = torch.optim.Adam([self.simplex], settings["lr"], weight_decay=decay)

    def states(self, generator=None):
        """Embeddings (1, 77, D) of randomly drawn words; without a generator of the likeliest."""
        if generator is None:
            picked = self.simplex.argmax(1)
        else:
            picked = torch.multinomial(self.simplex.detach().cpu(), 1, generator=generator)[:, 0]
        one_hot = F.one_hot(picked.to(self.simplex.device), self.simplex.shape[1]).float()
        self.one_hot = one_hot.requires_grad_(generator is not None)
        return encode_with_rows(self.model.text_encoder, self.ids, self.one_hot @ self.vectors)

    def step(self):
        self.simplex.grad = self.one_hot.grad.clamp(-1, 1)
        self.optimizer.step()
        self.simplex.data = project_to_simplex(self.simplex.data)

    def report(self, out):
        found = [self.words[i] for i in self.simplex.argmax(1)]
        return " ".join([*found, self.prompt])


def whole_words(model):
    """(words, their ids): tokens that are whole words, so that their text gives the same token."""
    words, ids = [], []
    # By id, because get_vocab returns its words in another order each time.
    vocabulary = sorted(model.tokenizer.get_vocab().items(), key=lambda item: item[1])
    candidates = {token[:-4]: i for token, i in vocabulary if token.endswith("</w>")}
    known = known_words(model.tokenizer)  # once: CLIP's has 49,408 tokens
    for word, found in zip(candidates, model.tokenizer(list(candidates)).input_ids):
        if known is not None and not known.issuperset(word.replace(",", " ").split()):
            continue
        if found[1:-1] == [candidates[word]]:
            words.append(word)
            ids.append(candidates[word])
    return words, torch.tensor(ids)


def project_to_simplex(x):
    """The nearest rows with numbers ≥ 0 that sum to 1 (Duchi et al. 2008), x (k, V)."""
    ordered = x.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, x.shape[1] + 1, device=x.device)
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (x - excess.gather(1, last)).clamp(min=0)


class Relearn:
    """The tensors that were trained: fine-tuned on images of the concept, with its own name.

    On the untouched model ("none") these are the tensors that SDD trains.
    """

    def __init__(self, model, settings, device):
        self.model = model
        self.prompts = [text.replace("{}", settings["concept"]) for text in settings["template"]]
        check_words(model, self.prompts)
        self.ids, _ = token_ids(model, self.prompts, device)
        parameters = dict(model.unet.named_parameters())
        parameters |= dict(model.text_encoder.named_parameters())
        names = [name for name in parameters if TRAIN_PARAMS["xattn"](name)]
        if settings["patch"] != "none":
            names = sorted(weights.read(settings["patch"])[0])
        self.tensors = {name: parameters[name].requires_grad_() for name in names}
        self.optimizer = torch.optim.AdamW(self.tensors.values(), settings["lr"])

    def states(self, generator=None):
        return self.model.text_encoder(*self.ids)

    def step(self):
        self.optimizer.step()

    def report(self, out):
        return self.prompts[0]


class Adversary:
    """Learned words that ask the student for what the original model shows for the concept.

    words (K, B, D): the vectors of one word per concept and latent. In even latents a word v stands
    alone ("v"), in odd ones in front of the concept ("v star"). c(v) is the embedding of this
    prompt. Each call takes `steps` steps down

        ‖ε_θ(z_t, t, c(v)) − sg ε_θ°(z_t, t, c_s)‖²

    and returns c(v). c_s belongs to concept j; with `--roles paper` it is all concepts, joined. A
    step has the length STEP times the mean length of a word's vector. With one concept, each word
    starts again from a random token once in RESTART iterations (or in B, if B is larger). So the
    student does not only meet words that it has just unlearned. With K concepts this is K times
    rarer. With a batch of 1, all words stand alone.

    Different from Receler's code, the inner loop leaves no gradient in the student.
    """

    STEP, RESTART = 0.1, 8  # our choice, tuned on the toy model

    def __init__(self, model, concepts, batch_size, steps, generator):
        self.text_encoder = model.text_encoder
        self.steps, self.generator = steps, generator
        self.table = self.text_encoder.text_model.embeddings.token_embedding.weight.detach()
        self.length = self.STEP * self.table.norm(dim=1).mean()
        K, B, V = len(concepts), batch_size, len(self.table)
        start = torch.randint(V, (K, B), generator=generator).to(self.table.device)
        self.words = self.table[start].clone()
        # The ids V .. V + B − 1 are the B words.
        alone = tokenize(model.tokenizer, [""])[0]
        self.ids = torch.stack([self.token_ids(model, concept, alone, V) for concept in concepts])
        self.ids = self.ids.to(self.table.device)

    def token_ids(self, model, concept, alone, V):
        """Token ids (B, 77) of the prompts with the word of each latent."""
        named = tokenize(model.tokenizer, [concept])[0]
        B = self.words.shape[1]
        rows = torch.cat([named if b % 2 else alone for b in range(B)])
        word = torch.arange(V, V + B)[:, None]
        ids = torch.cat([rows[:, :1], word, rows[:, 1:-1]], dim=1)
        ids[:, -1] = rows[:, -1]  # the end of text, if the prompt fills all 77 tokens
        return ids

    def term(self, loss):
        """The term for sdd.sdd: the same loss, with the adversary's words as what to unlearn."""

        def term(i, j, **batch):
            return loss(**batch | dict(c_s=self(**batch, i=i, j=j)))

        return term

    def __call__(self, e, e_original, z_t, t, c_s, i, j, **_):
        """c(v) (B, 77, D) for the concept j, after `steps` steps. i: the iteration."""
        B = self.words.shape[1]
        v = self.words[j].clone()
        b = i // len(self.ids) % max(B, self.RESTART)
        if b < B:
            v[b] = self.table[torch.randint(len(self.table), (), generator=self.generator)]
        with torch.no_grad():
            target = e_original(z_t, t, c_s)
        for _ in range(self.steps):
            v.requires_grad_()
            error = mean_squared_error(e(z_t, t, self.encode(v, j)), target)
            # The factor keeps small gradients in float16. Only the direction counts.
            (gradient,) = torch.autograd.grad(2**14 * error, v)
            direction = gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-20)
            v = (v - self.length * direction).detach()
        self.words[j] = v
        with torch.no_grad():
            return self.encode(v, j)

    def encode(self, v, j):
        return encode_with_rows(self.text_encoder, self.ids[j], v)


def noise_loss(unet, scheduler, z_0, c, batch_size, generator):
    """Ordinary training: ‖ε(z_t, t, c) − n‖² for random images, timesteps and prompts.

    z_0 (m, 4, h, w): latents of images. c (P, 77, D): their prompts. Returns a scalar.
    """
    which = torch.randint(len(z_0), (batch_size,), generator=generator).to(z_0.device)
    t = torch.randint(len(scheduler.alphas_cumprod), (batch_size,), generator=generator)
    prompt = torch.randint(len(c), (batch_size,), generator=generator).to(z_0.device)
    n = torch.randn((batch_size, *z_0.shape[1:]), generator=generator).to(z_0.device)
    t = t.to(z_0.device)
    z_t = scheduler.add_noise(z_0[which], n, t)
    return mean_squared_error(unet(z_t, t, c[prompt]), n)


class NoisyDDIM(DDIM):
    """DDIM with σ = η σ_DDPM and noise times `scale` (Song et al. 2021, eq. 16).

    With η > 1 the term 1 − ᾱ' − σ² can be negative: its absolute value is used, as in the
    paper's code.
    """

    def __init__(self, steps, eta, scale, seed, **schedule):
        super().__init__(steps, **schedule)
        self.eta, self.scale = eta, scale
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def step(self, z, e, i):
        t = self.timesteps[i]
        alpha, alpha_next = self.alpha(t), self.alpha(t - self.stride)
        z_0 = (z - (1 - alpha).sqrt() * e) / alpha.sqrt()
        variance = (1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)
        sigma = self.eta * variance.clamp(min=0).sqrt()
        n = torch.randn(z.shape, generator=self.generator).to(z.device)
        direction = (1 - alpha_next - sigma**2).abs().sqrt() * e
        return alpha_next.sqrt() * z_0 + direction + sigma * self.scale * n
