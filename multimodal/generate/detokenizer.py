"""Incremental detokenization: whole characters only, and nothing that may yet turn out to be the start of a stop string."""

from collections.abc import Sequence

import torch

from multimodal.tokenizer import Tokenizer, Tokens

UNFINISHED = "\ufffd"  # what an incomplete character decodes to
LONGEST_CHARACTER = 4  # bytes
LOOK_BACK = 8  # tokens decoded again before new ones: more than an incomplete character has, and for pieces that join


class Detokenizer:
    """The text of one growing answer; each token is decoded a bounded number of times."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.start = 0  # the first token that is decoded again
        self.settled = ""  # the final part of what is decoded from there on
        self.held = ""  # final text that may be the start of a stop string, so that it is not returned yet
        self.text = ""  # all text returned so far
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Decode further tokens; returns the text that is final now. Afterwards `stopped` says whether a stop string came."""
        if self.stopped:
            return ""
        self.ids += ids
        now = self._decode()
        # some decoders drop a whole run of bytes until its last character is complete
        if not now.startswith(self.settled):
            return ""
        broken = len(now) - len(now.rstrip(UNFINISHED))  # bytes that may yet become one character, or stay broken
        final = now[: len(now) - min(broken, LONGEST_CHARACTER)]
        self.held += final[len(self.settled) :]
        self.settled = max(self.settled, final, key=len)
        if len(self.ids) - self.start >= 4 * LOOK_BACK:
            self._skip_settled(now)
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, self.held[: min(found)]
            return self._emit(len(self.held))
        return self._emit(len(self.held) - (self._possible_stop() if self.stops else 0))

    def _skip_settled(self, now: str) -> None:
        """Decode no more tokens than needed: start from the first token whose text is the end of the whole text."""
        held = len(self.ids) - self.start
        before = self.start
        for start in range(len(self.ids) - LOOK_BACK, len(self.ids) - 2 * LOOK_BACK, -1):
            self.start = start
            later = self._decode()
            left = len(now) - len(later)
            whole = not later.startswith(UNFINISHED) or held > 8 * LOOK_BACK  # so long a run is broken for good
            if whole and now.endswith(later) and left <= len(self.settled):
                self.settled = self.settled[left:]
                return
        self.start = before

    def finish(self) -> str:
        """Returns the remaining text, once nothing more will be written."""
        if not self.stopped:
            now = self._decode()
            self.held += now[len(self.settled) :] if now.startswith(self.settled) else UNFINISHED
            self.settled = now
        return self._emit(len(self.held))

    def _emit(self, count: int) -> str:
        """Returns the first `count` characters that are held."""
        new, self.held = self.held[:count], self.held[count:]
        self.text += new
        return new

    def _possible_stop(self) -> int:
        """Number of characters at the end that may be the start of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for count in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-count:]) for stop in self.stops):
                return count
        return 0

    def _decode(self) -> str:
        ids = torch.tensor(self.ids[self.start :], dtype=torch.long)
        return self.tokenizer.decode(Tokens(ids, self.tokenizer.places(len(ids)))) if len(ids) else ""
