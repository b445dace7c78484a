"""From rows of CTC logits to symbols: greedily, or by prefix beam search with a language model and a list of words.

A `Decoder` is a setting; its `search()` decodes one sound. Rows are pushed in any number of pieces; until something is committed
the result is that of one push of all rows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

import torch
from torch import Tensor

from multimodal.generate.lexicon import State, WordTree
from multimodal.heads.ctc import collapse
from multimodal.shapes import ConfigError, check_shapes
from multimodal.tokenizer import Tokenizer
from multimodal.transcription.language_model import LanguageModel

_NEVER = float("-inf")
WIDEST = 10_000  # the most prefixes of a beam search; more take seconds for each row


class Search(ABC):
    """The decoding of one sound's rows; the blank is the last class."""

    @abstractmethod
    def push(self, log_p_NV: Tensor) -> None:
        """Read more rows of log-probabilities, in nats."""

    @abstractmethod
    def ids(self) -> list[int]:
        """The best symbols since the last commit."""

    @abstractmethod
    def settled(self) -> int:
        """The number of first `ids` that no later row can change."""

    @abstractmethod
    def commit(self, last: bool = False) -> list[int]:
        """Make the best symbols so far final and return them; `ids` starts anew. last: no row follows."""


class Decoder(ABC):
    """A way to decode rows of CTC logits."""

    @abstractmethod
    def search(self) -> Search:
        """Start the decoding of one sound."""

    def __call__(self, logits_NV: Tensor) -> list[int]:
        """The symbols of one value's logits (N, V), the blank being the last class."""
        search = self.search()
        search.push(log_probabilities(logits_NV))
        return search.commit(last=True)


@dataclass(frozen=True)
class GreedyCTC(Decoder):
    """The likeliest class of every row, without repeats and blanks."""

    def search(self) -> Search:
        return _GreedySearch()


class _GreedySearch(Search):
    def __init__(self) -> None:
        self.before: int | None = None  # the class of the last row, which the next may repeat
        self.found: list[int] = []

    def push(self, log_p_NV: Tensor) -> None:
        check_shapes("GreedyCTC", log_p_NV=log_p_NV)
        path_N = log_p_NV.argmax(-1)
        self.found += collapse(path_N, log_p_NV.shape[-1] - 1, self.before).tolist()
        self.before = int(path_N[-1]) if len(path_N) else self.before

    def ids(self) -> list[int]:
        return list(self.found)

    def settled(self) -> int:
        return len(self.found)

    def commit(self, last: bool = False) -> list[int]:
        found, self.found = self.found, []
        return found


class Lexicon(WordTree):
    """Restricts a `Beam` to texts made of the given words with one blank character between them.

    Raises:
        ConfigError: no words, or a word that is empty or has a blank character in it.
    """

    def __init__(self, words: Iterable[str], tokenizer: Tokenizer) -> None:
        if isinstance(words, str):
            raise ConfigError("Lexicon: words is one text; give a list of words")
        words = tuple(dict.fromkeys(words))
        if not words:
            raise ConfigError("Lexicon: the list of words is empty, so that nothing could be written; give some words")
        for word in words:
            if not word or word.split() != [word]:
                raise ConfigError(f"Lexicon: {word!r} is not one word; words have letters and no blank characters")
        super().__init__(words, tokenizer)

    def complete(self, state: State) -> bool:
        """Whether a text may end here; nothing at all is a text too."""
        return state is self.start or self.word_ends(state)


