"""Beam search: the few likeliest beginnings of an answer are carried on together (Graves 2012; Wu et al. 2016 for the length)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_BEAMS = 1000  # each beam is a row of the cache, and more than some tens hardly find another answer


@dataclass
class Beams:
    """The hypotheses of one answer.

    A hypothesis that ends after n tokens, the stop counted, scores log p / n ** length_penalty. live and scores: ids and log p of
    those that go on. ended: (score, ids, log p, by itself) of the best that stopped; at the limit every hypothesis has to stop,
    and "by itself" says whether it would have liked to.
    """

    width: int
    length_penalty: float
    limit: int  # tokens, without the stop
    live: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    ended: list[tuple[float, list[int], float, bool]] = field(default_factory=list)

    def advance(self, log_p_BV: Tensor, stop: int) -> list[int]:
        """Extend every live hypothesis by what is likeliest; returns of each new one which old one it extends.

        log_p_BV has a row for each live hypothesis; -inf rules a token out.
        """
        natural = (log_p_BV.argmax(-1) == stop).tolist()
        at_limit = len(self.live[0]) >= self.limit
        total_BV = log_p_BV.double() + torch.tensor(self.scores, dtype=torch.float64)[:, None]
        if at_limit:
            total_BV[:, :stop] = float("-inf")
        count = min(2 * self.width, total_BV.numel())
        best, index = total_BV.flatten().topk(count)
        live, scores, parents = [], [], []
        for log_p, at in zip(best.tolist(), index.tolist(), strict=True):
            if log_p == float("-inf"):
                break
            parent, token = divmod(at, total_BV.shape[1])
            if token == stop:
                self._end(self.live[parent], log_p, natural[parent] or not at_limit)
            elif len(live) < self.width:
                live.append([*self.live[parent], token])
                scores.append(log_p)
                parents.append(parent)
        if live or self.ended:
            self.live, self.scores = live, scores
        return parents

    def _end(self, ids: list[int], log_p: float, natural: bool) -> None:
        self.ended.append((log_p / (len(ids) + 1) ** self.length_penalty, ids, log_p, natural))
        self.ended.sort(key=lambda item: -item[0])
        del self.ended[self.width :]

    @property
    def done(self) -> bool:
        """Whether no live hypothesis can become better than what has ended."""
        if not self.live:
            return True
        if len(self.ended) < self.width:
            return False
        lengths = (len(self.live[0]) + 1, self.limit + 1)
        reachable = max(s / n**self.length_penalty for s in self.scores for n in lengths)
        return reachable <= self.ended[-1][0]

    def found(self) -> list[tuple[list[int], float, bool]]:
        """(ids, log p, whether it ended by itself) from the best on; hypotheses that never ended count only where none did."""
        if self.ended:
            return [(ids, log_p, natural) for _, ids, log_p, natural in self.ended]
        ranked = sorted(zip(self.live, self.scores, strict=True), key=lambda item: -item[1])
        return [(ids, log_p, False) for ids, log_p in ranked]
