"""CTC rows to words with times: forced alignment, symbols joined to words, and a decoder for sounds of any length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor

from multimodal.shapes import ConfigError, StreamError, check_shapes
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal.transcription.ctc import Decoder
from multimodal.transcription.transcript import Word

PASSAGE = 2000  # rows after which the next sure blank ends a passage
SURE = 0.9  # probability of a sure blank
LONGEST = 4  # a passage ends at this multiple of its length in any case


@dataclass(frozen=True)
class AlignedSymbol:
    """A symbol with the rows that an alignment gives it.

    symbol: its id.
    start_s, end_s: seconds at which its rows begin and end.
    rows: number of its rows.
    nats: sum of its log-probabilities over these rows.
    """

    symbol: int
    start_s: float
    end_s: float
    rows: int
    nats: float


def align(log_p_NV: Tensor, ids: Sequence[int], time_N: Tensor, step_s: float) -> list[AlignedSymbol]:
    """The likeliest rows of each symbol: CTC forced alignment by torchaudio (Graves et al. 2006, section 4.1, with max for sum).

    time_N: seconds at which each row begins; step_s: seconds of a row.

    Raises:
        StreamError: more symbols than the rows can hold.
    """
    check_shapes("align", log_p_NV=log_p_NV, time_N=time_N)
    if not ids:
        return []
    needed = len(ids) + sum(a == b for a, b in pairwise(ids))
    if needed > len(log_p_NV):
        raise StreamError(
            f"align: {len(ids)} symbols need {needed} rows (one each, one more between equal neighbours), but there are "
            f"{len(log_p_NV)}"
        )
    from torchaudio.functional import forced_align

    blank = log_p_NV.shape[-1] - 1
    path_BN, nats_BN = forced_align(
        log_p_NV.detach().float().cpu().contiguous()[None], torch.tensor([list(ids)], dtype=torch.int32), blank=blank
    )
    path, nats, times = path_BN[0].tolist(), nats_BN[0].tolist(), time_N.tolist()
    spoken, row = [], 0
    for symbol, run in groupby(path):
        count = len(list(run))
        if symbol != blank:
            end_s = times[row + count - 1] + step_s
            spoken.append(AlignedSymbol(symbol, times[row], end_s, count, sum(nats[row : row + count])))
        row += count
    return spoken


Edge = Literal["blank", "opens", "closes", "inside"]
"""Whether a symbol is a blank character, opens a word by one before it, closes a word by one after it, or does neither."""


class WordJoiner:
    """Joins symbols to words, which blank characters separate, for any tokenizer that writes text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._edges: dict[int, Edge] = {}

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids.

        Raises:
            ConfigError: the tokenizer decodes to something else than text.
        """
        if not ids:
            return ""
        value = self.tokenizer.decode(Tokens(torch.tensor(ids), self.tokenizer.places(len(ids))))
        if not isinstance(value, str):
            raise ConfigError(
                f"{type(self.tokenizer).__name__} writes {type(value).__name__}, not text; transcribe with a task that writes text"
            )
        return value

    def edge(self, symbol: int) -> Edge:
        """Where a symbol separates words, from its text when doubled: some tokenizers drop a blank character that comes first."""
        if symbol not in self._edges:
            alone, doubled = self.text([symbol]), self.text([symbol, symbol])
            parts = len(doubled.split())
            if parts == 0:
                edge: Edge = "inside" if not doubled else "blank"
            elif parts == 1:
                edge = "inside"
            else:
                edge = "closes" if alone[:1].strip() and not alone[-1:].strip() else "opens"
            self._edges[symbol] = edge
        return self._edges[symbol]

    def join(self, spoken: Sequence[AlignedSymbol], last: bool) -> tuple[list[Word], int]:
        """Words, and the number of symbols in them; without `last`, only words that something follows."""
        words: list[Word] = []
        open_word: list[AlignedSymbol] = []
        used = 0
        for at, symbol in enumerate(spoken):
            edge = self.edge(symbol.symbol)
            if edge in ("blank", "opens"):
                words += self._word(open_word)
                open_word, used = [], at
            if edge == "blank":
                used = at + 1
                continue
            open_word.append(symbol)
            if edge == "closes":
                words += self._word(open_word)
                open_word, used = [], at + 1
        if last:
            words += self._word(open_word)
            used = len(spoken)
        return words, used

    def _word(self, spoken: Sequence[AlignedSymbol]) -> list[Word]:
        text = self.text([s.symbol for s in spoken]).strip()
        if not text:
            return []
        # geometric mean of the probabilities of the word's rows
        sure = math.exp(sum(s.nats for s in spoken) / sum(s.rows for s in spoken))
        return [Word(text, spoken[0].start_s, spoken[-1].end_s, min(sure, 1.0))]


class WordDecoder:
    """Decodes the rows of one sound, which come in pieces, to words, each of which becomes final once.

    Rows are stored for one passage. A passage ends at a sure blank: the best text so far becomes final, the rows are dropped, and
    the search goes on from its state. So memory does not grow with the sound, and no row is lost or read twice.

    words: the final words so far.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, step_s: float, passage: int = PASSAGE) -> None:
        self.passage = passage
        self.search, self.joiner, self.step_s = decoder.search(), WordJoiner(tokenizer), step_s
        self.words: list[Word] = []
        self._rows: list[Tensor] = []
        self._times: list[Tensor] = []
        self._stored = 0  # rows of the passage
        self._before: list[AlignedSymbol] = []  # symbols of earlier passages whose last word may go on
        self._used = 0  # symbols of `_before` and of this passage that are in `words` already

    def push(self, log_p_NV: Tensor, time_N: Tensor) -> None:
        """Read log-probabilities of more rows, which begin at these seconds (float64)."""
        while len(log_p_NV):
            end = self._end(log_p_NV)
            self._rows.append(log_p_NV[:end])
            self._times.append(time_N[:end])
            self._stored += len(self._rows[-1])
            self.search.push(self._rows[-1])
            if end is not None:
                self._commit(last=False)
            log_p_NV, time_N = (log_p_NV[end:], time_N[end:]) if end is not None else (log_p_NV[:0], time_N[:0])

    def _end(self, log_p_NV: Tensor) -> int | None:
        """The number of these rows after which the passage ends; None: it goes on."""
        after = max(self.passage - self._stored, 0)
        # at a blank no symbol is open, so the search loses nothing there
        sure = (log_p_NV[after:, -1].exp() >= SURE).nonzero()
        if len(sure):
            return after + int(sure[0]) + 1
        longest = LONGEST * self.passage
        return max(longest - self._stored, 1) if self._stored + len(log_p_NV) >= longest else None

    def settle(self) -> None:
        """Make final the words that no later row can change."""
        settled = self.search.settled()
        if len(self._before) + settled > self._used:
            self._add_words(self._before + self._align(self.search.ids())[:settled], last=False)

    def finish(self) -> list[Word]:
        """The sound is over: make the rest final, and return all words."""
        self._commit(last=True)
        return self.words

    def guess(self) -> str:
        """The best text of what is not final yet."""
        ids = [s.symbol for s in self._before] + self.search.ids()
        return self.joiner.text(ids[self._used :]).strip()

    def _align(self, ids: list[int]) -> list[AlignedSymbol]:
        return align(torch.cat(self._rows), ids, torch.cat(self._times), self.step_s) if ids else []

    def _commit(self, last: bool) -> None:
        # a word may go on in the next passage, so its symbols stay aligned while their rows are dropped
        self._before += self._align(self.search.commit(last))
        self._add_words(self._before, last)
        self._before, self._used = self._before[self._used :], 0
        self._rows, self._times, self._stored = [], [], 0

    def _add_words(self, spoken: list[AlignedSymbol], last: bool) -> None:
        words, used = self.joiner.join(spoken[self._used :], last)
        self.words += words
        self._used += used