@dataclass(frozen=True)
class Beam(Decoder):
    """Prefix beam search (Hannun et al. 2014, algorithm 1): alignments of the same symbols add up their probabilities.

    A text y is ranked by log p(y | rows) + weight * log prior(y) + bonus * symbols (shallow fusion). The end of the text under the
    prior counts, where the prior has one, after the last row.

    width: prefixes that survive each row.
    prior: a language model over the symbols.
    weight: of the prior's log-probability.
    bonus: nats for each symbol, since a prior favours short texts.
    lexicon: the words that may be written.
    cutoff: classes more than this many nats below a row's best are not tried; inf tries all.
    """

    width: int = 16
    prior: LanguageModel | None = None
    weight: float = 0.5
    bonus: float = 0.0
    lexicon: Lexicon | None = None
    cutoff: float = 12.0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"Beam: width={self.width} keeps nothing; use 1 or more")
        if self.width > WIDEST:
            raise ConfigError(
                f"Beam: width={self.width} is more than {WIDEST} prefixes, all of which are visited after every row; use "
                "fewer: more than some tens hardly find another text"
            )
        if not (math.isfinite(self.weight) and math.isfinite(self.bonus)):
            raise ConfigError(f"Beam: weight={self.weight} and bonus={self.bonus} must be finite numbers")
        if not self.cutoff > 0:
            raise ConfigError(f"Beam: cutoff={self.cutoff} nats tries no class; use 5 or more, or inf")

    def search(self) -> "BeamSearch":
        return BeamSearch(self)


class _Node:
    """A prefix: its last symbol, its parent, and the nats of its text from prior and bonus."""

    __slots__ = ("ahead", "children", "extra", "parent", "state", "symbol")

    def __init__(self, parent: "_Node | None", symbol: int, extra: float, state: State | None) -> None:
        self.parent, self.symbol, self.extra, self.state = parent, symbol, extra, state
        self.children: dict[int, _Node | None] = {}
        self.ahead: list[float] | None = None  # log-probability of every next symbol under the prior

    def path(self, above: "_Node | None") -> list[int]:
        """Symbols from `above` (not counted) down to here."""
        symbols, node = [], self
        while node is not above and node.parent is not None:
            symbols.append(node.symbol)
            node = node.parent
        return symbols[::-1]


