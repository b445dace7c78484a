"""Rows on words and what a model makes of them: pieces, embeddings, directions, heads, value maps, words in context.

    uv run benchmarks/seeds.py bpe analogies orthogonal multi-head low-rank words-in-context

Each `measure_...` returns its numbers by name; table.py has their bars. CPU-minutes on one thread: words-in-context 5,
multi-head 0.5, the others below 0.3 each.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import multimodal as mm
from benchmarks.data import example, lines_of
from multimodal.attention import Layout, Span
from multimodal.layers import Attention
from multimodal.look.embeddings import angles, near_orthogonal, neighbours, welch_bound
from multimodal.look.layers import states
from multimodal.look.parameter_count import EMBEDDING, HEADS, MLPS, count_parameters, value_map, value_maps
from multimodal.look.probes import probe
from multimodal.masks import MaskInfo
from multimodal.zoo.analogies import analogy
from multimodal_tokenizers import TextBPE

TRANSLATE = "en:text -> de:text"
Numbers = dict[str, float]

TOY = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
TOY_MERGES = ["e+s", "es+t", "est+</w>", "l+o", "lo+w", "n+e", "ne+w", "new+est</w>", "low+</w>", "w+i"]


def algorithm_1(words: dict[str, int], merges: int, end: str = "</w>") -> list[str]:
    """Sennrich et al. 2016, algorithm 1: merge the most frequent pair, of equals the one seen first; "left+right" each."""
    parts = {(*word, end): count for word, count in words.items()}
    found = []
    for _ in range(merges):
        # in the order of first sight, by which `max` decides between equals
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in parts.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=pairs.__getitem__)
        found.append("+".join(best))
        parts = {_merged(word, best): count for word, count in parts.items()}
    return found


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def measure_bpe(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Merges of the paper's toy, by its algorithm and by `TextBPE`; bytes a token and the round trip of `TextBPE` on real text.

    The toy is exact for algorithm 1 written out here. TextBPE's library works on bytes, marks where a word begins and not where
    it ends, and of equally frequent pairs takes that of the smaller numbers: with a letter of its own (z) for the end of a word
    it learns some other pieces, whose share is given beside. On real text a TextBPE is measured whose words end only at white
    space, as the paper's do; by default it splits as GPT-2 does, cutting punctuation and line ends off, which costs bytes.
    """
    found: Numbers = {"toy merges exact": float(algorithm_1(TOY, 10) == TOY_MERGES)}
    toy = TextBPE.train([word + "z" for word, count in TOY.items() for _ in range(count)], vocab_size=266)
    wanted = {merge.replace("+", "").replace("</w>", "z") for merge in TOY_MERGES}
    learnt = {toy.decode(mm.Tokens(torch.tensor([i]), toy.places(1))) for i in range(256, 266)}
    found["toy pieces that TextBPE learns too"] = len(wanted & learnt) / len(wanted)
    same = [toy(word + "z").content.numel() == len(_segmented(word)) for word in TOY]
    found["toy words in as few pieces"] = float(np.mean(same))
    text = "".join(line + "\n" for line in lines_of("tinyshakespeare.txt.gz"))
    text = text[: 20_000 if quick else len(text)]
    random = np.random.default_rng(seed)
    codes = [c for c in random.integers(1, 0x110000, 3000).tolist() if not 0xD800 <= c < 0xE000]
    odd = "".join(map(chr, codes)) + "naïve \u0000\t\r\n  👩\u200d🚀 ﷺ </w> <eos>"
    for merges in (500, 1000, 2000, 4000):
        for name, bpe in (("", _by_white_space(text, merges)), (", GPT-2's split", _by_gpt2(text, merges))):
            pieces = [bpe(part) for part in _parts(text)]
            found[f"bytes per token at {merges} merges{name}"] = len(text.encode()) / sum(map(len, pieces))
            if merges == 2000:
                whole = "".join(bpe.decode(tokens) for tokens in pieces) == text
                found[f"round trip{name}"] = float(whole and bpe.decode(bpe(odd)) == odd)
    words = text.split()
    cut = int(0.9 * len(words))
    known = set(words[:cut])
    found["bytes per token, bytes"] = 1.0
    found["unknown words of the last tenth, whole words"] = float(np.mean([word not in known for word in words[cut:]]))
    return found


