"""CTC prefix scores of next tokens, for beam search that ranks hypotheses of another task by both tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor

NEVER = float("-inf")
LEAST = -1e4  # nats; sums over rows stay finite


class CTCPrefixScores:
    """The CTC probability that the text begins with each hypothesis of a beam search (Watanabe et al. 2017, "Hybrid CTC/Attention
    Architecture for End-to-End Speech Recognition").

    The recursions over rows are sums in the log domain, so each is one `logcumsumexp` instead of a loop.

    log_p_NV: log-probabilities of the N rows in nats; the blank is the last class. B below is the number of hypotheses.
    """

    def __init__(self, log_p_NV: Tensor) -> None:
        log_p_NV = log_p_NV.detach().double().cpu().clamp(min=LEAST)
        self._log_p_VN, self._p_NV = log_p_NV[:, :-1].T, log_p_NV[:, :-1].exp()
        self._blank_N = log_p_NV[:, -1]
        # [hypothesis, n]: log p that the first n rows give this hypothesis, and row n is its last symbol, or a blank
        self._symbol_BN = torch.full((1, len(log_p_NV) + 1), NEVER, dtype=torch.float64)
        self._ended_BN = _after(self._blank_N.new_zeros(1, 1), self._blank_N.cumsum(0)[None])
        self._last_B = torch.tensor([-1])
        self._prefix_B = torch.zeros(1, dtype=torch.float64)  # log p of all texts that begin with the hypothesis

    def next_nats(self, choices: int, stop: int) -> Tensor:
        """(B, choices): log p(hypothesis + symbol) - log p(hypothesis), in nats; at `stop`: the text ends with the hypothesis."""
        nats_BV = torch.full((len(self._last_B), choices), NEVER, dtype=torch.float64)
        either_BN = torch.logaddexp(self._symbol_BN, self._ended_BN)
        before_BN = either_BN[:, :-1]
        if before_BN.shape[1]:
            # sum over rows of p(hypothesis before the row) * p(symbol at the row), as one matrix product
            most_B1 = before_BN.amax(1, keepdim=True).clamp(min=LEAST * before_BN.shape[1])
            mass_BV = (before_BN - most_B1).exp() @ self._p_NV
            count = min(mass_BV.shape[1], choices)
            nats_BV[:, :count] = (mass_BV.log() + most_B1)[:, :count]
            (again,) = (self._last_B >= 0).nonzero(as_tuple=True)
            # a repeated symbol must follow a blank
            last = self._last_B[again]
            nats_BV[again, last] = (self._ended_BN[again, :-1] + self._log_p_VN[last]).logsumexp(1)
        nats_BV[:, stop] = either_BN[:, -1]
        # a hypothesis that no path gives has no next symbol
        return (nats_BV - self._prefix_B[:, None]).masked_fill(self._prefix_B[:, None] == NEVER, NEVER)

    def extend(self, parents: Sequence[int], symbols: Sequence[int]) -> None:
        """Replace the hypotheses: new hypothesis i is hypothesis parents[i] followed by symbols[i]."""
        parent_B, symbol_B = torch.tensor(parents), torch.tensor(symbols)
        log_p_BN, blank_N = self._log_p_VN[symbol_B], self._blank_N
        repeats_B1 = (self._last_B[parent_B] == symbol_B)[:, None]
        before_BN = torch.logaddexp(self._ended_BN[parent_B], self._symbol_BN[parent_B].masked_fill(repeats_B1, NEVER))[
            :, :-1
        ]
        none_B1 = before_BN.new_full((len(symbol_B), 1), NEVER)
        begins_BN = before_BN + log_p_BN
        # s(n) = (s(n - 1) + before(n - 1)) p(n); divided by the product p(1) .. p(n), it is a cumulative sum
        path_BN = log_p_BN.cumsum(1)
        self._symbol_BN = _after(none_B1, path_BN + (begins_BN - path_BN).logcumsumexp(1))
        path_N = blank_N.cumsum(0)
        self._ended_BN = _after(none_B1, path_N + (self._symbol_BN[:, :-1] + blank_N - path_N).logcumsumexp(1))
        self._last_B = symbol_B
        self._prefix_B = begins_BN.logsumexp(1) if begins_BN.shape[1] else none_B1[:, 0]


def _after(first_B1: Tensor, rest_BN: Tensor) -> Tensor:
    return torch.cat([first_B1, rest_BN], 1)
