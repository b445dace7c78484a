"""Context parallel: several processes share one stream; each has some rows of it, and for attention some heads of all rows.

rows of this process --all-to-all--> its heads of all rows --plan--> --all-to-all--> rows of this process

Ulysses (Jacobs et al. 2023, arXiv 2309.14509). A plan sees whole samples, so that every mask rule and kernel is right as it is.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multimodal.attention.mechanism import Mechanism, Plan


class StreamShare:
    """The processes that share a stream, by their group, and which rows of it this one has.

    The rows are as many in each process, or one more in the first ones.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.count = group, dist.get_rank(group), dist.get_world_size(group)

    def sizes(self, total: int) -> list[int]:
        """The number of rows in each process, of a stream of `total` tokens."""
        return [total // self.count + (rank < total % self.count) for rank in range(self.count)]

    def rows(self, total: int) -> slice:
        """The rows of this process."""
        sizes = self.sizes(total)
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def plan(self, plan: Plan, total: int) -> Plan:
        """A plan for the rows of this process, from that of the whole stream."""
        return _ExchangedPlan(plan, self, self.sizes(total))

    def join(self, state_TD: Tensor, total: int) -> Tensor:
        """The states of the whole stream, in each process.

        All compute the same loss from them, so that the gradient of a row is the sum over processes of equal ones.
        """
        return _JoinRows.apply(state_TD, self, self.sizes(total))  # type: ignore[return-value]


class _ExchangedPlan(Plan):
    def __init__(self, plan: Plan, share: StreamShare, sizes: list[int]) -> None:
        self.whole, self.share, self.sizes = plan, share, sizes

    def attend(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, mechanism: Mechanism, layer: int) -> Tensor:
        count, rank, group = self.share.count, self.share.rank, self.share.group
        own, total = self.sizes[rank], sum(self.sizes)
        # queries, keys and values travel together: (rows, processes, features) -> process after process
        sent = torch.cat([x.reshape(own, count, x[0:1].numel() // count) for x in (q_THK, k_TGK, v_TGK)], -1)
        rows_TF = _exchange(sent.movedim(1, 0).flatten(0, 1), [own] * count, self.sizes, group)
        parts = rows_TF.split([x[0:1].numel() // count for x in (q_THK, k_TGK, v_TGK)], -1)
        q, k, v = (part.reshape(total, -1, x.shape[-1]) for part, x in zip(parts, (q_THK, k_TGK, v_TGK), strict=True))
        read_THK = self.whole.attend(q, k, v, mechanism, layer)
        back = _exchange(read_THK.flatten(1), self.sizes, [own] * count, group)
        return back.unflatten(0, (count, own)).movedim(0, 1).reshape(own, q_THK.shape[1], v_TGK.shape[-1])


def _exchange(rows_NF: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send so many rows to each process, and return the rows that come from each."""
    return _Exchange.apply(rows_NF, sent, received, group)  # type: ignore[return-value]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NF: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.options = received, sent, group
        found = rows_NF.new_empty(sum(received), rows_NF.shape[1])
        dist.all_to_all_single(found, rows_NF.contiguous(), received, sent, group)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _exchange(grads[0], *ctx.options), None, None, None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, share: StreamShare, sizes: list[int]) -> Tensor:
        ctx.rows, ctx.count = share.rows(sum(sizes)), share.count
        return gather_rows(rows_ND, sizes, share.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # the gradients of all processes are equal, so that their sum needs no message
        return grads[0][ctx.rows] * ctx.count, None, None


def gather_rows(rows_NF: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes of a group end to end, without gradients. sizes: the number of rows in each."""
    most = max(sizes)
    # all processes send equally many
    padded = torch.cat([rows_NF, rows_NF.new_zeros(most - len(rows_NF), *rows_NF.shape[1:])]).contiguous()
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group)
    return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided among several; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