def _by_gpt2(text: str, merges: int) -> TextBPE:
    """What `TextBPE.train` makes by default: white space, letters, digits and punctuation never share a piece."""
    return TextBPE.train([text], vocab_size=256 + merges)


def _by_white_space(text: str, merges: int) -> TextBPE:
    """The same with the paper's words, which end only where white space is: each with the one white-space sign before it."""
    return TextBPE.train([text], vocab_size=256 + merges, words=r"\s?\S+|\s")


def _segmented(word: str) -> tuple[str, ...]:
    parts = (*word, "</w>")
    for merge in TOY_MERGES:
        left, right = merge.split("+")
        parts = _merged(parts, (left, right))
    return parts


def _parts(text: str, size: int = 30_000) -> Iterator[str]:
    """Pieces that a tokenizer takes: a value has at most 65,536 tokens. Cut where a line ends."""
    start = 0
    while start < len(text):
        end = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end


PAIRS = {
    "gender": "man/woman men/women boy/girl boys/girls he/she his/her him/her father/mother son/daughter male/female",
    "number": "dog/dogs man/men woman/women boy/boys girl/girls child/children car/cars tree/trees bike/bikes "
    "horse/horses player/players worker/workers building/buildings chair/chairs ball/balls",
    "verb-ing": "run/running walk/walking play/playing jump/jumping ride/riding sit/sitting stand/standing look/looking "
    "swim/swimming climb/climbing dance/dancing sing/singing",
}


