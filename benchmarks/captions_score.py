"""Scores of captions against several references: CIDEr from its paper, BLEU-4 by sacrebleu, and the caption of most consent."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

ORDERS = (1, 2, 3, 4)  # n of the n-grams
Vector = dict[tuple[str, ...], float]


def ngrams(caption: str) -> Counter[tuple[str, ...]]:
    """How often each n-gram of every order stands in a caption, by words."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


class Cider:
    """CIDEr (Vedantam et al. 2015, equations 1 to 3), times 10 as in the authors' code; words are not stemmed, as there.

    For n-grams w_k of one order n, h_k(c) counts w_k in a caption c, and I are all pictures, with references S_p:

        g_k(c)        = h_k(c) / sum_l h_l(c)  *  log(|I| / sum_p min(1, sum_q h_k(s_pq)))
        CIDEr_n(c, S) = 1/m sum_j  g(c) . g(s_j) / (|g(c)| |g(s_j)|)
        CIDEr(c, S)   = 10 * mean over n = 1..4 of CIDEr_n(c, S)

    `documents` are the references S_p that the logarithm counts in; an n-gram of none of them counts as of one.
    """

    def __init__(self, documents: Sequence[Sequence[str]]) -> None:
        self.pictures = len(documents)
        self.frequency = Counter(gram for references in documents for gram in set().union(*map(ngrams, references)))

    def vector(self, caption: str) -> Vector:
        """g(c) of all four orders, each divided by its length (which cancels 1 / sum_l h_l) and by the root of the orders.

        So the product of two is the mean of their four cosines.
        """
        weight = {
            gram: count * math.log(self.pictures / max(self.frequency[gram], 1))
            for gram, count in ngrams(caption).items()
        }
        squares: dict[int, float] = defaultdict(float)
        for gram, g in weight.items():
            squares[len(gram)] += g * g
        return {gram: g / math.sqrt(squares[len(gram)] * len(ORDERS)) for gram, g in weight.items() if g}

    def mean(self, captions: Sequence[str]) -> Vector:
        """The vector whose product with g(c) is the mean of the products with each of `captions`."""
        total: Vector = defaultdict(float)
        for caption in captions:
            for gram, g in self.vector(caption).items():
                total[gram] += g
        return {gram: g / len(captions) for gram, g in total.items()}

    def score(self, caption: str, references: Sequence[str]) -> float:
        """CIDEr of one caption, 0 to 10."""
        return 10 * _product(self.vector(caption), self.mean(references))

    def consensual(self, captions: Iterable[str], references: Sequence[str]) -> str:
        """Which of `captions` is closest to the references; itself, if it is among them, adds to every one alike."""
        mean = self.mean(references)
        return max(captions, key=lambda caption: _product(self.vector(caption), mean))


def _product(a: Vector, b: Vector) -> float:
    return sum(g * b[gram] for gram, g in a.items() if gram in b)


def scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4 of the whole, CIDEr with its standard error over pictures, and words a caption; the same number of references each."""
    import sacrebleu

    cider = Cider(references)
    found = np.array([cider.score(c, s) for c, s in zip(captions, references, strict=True)])
    streams = [list(stream) for stream in zip(*references, strict=True)]
    return {
        "BLEU-4": sacrebleu.corpus_bleu(list(captions), streams, tokenize="none").score,
        "CIDEr": float(found.mean()),
        "+-": float(found.std(ddof=1) / math.sqrt(len(found))),
        "words": float(np.mean([len(c.split()) for c in captions])),
    }
