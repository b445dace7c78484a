"""Beam search (Graves 2012), with the length normalisation of log p / n ** length_penalty (after Wu et al. 2016)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_BEAMS = 1000  # each beam is a row of the KV cache, and more than some tens hardly ever find a better answer
MOST_LENGTH_PENALTY = 10  # or its negative; powers of lengths stay far below what a float holds


@dataclass
class Beams:
    """The hypotheses of one answer. One that has n tokens, including the stop, scores log p / n ** length_penalty.

    width: number of hypotheses.
    length_penalty: exponent of the number of tokens in the score.
    limit: the most tokens of a hypothesis, without the stop.
    live: the ids of the hypotheses that have not ended, all of one length.
    scores: their log p, in nats.
    ended: (score, ids, log p, natural) of the best that ended, best first; natural: the stop was its most probable token, or it
        ended before the limit.
    """

    width: int
    length_penalty: float
    limit: int
    live: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    ended: list[tuple[float, list[int], float, bool]] = field(default_factory=list)

    def advance(self, log_p_BV: Tensor, stop: int) -> list[int]:
        """Extend the live hypotheses by their most probable tokens, and return for each new one the index of the one it extends.

        log_p_BV: log-probabilities of the next token, with a row for each live hypothesis; -inf rules a token out.
        stop: the id that ends a hypothesis.
        """
        natural = (log_p_BV.argmax(-1) == stop).tolist()
        at_limit = len(self.live[0]) >= self.limit
        total_BV = log_p_BV.double() + torch.tensor(self.scores, dtype=torch.float64)[:, None]
        if at_limit:
            total_BV[:, :stop] = total_BV[:, stop + 1 :] = float("-inf")
        # twice the width, because up to `width` of the best extensions may be stops
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
        if live or self.ended:  # else every token was ruled out, and the old hypotheses stay as the answer
            self.live, self.scores = live, scores
        return parents

    def _end(self, ids: list[int], log_p: float, natural: bool) -> None:
        self.ended.append((log_p / (len(ids) + 1) ** self.length_penalty, ids, log_p, natural))
        self.ended.sort(key=lambda item: -item[0])
        del self.ended[self.width :]

    @property
    def done(self) -> bool:
        """Whether no live hypothesis can score better than those that ended."""
        if not self.live:
            return True
        if len(self.ended) < self.width:
            return False
        # log p only falls, and the divisor is monotonic in n, so that the best score is at one of the extreme lengths
        lengths = (len(self.live[0]) + 1, self.limit + 1)
        reachable = max(s / n**self.length_penalty for s in self.scores for n in lengths)
        return reachable <= self.ended[-1][0]

    def found(self) -> list[tuple[list[int], float, bool]]:
        """(ids, log p, natural) of each hypothesis, best first: of those that ended, or, if none did, of the live ones."""
        if self.ended:
            return [(ids, log_p, natural) for _, ids, log_p, natural in self.ended]
        ranked = sorted(zip(self.live, self.scores, strict=True), key=lambda item: -item[1])
        return [(ids, log_p, False) for ids, log_p in ranked]
