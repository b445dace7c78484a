"""The row on feature directions: a language model of captions, probed and steered; a sparse autoencoder on a toy.

uv run benchmarks/seeds.py features               about 3 CPU-minutes on one thread
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import multimodal as mm
from benchmarks.data import example, lines_of
from multimodal.look.layers import states
from multimodal.look.probes import direction, probe
from multimodal.look.steering import random_like, steer
from multimodal.zoo.sparse_autoencoder import SparseAutoencoder, recovered
from multimodal_tokenizers import TextBPE

WRITE = "-> text"
Numbers = dict[str, float]


NOUNS = (
    *(("man", "men"), ("woman", "women"), ("boy", "boys"), ("girl", "girls"), ("dog", "dogs"), ("child", "children")),
    *(("player", "players"), ("worker", "workers"), ("lady", "ladies"), ("kid", "kids"), ("person", "people")),
    *(("guy", "guys"), ("cyclist", "cyclists"), ("dancer", "dancers"), ("musician", "musicians")),
    ("soldier", "soldiers"),
)
NEUTRAL = {
    *("in", "on", "with", "wearing", "standing", "walking", "sitting", "playing", "holding", "at", "near", "and"),
    *("looking", "riding", "running"),
}
BEFORE = ("the ", "the young ", "the old ", "the other ", "the happy ")
SINGULAR, PLURAL = {"is", "was", "has"}, {"are", "were", "have"}


def _beginnings(lines: Sequence[str], each: int, seed: int) -> tuple[list[str], list[int], list[str], list[str]]:
    """Beginnings of captions up to a word behind the first noun that says nothing of its number; number, noun, noun and word."""
    number = {word: (one, i) for one, many in NOUNS for i, word in enumerate((one, many))}
    found: list[list[tuple[str, int, str, str]]] = [[], []]
    for line in lines:
        words = line.split()
        at = next((i for i, word in enumerate(words[:4]) if word in number), None)
        if at is not None and words[at + 1 : at + 2] and words[at + 1] in NEUTRAL:
            noun, many = number[words[at]]
            found[many].append((" ".join(words[: at + 2]), many, noun, f"{noun} {words[at + 1]}"))
    random = np.random.default_rng(seed)
    chosen = [part[i] for part in found for i in random.permutation(len(part))[:each]]
    texts, labels, nouns, types = zip(*chosen, strict=True)
    return list(texts), list(labels), list(nouns), list(types)


def _verb(text: str) -> int:
    """0: the first verb that has a number is singular; 1: plural; -1: there is none."""
    for word in re.findall("[a-z]+", text):
        if word in SINGULAR | PLURAL:
            return int(word in PLURAL)
    return -1


def _flipped(
    model: mm.Model, nouns: Sequence[tuple[str, ...]], layer: int, push_D: Tensor | None, alpha: float
) -> float:
    """The share of beginnings, of those continued with the right verb, that a push towards the other number turns around."""
    flips = []
    for many in (0, 1):
        begins = [before + noun[many] for noun in nouns for before in BEFORE]

        def verbs(begins: list[str] = begins) -> np.ndarray:
            answers = model.generate(WRITE, [{}] * len(begins), begin=begins, max_tokens=6, batch=128)
            return np.array([_verb(answer.value) for answer in answers])

        right = verbs() == many
        if push_D is None:
            flips.append(right)
            continue
        with steer(model, layer, push_D, alpha * (1 - 2 * many)):
            flips.append((verbs() == 1 - many)[right])
    every = np.concatenate(flips)
    return float(every.mean()) if len(every) else 0.0


def measure_features(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Number (singular, plural) as a direction in a language model of captions; and a sparse autoencoder on a toy with known ones.

    Probed at a word behind the noun that says nothing of its number; the static probe sees that word alone. Steering: "the man"
    is continued greedily by "is", under the difference of means by "are", and the other way round. Its strength is chosen on
    one half of the nouns and scored on the other.
    """
    lines = [line.lower() for line in lines_of("captions_en.txt.gz")][: 8000 if quick else None]
    bpe = TextBPE.train(lines, vocab_size=600 if quick else 3256)
    core = mm.Core(width=32, depth=2, heads=2) if quick else mm.Core(width=128, depth=3, heads=4)
    model = mm.Model({"text": bpe}, core, [WRITE], seed=seed)
    recipe: dict[str, Any] = {"steps": 2, "batch": 8} if quick else {"steps": 800, "batch": 64}
    mm.fit(model, {WRITE: [{"text": line} for line in lines]}, lr=4e-3, seed=seed, device="cpu", quiet=quick, **recipe)
    texts, labels, nouns, types = _beginnings(lines, 40 if quick else 1000, seed)
    found = states(model, WRITE, [{"text": text} for text in texts], answers=True)
    layer = len(found) - 1
    last_ND = found.of(layer, "text")
    main = probe(last_ND, labels, control=types, seed=seed)
    numbers: Numbers = {
        "probe": main.accuracy,
        "probe, static": probe(found.of(0, "text"), labels, seed=seed).accuracy,
        "probe, nouns held out": probe(last_ND, labels, groups=nouns, seed=seed).accuracy,
        "majority": main.majority,
        "control task": main.control or 0.0,
    }
    many_N = torch.tensor(labels) == 1
    number_D = direction(last_ND[many_N], last_ND[~many_N])
    strengths = (1.0, 2.0) if quick else (1.0, 1.5, 2.0, 2.5, 3.0)
    tuned = {alpha: _flipped(model, NOUNS[::2][: 2 if quick else None], layer, number_D, alpha) for alpha in strengths}
    alpha = max(tuned, key=tuned.__getitem__)
    others = NOUNS[1::2][: 2 if quick else None]
    numbers["steered"] = _flipped(model, others, layer, number_D, alpha)
    drawn = [random_like(number_D, seed=1000 * seed + i) for i in range(1 if quick else 5)]
    numbers["steered at random"] = float(np.mean([_flipped(model, others, layer, push_D, alpha) for push_D in drawn]))
    numbers["strength"] = alpha
    numbers["right verb, not steered"] = _flipped(model, others, layer, None, 0.0)
    return numbers | _dictionary(seed, quick)


def _dictionary(seed: int, quick: bool) -> Numbers:
    """How many of the directions of 40 sparse features in 16 dimensions a sparse autoencoder finds, from their sums alone."""
    toy = example("superposition")
    steps = 50 if quick else 4000
    weight, _ = toy.train_toy(0.97, features=40, width=16, decay=1.0, runs=1, steps=steps, seed=seed)
    true_ND = weight[0][weight[0].norm(dim=-1) > 0.5]
    generator = torch.Generator().manual_seed(seed + 1)
    feature_NF = toy.batch_of(20_000, 40, 0.97, generator, 1)[0]
    state_ND = feature_NF[(feature_NF > 0).any(1)] @ weight[0]
    sparse = SparseAutoencoder.train_on(state_ND, 64, steps=20 if quick else 3000, seed=seed)
    axes_ND = torch.linalg.svd(state_ND - state_ND.mean(0), full_matrices=False).Vh
    return {
        "directions recovered": recovered(sparse.directions_FD, true_ND),
        "directions recovered, principal axes": recovered(torch.cat([axes_ND, -axes_ND]), true_ND),
        "directions recovered, random": recovered(torch.randn(64, 16, generator=generator), true_ND),
        "directions": float(len(true_ND)),
    }
