"""Analogies between word vectors: "a is to b as c is to .." (Mikolov, Yih & Zweig 2013)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.look.embeddings import Ids, checked_ids, nearest, unit_rows


def analogy(table_VD: Tensor, a: Ids, b: Ids, c: Ids, *, k: int = 1) -> Tensor:
    """ "a is to b as c is to ..": the k rows nearest to b - a + c (N, k), or (k,) for single ids; a, b and c are excluded.

    3CosAdd: argmax_w cos(w, b - a + c) over rows scaled to length 1.

    Raises:
        ConfigError: ids outside the table, or k larger than the number of other rows.
    """
    ids = [checked_ids("analogy", given, table_VD) for given in (a, b, c)]
    unit_VD = unit_rows(table_VD)
    question_NK = torch.stack(torch.broadcast_tensors(*(i.reshape(-1) for i in ids)), -1)
    a_N, b_N, c_N = question_NK.unbind(-1)
    target_ND = unit_VD[b_N] - unit_VD[a_N] + unit_VD[c_N]
    best_NK, _ = nearest(unit_VD, F.normalize(target_ND, dim=-1), question_NK, k)
    return best_NK if any(i.dim() for i in ids) else best_NK[0]
