"""Rows of CTC logits in, words with times out, for sounds of any length."""

import torch
from torch import Tensor

from multimodal.tokenizer import Tokenizer
from multimodal.transcription.alignment import Speller, Spoken, align
from multimodal.transcription.ctc import Decoder
from multimodal.transcription.transcript import Word

PASSAGE = 2000  # rows after which the next sure blank ends a passage
SURE = 0.9  # probability of a sure blank
LONGEST = 4  # times as long, a passage ends in any case


class Reader:
    """Decodes one sound, whatever pieces its rows come in, and tells each word once.

    Rows are kept only for a passage: it ends at a sure blank, where the best text so far is taken for good, the search goes on
    from its state, and the rows are forgotten. So memory does not grow with the sound, and nothing is lost or read twice.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, step_s: float, passage: int = PASSAGE) -> None:
        self.passage = passage
        self.search, self.speller, self.step_s = decoder.search(), Speller(tokenizer), step_s
        self.words: list[Word] = []
        self._rows: list[Tensor] = []
        self._times: list[Tensor] = []
        self._held = 0  # rows of the passage
        self._before: list[Spoken] = []  # symbols of earlier passages that are not all told
        self._told = 0  # symbols of `_before` and this passage that are in `words` already

    def push(self, log_p_NV: Tensor, time_N: Tensor) -> None:
        """Read rows, which begin at these times in seconds (float64)."""
        while len(log_p_NV):
            end = self._end(log_p_NV)
            self._rows.append(log_p_NV[:end])
            self._times.append(time_N[:end])
            self._held += len(self._rows[-1])
            self.search.push(self._rows[-1])
            if end is not None:
                self._commit(last=False)
            log_p_NV, time_N = (log_p_NV[end:], time_N[end:]) if end is not None else (log_p_NV[:0], time_N[:0])

    def _end(self, log_p_NV: Tensor) -> int | None:
        """After how many of these rows the passage ends, if it does."""
        after = max(self.passage - self._held, 0)
        sure = (log_p_NV[after:, -1].exp() >= SURE).nonzero()
        if len(sure):
            return after + int(sure[0]) + 1
        longest = LONGEST * self.passage
        return max(longest - self._held, 1) if self._held + len(log_p_NV) >= longest else None

    def settle(self) -> None:
        """Tell the words that no later row can change."""
        settled = self.search.settled()
        if len(self._before) + settled > self._told:
            self._tell(self._before + self._align(self.search.ids())[:settled], last=False)

    def finish(self) -> list[Word]:
        """Tell the rest, and give all words."""
        self._commit(last=True)
        return self.words

    def guess(self) -> str:
        """The text not yet told, as it looks now."""
        ids = [s.symbol for s in self._before] + self.search.ids()
        return self.speller.text(ids[self._told :]).strip()

    def _align(self, ids: list[int]) -> list[Spoken]:
        return align(torch.cat(self._rows), ids, torch.cat(self._times), self.step_s) if ids else []

    def _commit(self, last: bool) -> None:
        self._before += self._align(self.search.commit(last))
        self._tell(self._before, last)
        self._before, self._told = self._before[self._told :], 0
        self._rows, self._times, self._held = [], [], 0

    def _tell(self, spoken: list[Spoken], last: bool) -> None:
        words, used = self.speller.gather(spoken[self._told :], last)
        self.words += words
        self._told += used
