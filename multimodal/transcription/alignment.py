"""When each symbol was said: CTC forced alignment, and symbols gathered into words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor

from multimodal.shapes import ConfigError, StreamError, check_shapes
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal.transcription.transcript import Word


@dataclass(frozen=True)
class Spoken:
    """A symbol and its rows: from when to when, their number, and the sum of their log-probabilities in nats."""

    symbol: int
    start_s: float
    end_s: float
    rows: int
    nats: float


def align(log_p_NV: Tensor, ids: Sequence[int], time_N: Tensor, step_s: float) -> list[Spoken]:
    """The likeliest rows of each symbol (Graves et al. 2006, section 4.1, with max for sum), by torchaudio.

    time_N: when each row begins, in seconds; step_s: how long a row lasts.

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
            spoken.append(Spoken(symbol, times[row], end_s, count, sum(nats[row : row + count])))
        row += count
    return spoken


Edge = Literal["blank", "opens", "closes", "inside"]


class Speller:
    """Gathers symbols into words at blank characters, for any tokenizer that writes text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._edges: dict[int, Edge] = {}

    def text(self, ids: Sequence[int]) -> str:
        """What ids spell.

        Raises:
            ConfigError: no text.
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
        """How a symbol parts words. It is looked at doubled, because some decoders drop a blank character that comes first."""
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

    def gather(self, spoken: Sequence[Spoken], last: bool) -> tuple[list[Word], int]:
        """Words, and how many symbols they used; without `last`, only words that something follows."""
        words: list[Word] = []
        held: list[Spoken] = []
        used = 0
        for at, symbol in enumerate(spoken):
            edge = self.edge(symbol.symbol)
            if edge in ("blank", "opens"):
                words += self._word(held)
                held, used = [], at
            if edge == "blank":
                used = at + 1
                continue
            held.append(symbol)
            if edge == "closes":
                words += self._word(held)
                held, used = [], at + 1
        if last:
            words += self._word(held)
            used = len(spoken)
        return words, used

    def _word(self, spoken: Sequence[Spoken]) -> list[Word]:
        text = self.text([s.symbol for s in spoken]).strip()
        if not text:
            return []
        sure = math.exp(sum(s.nats for s in spoken) / sum(s.rows for s in spoken))
        return [Word(text, spoken[0].start_s, spoken[-1].end_s, min(sure, 1.0))]