class BeamSearch(Search):
    """The live prefixes, each with the log-probability of its alignments that end in a blank, and of those that do not."""

    def __init__(self, beam: Beam) -> None:
        self.beam = beam
        self.root = _Node(None, -1, 0.0, beam.lexicon.start if beam.lexicon else None)
        self.live: dict[_Node, tuple[float, float]] = {self.root: (0.0, _NEVER)}
        self.symbols = 0  # number of classes without the blank

    def push(self, log_p_NV: Tensor) -> None:
        check_shapes("Beam", log_p_NV=log_p_NV)
        log_p_NV = log_p_NV.detach().cpu()
        blank = self.symbols = log_p_NV.shape[-1] - 1
        tried_NV = log_p_NV >= log_p_NV.amax(-1, keepdim=True) - self.beam.cutoff
        tried_NV[:, blank] = False
        for row, tried in zip(log_p_NV, tried_NV, strict=True):
            classes = tried.nonzero()[:, 0]
            # numbers leave torch as two lists: a call for each of them would take most of the time
            needed = {node.symbol for node in self.live if node.symbol >= 0}
            stay = dict(zip(needed, row[list(needed)].tolist(), strict=True)) if needed else {}
            self._row(float(row[blank]), stay, list(zip(classes.tolist(), row[classes].tolist(), strict=True)))

    def _row(self, blank: float, stay: Mapping[int, float], classes: Sequence[tuple[int, float]]) -> None:
        """Extend the live prefixes by one row: nats of the blank, of the symbols that prefixes end with, of the classes to try."""
        mass: dict[_Node, list[float]] = {}
        for node, (ended, open_) in self.live.items():
            both = _plus(ended, open_)
            here = mass.setdefault(node, [_NEVER, _NEVER])
            here[0] = _plus(here[0], both + blank)
            # the same symbol once more belongs to the same run, so the text does not change
            if node.symbol in stay:
                here[1] = _plus(here[1], open_ + stay[node.symbol])
            for symbol, nats in classes:
                came = ended if symbol == node.symbol else both  # a repeat needs a blank between
                if came + nats == _NEVER:
                    continue
                child = self._child(node, symbol)
                if child is not None:
                    there = mass.setdefault(child, [_NEVER, _NEVER])
                    there[1] = _plus(there[1], came + nats)
        best = nlargest(self.beam.width, mass.items(), key=lambda item: _plus(*item[1]) + item[0].extra)
        self.live = {node: (ended, open_) for node, (ended, open_) in best}

    def _child(self, node: _Node, symbol: int) -> _Node | None:
        """The prefix with one more symbol; None where the lexicon has no such word."""
        if symbol not in node.children:
            lexicon = self.beam.lexicon
            state = lexicon.step(node.state, symbol) if lexicon and node.state is not None else None
            if lexicon and state is None:
                node.children[symbol] = None
            else:
                extra = node.extra + self.beam.bonus
                if self.beam.prior is not None and self.beam.weight:
                    extra += self.beam.weight * self._ahead(node)[symbol]
                node.children[symbol] = _Node(node, symbol, extra, state)
        return node.children[symbol]

    def _ahead(self, node: _Node) -> list[float]:
        """Log-probabilities of the next symbol under the prior, computed once for each prefix."""
        if node.ahead is None:
            assert self.beam.prior is not None
            node.ahead = self.beam.prior.log_p(node.path(None)).tolist()
            if len(node.ahead) < self.symbols:
                raise ConfigError(
                    f"Beam: the prior knows {len(node.ahead)} symbols and the task writes {self.symbols}; make it with the "
                    "vocabulary of the kind that is written"
                )
        return node.ahead

    def _score(self, node: _Node, last: bool) -> float:
        """Nats of a prefix; last: including the end of the text under the prior."""
        score = _plus(*self.live[node]) + node.extra
        prior = self.beam.prior
        if last and prior is not None and prior.ends and self.beam.weight:
            score += self.beam.weight * self._ahead(node)[-1]
        return score

    def ranked(self, last: bool = True) -> list[tuple[list[int], float]]:
        """(symbols since the last commit, score in nats) of every live prefix, best first; last: only whole texts."""
        lexicon = self.beam.lexicon
        whole = [n for n in self.live if not (last and lexicon) or (n.state is not None and lexicon.complete(n.state))]
        scored = sorted(((self._score(node, last), node) for node in whole), key=lambda item: -item[0])
        return [(node.path(self.root), score) for score, node in scored]

    def _best(self) -> _Node:
        return max(self.live, key=lambda node: self._score(node, False))

    def ids(self) -> list[int]:
        return self._best().path(self.root)

    def settled(self) -> int:
        paths = [node.path(self.root) for node in self.live]
        together = 0
        for symbols in zip(*paths, strict=False):
            if len(set(symbols)) > 1:
                break
            together += 1
        return together

    def commit(self, last: bool = False) -> list[int]:
        best = self._best()
        ids = best.path(self.root)
        if last:
            ranked = self.ranked()
            ids = ranked[0][0] if ranked else self._cut_back(best)
        node = best
        # the other branches are dropped, so that memory does not grow with the sound
        while node is not self.root and node.parent is not None:
            node = node.parent
            node.children = {}
        best.children = {}
        self.live = {best: self.live[best]}
        self.root = best
        return ids

    def _cut_back(self, node: _Node) -> list[int]:
        """The best prefix up to its last whole word, where no live prefix ends with one."""
        lexicon = self.beam.lexicon
        while lexicon and node is not self.root and node.parent is not None:
            if node.state is not None and lexicon.complete(node.state):
                break
            node = node.parent
        return node.path(self.root)


def _plus(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == _NEVER else a + math.log1p(math.exp(b - a))


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """Log-probabilities (N, V) in float32 on the CPU."""
    return torch.log_softmax(logits_NV.detach().float(), -1).cpu()
