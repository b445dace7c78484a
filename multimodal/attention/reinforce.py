"""REINFORCE (Williams 1992) for reads that sample one key, whose choice has no gradient: Xu et al. 2015, equations 11 and 12."""

import torch
from torch import Tensor

from multimodal.attention.mechanism import Trace
from multimodal.attention.reads import Hard, _Baseline
from multimodal.masks import Layout, MaskInfo


def reward_loss(trace: Trace, layout: Layout, nll_T: Tensor) -> Tensor:
    """A term whose gradient is the score-function gradient of the choices in `trace`; add it to the loss. Its value has no meaning.

    The reward of a choice is the log-likelihood of the targets of its sample from its row on (at most `Hard.ahead` rows), minus
    the moving average of it. Each call also updates this average.

    nll_T: the negative log-likelihood of the target of each row of the stream; 0 for rows without a target.
    """
    nll_T = nll_T.detach()
    totals = torch.tensor([span.total for span in layout.spans], device=nll_T.device)
    sample_T = torch.arange(len(totals), device=nll_T.device).repeat_interleave(totals)
    has_target_T = (nll_T != 0).to(nll_T.dtype)
    loss = nll_T.new_zeros(())
    for seen in trace.seen:
        if seen.choice is None or seen.mechanism is None:
            continue
        read, baseline = seen.mechanism.read, seen.mechanism.read_weights
        assert isinstance(read, Hard)
        assert isinstance(baseline, _Baseline)
        end_T = (totals.cumsum(0) - 1)[sample_T]
        if read.ahead is not None:
            end_T = torch.minimum(end_T, torch.arange(len(end_T), device=end_T.device) + read.ahead - 1)
        reward_T, targets_T = -_sum_to_end(nll_T, end_T), _sum_to_end(has_target_T, end_T)
        row_BT, real_BT = _rows(seen.pairs.q, layout)
        # the baseline is that of one target, and a reward sums over several
        advantage_BT = reward_T[row_BT] - baseline.mean * targets_T[row_BT]
        rewarded_BT = real_BT & (targets_T[row_BT] > 0)
        sampled_BT = seen.choice.sampled[:, 0] * rewarded_BT
        loss = loss - read.weight * (sampled_BT * advantage_BT)[:, None].mul(seen.choice.log_p_BHT).sum()
        loss = loss - read.entropy * (rewarded_BT[:, None] * seen.choice.entropy_BHT).sum()
        if bool(has_target_T[row_BT][real_BT].any()):
            baseline.update(-nll_T[row_BT][real_BT].sum() / has_target_T[row_BT][real_BT].sum())
    return loss


def _rows(q: MaskInfo, layout: Layout) -> tuple[Tensor, Tensor]:
    """(the row of the stream that each query (B, T) is, whether it is one and not padding of a block, whose order is -1).

    The writer of an encoder-decoder numbers its tokens from its own start; it is recognised by the segment of its first token.
    """
    spans, info = layout.spans, layout.info
    sample_BT, order_BT, segment_BT = (x[..., 0].long() for x in (q.sample, q.order, q.segment))
    totals = torch.tensor([span.total for span in spans], device=order_BT.device)
    reads = torch.tensor([span.read for span in spans], device=order_BT.device)
    start_B = totals.cumsum(0) - totals
    first = order_BT == 0
    written = info.segment[(start_B + reads).clamp(max=len(info.segment) - 1)][sample_BT[first]] == segment_BT[first]
    offset_B = torch.zeros_like(reads)
    offset_B[sample_BT[first]] = reads[sample_BT[first]] * written
    return (start_B + offset_B)[sample_BT] + order_BT.clamp(min=0), order_BT >= 0


def _sum_to_end(x_T: Tensor, end_T: Tensor) -> Tensor:
    """For each row, the sum of it and the rows after it, up to and with row `end_T`; by differences of one cumulative sum."""
    sum_T = x_T.double().cumsum(0)
    return (sum_T[end_T] - sum_T + x_T).to(x_T.dtype)