def embeddings(sentences: Sequence[Sequence[str]], least: int, width: int, window: int) -> tuple[Tensor, list[str]]:
    """PPMI-SVD (Levy, Goldberg & Dagan 2015): a table (V, D), and its words, of those that occur `least` times or more.

    Contexts are up to `window` words away and count the less the farther they are (1, 4/5, ..), their frequencies are raised
    to 0.75, and singular values to 0.5.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    counts = Counter(word for sentence in sentences for word in sentence)
    words = [word for word, count in counts.most_common() if count >= least]
    number = {word: i for i, word in enumerate(words)}
    gap = [-1] * window
    flat = np.concatenate([np.array([*(number.get(word, -1) for word in s), *gap]) for s in sentences])
    near = csr_matrix((len(words), len(words)))
    for away in range(1, window + 1):
        left, right = flat[:-away], flat[away:]
        both = (left >= 0) & (right >= 0)
        weight = np.full(int(both.sum()), (window - away + 1) / window)
        here = csr_matrix((weight, (left[both], right[both])), shape=near.shape)
        near = near + here + here.T
    near = near.tocoo()
    row = np.asarray(near.sum(1)).ravel()
    column = np.asarray(near.sum(0)).ravel() ** 0.75
    ppmi = np.maximum(np.log(near.data * column.sum() / (row[near.row] * column[near.col])), 0)
    weighted = csr_matrix((ppmi, (near.row, near.col)), shape=near.shape)
    factors: Any = svds(weighted, k=width, v0=np.ones(len(words)))  # typed as if parts of it could be left out
    u, s, _ = factors
    return torch.tensor(u * s**0.5, dtype=torch.float32), words


def measure_analogies(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """3CosAdd on PPMI-SVD-150 of the captions, against the nearest neighbour of c that is neither a nor b; no randomness at all."""
    lines = lines_of("captions_en.txt.gz")[: 6000 if quick else None]
    sentences = [re.findall(r"\w+|[^\w\s]", line.lower()) for line in lines]
    table_VD, words = embeddings(sentences, least=5 if quick else 20, width=50 if quick else 150, window=5)
    number = {word: i for i, word in enumerate(words)}
    found: Numbers = {}
    hits, near = [], []
    for kind, text in PAIRS.items():
        pairs = [tuple(pair.split("/")) for pair in text.split()]
        asked = [
            (number[a], number[b], number[c], number[d])
            for a, b in pairs
            for c, d in pairs
            if (a, b) != (c, d) and d not in (a, b, c) and {a, b, c, d} <= set(number)
        ]
        a, b, c, d = torch.tensor(asked).unbind(1)
        hits.append(analogy(table_VD, a, b, c)[:, 0] == d)
        close_NK, _ = neighbours(table_VD, c, 3)
        other_NK = (close_NK != a[:, None]) & (close_NK != b[:, None])
        near.append(close_NK.gather(1, other_NK.int().argmax(1, keepdim=True))[:, 0] == d)
        found[kind] = float(hits[-1].float().mean())
        found[f"nearest neighbour, {kind}"] = float(near[-1].float().mean())
        found[f"questions, {kind}"] = float(len(asked))
    found["accuracy"] = float(torch.cat(hits).float().mean())
    found["nearest neighbour"] = float(torch.cat(near).float().mean())
    found["chance"] = 1 / len(words)
    for a, b, c, d in (("man", "boy", "woman", "girl"), ("man", "men", "woman", "women"), ("he", "his", "she", "her")):
        answer = words[int(analogy(table_VD, number[a], number[b], number[c]))]
        found[f"{b} - {a} + {c} = {d}"] = float(answer == d)
    return found


def measure_orthogonal(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """How the number of random directions that can be drawn with all |cos| <= 0.16 grows with dimension: exponentially."""
    widths, cosine, rounds = np.arange(64, 1025, 192 if quick else 96), 0.16, 2 if quick else 20
    logs = [
        np.mean([np.log(near_orthogonal(int(d), cosine, seed=seed * 10**6 + 1000 * r + int(d))) for r in range(rounds)])
        for d in widths
    ]
    found = {"R2 of log n over d": _r2(widths, logs), "R2 of log n over log d": _r2(np.log(widths), logs)}
    found["slope / (cosine^2 / 4)"] = float(np.polyfit(widths, logs, 1)[0] / (cosine**2 / 4))
    found["directions at 1024"] = float(np.exp(logs[-1]))
    generator = torch.Generator().manual_seed(seed)
    for count in (1000,) if quick else (1000, 10_000):
        least, most = angles(torch.randn(count, 100, generator=generator))
        found |= {f"least angle of {count} in 100": least, f"largest angle of {count} in 100": most}
    found["Welch bound of 10000 in 100, degrees"] = float(np.degrees(np.arccos(welch_bound(10_000, 100))))
    return found


def _r2(x: np.ndarray, y: Sequence[Any]) -> float:
    left = np.asarray(y) - np.polyval(np.polyfit(x, y, 1), x)
    return float(1 - left.var() / np.var(y))


PLACES, SYMBOLS, WIDTH = 12, 16, 32


class TwoLookUps(nn.Module):
    """Twelve symbols and two pointers in; one attention layer of `heads` heads; a linear read-out of both symbols, in order."""

    def __init__(self, heads: int, block: tuple[mm.layers.Layer, ...]) -> None:
        super().__init__()
        self.core = mm.Core(
            width=WIDTH, depth=1, heads=heads, block=block, rotary_split=(0, 0, 0), qk_norm=False
        ).build()
        for weight in self.core.parameters():
            if weight.dim() == 2:
                nn.init.xavier_uniform_(weight)
        self.symbol, self.place = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.first, self.second = nn.Embedding(PLACES, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.out = nn.Linear(WIDTH, 2 * SYMBOLS)

    def forward(self, symbol: Tensor, pointer: Tensor) -> Tensor:
        """Logits (B, 2, 16) for symbols (B, 12) and pointers (B, 2)."""
        asked = self.first(pointer[:, 0]) + self.second(pointer[:, 1])
        stream_TD = torch.cat([self.symbol(symbol) + self.place.weight, asked[:, None]], 1).flatten(0, 1)
        state_TD = self.core(stream_TD, torch.zeros(len(stream_TD), 3), _full(len(symbol), PLACES + 1))
        return self.out(state_TD.view(len(symbol), PLACES + 1, WIDTH)[:, -1]).view(-1, 2, SYMBOLS)


def _full(samples: int, size: int) -> Layout:
    """Samples of equal size whose tokens all see each other."""
    at = torch.arange(samples * size, dtype=torch.int32)
    places = MaskInfo(at // size, at % size, torch.ones_like(at), torch.zeros_like(at))
    return Layout(tuple(Span(size, size) for _ in range(samples)), places)


def measure_multi_head(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Both symbols right, by number of heads; all with the same parameters but the control, one head with an MLP behind it."""
    only = (mm.layers.SelfAttention(),)
    variants = {
        "1 head": (1, only),
        "2 heads": (2, only),
        "4 heads": (4, only),
        "1 head, MLP": (1, (*only, mm.layers.MLP())),
    }
    found: Numbers = {}
    for name, (heads, block) in variants.items():
        torch.manual_seed(seed)
        model, generator = TwoLookUps(heads, block), torch.Generator().manual_seed(seed)
        steps = 10 if quick else 3000 if len(block) > 1 else 1200
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-5)

        def task(count: int, generator: torch.Generator = generator) -> tuple[Tensor, Tensor, Tensor]:
            symbol = torch.randint(SYMBOLS, (count, PLACES), generator=generator)
            pointer = torch.randint(PLACES, (count, 2), generator=generator)
            return symbol, pointer, symbol.gather(1, pointer)

        for _ in range(steps):
            symbol, pointer, target = task(128)
            optimizer.zero_grad()
            F.cross_entropy(model(symbol, pointer).flatten(0, 1), target.flatten()).backward()
            optimizer.step()
            schedule.step()
        symbol, pointer, target = task(4000)
        with torch.no_grad():
            right = model(symbol, pointer).argmax(-1) == target
        found[name] = float(right.all(1).float().mean())
        found[f"{name}, each"] = float(right.float().mean())
        found[f"{name}, parameters"] = float(sum(p.numel() for p in model.parameters()))
    return found


