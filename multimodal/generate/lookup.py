"""Guesses of an answer's next tokens, from what was read and written: what followed the newest tokens before may follow again.

The core reads the guesses in the same pass as the newest token, and those are kept that would have been chosen anyway (speculative
decoding, Leviathan et al. 2023; guesses by lookup, Saxena 2023). A pass for some tokens reads the weights once, as one for a token.
"""

from collections.abc import Iterable

SIZES = (3, 2)  # numbers of tokens that are looked up; the longest that occurred counts


class Lookup:
    """Where each sequence of tokens occurred last.

    ids: what was read.
    most: the most tokens of a guess.
    """

    def __init__(self, ids: Iterable[int], most: int) -> None:
        self.ids: list[int] = []
        self.most = self.count = most
        self._next: dict[tuple[int, ...], int] = {}  # the index of the token that follows
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """One more token was written."""
        for size in SIZES:
            if len(self.ids) >= size:
                self._next[tuple(self.ids[-size:])] = len(self.ids)
        self.ids.append(token)

    def guess(self, room: int) -> list[int]:
        """At most `room` tokens that may come next; none if the newest tokens are new."""
        found: list[int] = []
        starts = (self._next.get(tuple(self.ids[-size:])) for size in SIZES)
        start = next((start for start in starts if start is not None), None)
        if start is not None:
            for i in range(start, start + min(self.count, room)):
                # a guess that reaches the end goes on with itself
                found.append(self.ids[i] if i < len(self.ids) else found[i - len(self.ids)])
        return found

    def learn(self, guessed: int, right: int) -> None:
        """Guess more tokens if all were right, else fewer: wrong ones cost time."""
        self.count = min(self.most, 2 * self.count) if right == guessed else max(1, right + 1)
