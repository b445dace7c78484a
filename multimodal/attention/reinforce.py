"""The score-function gradient for reads that choose one key: what cannot be differentiated is learned from its reward.

Williams 1992 (REINFORCE); for attention Xu et al. 2015, equations 11 and 12.
"""

import torch
from torch import Tensor

from multimodal.attention.mechanism import Trace
from multimodal.attention.reads import Hard, _Baseline
from multimodal.masks import Layout, MaskInfo


def reward_loss(trace: Trace, layout: Layout, nll_T: Tensor) -> Tensor:
    """What to add to a loss so that its gradient also reaches the choices in `trace`; its value means nothing.

    nll_T: minus the log-likelihood of what each row of the stream answers, 0 where it answers nothing. The reward of a choice is
    the log-likelihood of its sample from that row on (as far as its read looks `ahead`), less the moving average of it.
    """
    nll_T = nll_T.detach()
    totals = torch.tensor([span.total for span in layout.spans], device=nll_T.device)
    sample_T = torch.arange(len(totals), device=nll_T.device).repeat_interleave(totals)
    answers_T = (nll_T != 0).to(nll_T.dtype)
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
        reward_T, left_T = -_from_here_on(nll_T, end_T), _from_here_on(answers_T, end_T)
        row_BT, real_BT = _rows(seen.pairs.q, layout)
        advantage_BT = reward_T[row_BT] - baseline.mean * left_T[row_BT]
        paid_BT = real_BT & (left_T[row_BT] > 0)
        counts_BT = seen.choice.sampled[:, 0] * paid_BT
        loss = loss - read.weight * (counts_BT * advantage_BT)[:, None].mul(seen.choice.log_p_BHT).sum()
        loss = loss - read.entropy * (paid_BT[:, None] * seen.choice.entropy_BHT).sum()
        if bool(answers_T[row_BT][real_BT].any()):
            baseline.update(-nll_T[row_BT][real_BT].sum() / answers_T[row_BT][real_BT].sum())
    return loss


def _rows(q: MaskInfo, layout: Layout) -> tuple[Tensor, Tensor]:
    """Which row of the stream each query (B, T) is, and whether it is one: where a block is filled up its order is -1.

    A core that only writes counts from its own start, which is known by the field of its first token.
    """
    spans, places = layout.spans, layout.info
    sample_BT, order_BT, segment_BT = (x[..., 0].long() for x in (q.sample, q.order, q.segment))
    totals = torch.tensor([span.total for span in spans], device=order_BT.device)
    reads = torch.tensor([span.read for span in spans], device=order_BT.device)
    start_B = totals.cumsum(0) - totals
    first = order_BT == 0
    written = (
        places.segment[(start_B + reads).clamp(max=len(places.segment) - 1)][sample_BT[first]] == segment_BT[first]
    )
    offset_B = torch.zeros_like(reads)
    offset_B[sample_BT[first]] = reads[sample_BT[first]] * written
    return (start_B + offset_B)[sample_BT] + order_BT.clamp(min=0), order_BT >= 0


def _from_here_on(x_T: Tensor, end_T: Tensor) -> Tensor:
    """The sum of each row and those after it, up to row `end_T`."""
    sum_T = x_T.double().cumsum(0)
    return (sum_T[end_T] - sum_T + x_T).to(x_T.dtype)