def measure_low_rank(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """GPT-3's parameters from a declared core, and one head's values by one full matrix against value-down and value-up."""
    # its gated MLP of 8/3 D has the parameters of GPT-3's plain one of 4 D
    gpt3 = mm.Core(width=12_288, depth=96, heads=96)
    table = count_parameters(gpt3, vocab=50_257)
    full, down = value_maps(gpt3)
    words = table.counts[EMBEDDING] + table.counts[HEADS]
    found = {
        "full / factored parameters": full / down,
        "GPT-3 parameters": float(table.attention + table.counts[MLPS] + words),
        "GPT-3 attention": float(table.attention),
        "GPT-3 MLP": float(table.counts[MLPS]),
        "GPT-3 MLP share": table.counts[MLPS] / (table.attention + table.counts[MLPS] + words),
        "GPT-3 norms, not counted above": float(table.total - table.attention - table.counts[MLPS] - words),
    }
    torch.manual_seed(seed)
    core = mm.Core(width=64, depth=1, heads=4, block=(mm.layers.SelfAttention(),)).build().double()
    attention = next(module for module in core.modules() if isinstance(module, Attention))
    stream_TD = torch.randn(20, 64, dtype=torch.float64)
    trace = mm.attention.Trace()
    with torch.no_grad():
        core(stream_TD, torch.zeros(20, 3, dtype=torch.float64), _full(1, 20), trace=trace)
        normed_TD = next(core.sublayers()).norm(stream_TD)
        weight_HTM = trace.seen[0].weight_BHTM[0]
        maps = [value_map(attention, head) for head in range(4)]
        full_TD = torch.stack([weight_HTM[h] @ (normed_TD @ maps[h].T) for h in range(4)]).sum(0)
        last: list[Tensor] = []

        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            last.append(output)

        hook = attention.out.register_forward_hook(record)
        core(stream_TD, torch.zeros(20, 3, dtype=torch.float64), _full(1, 20))
        hook.remove()
    found["max |full - factored|"] = float((full_TD - last[0]).abs().max())
    found["rank - d_k"] = float(max(int(torch.linalg.matrix_rank(m)) for m in maps) - attention.value_width)
    return found


def _ambiguous(pairs: Sequence[tuple[str, str]], least: int) -> dict[str, tuple[str, str]]:
    """English words with two German translations, seldom there together, each `least` times and in a fifth of its sentences.

    A translation is a German word whose Dice coefficient with the English one is above 0.1, and which owes more to no other
    English word.
    """
    sides = [(set(re.findall(r"\w+", en)), set(re.findall(r"\w+", de))) for en, de in pairs]
    ens, des = Counter(w for en, _ in sides for w in en), Counter(w for _, de in sides for w in de)
    both = Counter((e, d) for en, de in sides for e in en if ens[e] >= 2 * least for d in de if des[d] >= least)
    dice = {pair: 2 * count / (ens[pair[0]] + des[pair[1]]) for pair, count in both.items()}
    best: dict[str, tuple[float, str]] = {}
    for (e, d), value in dice.items():
        best[d] = max(best.get(d, (0.0, "")), (value, e))
    words: dict[str, list[str]] = {}
    for d, (value, e) in sorted(best.items()):
        if value > 0.1 and both[e, d] >= max(least, ens[e] / 5):
            words.setdefault(e, []).append(d)
    found = {}
    for e, choices in sorted(words.items()):
        first, second, *_ = [*sorted(choices, key=lambda d: -both[e, d]), "", ""]
        if second:
            together = sum(e in en and first in de and second in de for en, de in sides)
            if together <= 0.1 * both[e, second]:
                found[e] = (first, second)
    return found


def measure_context(seed: int = 0, quick: bool = False, out: Path | None = None) -> Numbers:
    """Which of two German words an English one became, read off the state of that one word, by layer of a model that translates.

    Means over the words (types). The static probe sees the word's embedding alone, which is the same each time.
    """
    train, _ = example("sets").multi30k()
    pairs = [(en.lower(), de.lower()) for en, de in train][: 1500 if quick else None]
    bpe = TextBPE.train([text for pair in pairs for text in pair], vocab_size=600 if quick else 4256)
    core = mm.Core(width=32, depth=1, heads=2) if quick else mm.Core(width=128, depth=3, heads=4)
    model = mm.Model({"text": bpe}, core, [TRANSLATE], seed=seed)
    samples = [{"en": en, "de": de} for en, de in pairs]
    recipe: dict[str, Any] = {"steps": 2, "batch": 8} if quick else {"steps": 350, "batch": 64}
    mm.fit(model, {TRANSLATE: samples}, lr=4e-3, seed=seed, device="cpu", quiet=quick, **recipe)
    scores: dict[str, list[float]] = {"majority": []}
    for word, (first, second) in _ambiguous(pairs, 40 if quick else 100).items():
        asked, labels = [], []
        for en, de in pairs:
            at, words = re.search(rf"\b{word}\b", en), set(re.findall(r"\w+", de))
            # the first word of a sentence has no blank before it, so it is another token
            if at and at.start() and len(re.findall(rf"\b{word}\b", en)) == 1 and (first in words) != (second in words):
                asked.append((en, at.end()))
                labels.append(int(second in words))
        if min(labels.count(0), labels.count(1)) < 10:
            continue
        asked, labels = asked[:800], labels[:800]
        found = states(model, TRANSLATE, [{"en": en} for en, _ in asked])
        row_N = torch.stack([found.rows("en", i)[len(bpe(en[:end])) - 1] for i, (en, end) in enumerate(asked)])
        probes = [probe(state_TD[row_N], labels, decay=0.1, seed=seed) for state_TD in found.layers]
        for name, one in zip(found.names, probes, strict=True):
            scores.setdefault(name, []).append(one.accuracy)
        scores["majority"].append(probes[-1].majority)
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    last = list(scores)[-1]
    found_numbers = {"contextual probe": means[last], "static probe": means["embedding"], "majority": means["majority"]}
    layers = {f"probe, {name}": value for name, value in means.items() if name.startswith("block")}
    better = np.subtract(scores[last], scores["majority"])
    return (
        found_numbers
        | {"words": float(len(better)), "share of words above majority": float((better > 0).mean())}
        | layers
    )
