"""What lies where in a table of embeddings: analogies, nearest neighbours, and how close to orthogonal many directions can be."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.shapes import ConfigError, check_shapes

CHUNK = 4096  # rows compared at a time

Ids = Sequence[int] | Tensor | int


def analogy(table_VD: Tensor, a: Ids, b: Ids, c: Ids, *, k: int = 1) -> Tensor:
    """ "a is to b as c is to ..": the k rows nearest to b - a + c (N, k), or (k,) for single ids; a, b and c themselves are out.

    3CosAdd (Mikolov, Yih & Zweig 2013): argmax_w cos(w, b - a + c) of rows brought to length 1.

    Raises:
        ConfigError: ids outside the table, or more answers wanted than it has left.
    """
    ids = [_ids("analogy", given, table_VD) for given in (a, b, c)]
    one_VD = _unit(table_VD)
    question_NK = torch.stack(torch.broadcast_tensors(*(i.reshape(-1) for i in ids)), -1)
    a_N, b_N, c_N = question_NK.unbind(-1)
    target_ND = one_VD[b_N] - one_VD[a_N] + one_VD[c_N]
    best_NK, _ = _nearest(one_VD, F.normalize(target_ND, dim=-1), question_NK, k)
    return best_NK if any(i.dim() for i in ids) else best_NK[0]


def neighbours(table_VD: Tensor, ids: Ids, k: int = 5) -> tuple[Tensor, Tensor]:
    """The k rows with the largest cosine to each of `ids`, without itself: their ids (N, k) and cosines (N, k)."""
    id_N = _ids("neighbours", ids, table_VD).reshape(-1)
    one_VD = _unit(table_VD)
    return _nearest(one_VD, one_VD[id_N], id_N[:, None], k)


def neighbour_table(table_VD: Tensor, ids: Sequence[int], names: Sequence[str], k: int = 5) -> str:
    """`neighbours` in lines for people: the word, then its neighbours with their cosines."""
    found, cosines = neighbours(table_VD, ids, k)
    lines = []
    for word, row, cos in zip(ids, found.tolist(), cosines.tolist(), strict=True):
        lines.append(f"{names[word]:<16}" + "  ".join(f"{names[i]} {c:.2f}" for i, c in zip(row, cos, strict=True)))
    return "\n".join(lines)


def angles(table_VD: Tensor) -> tuple[float, float]:
    """The smallest and the largest angle between any two rows, in degrees."""
    check_shapes("angles", table_VD=table_VD)
    if len(table_VD) < 2:
        raise ConfigError("angles: wanted two rows or more")
    one_VD = _unit(table_VD)
    least, most = 1.0, -1.0
    for start in range(0, len(one_VD), CHUNK):
        part = one_VD[start : start + CHUNK]
        cos = part @ one_VD[start:].T
        own = torch.arange(len(part))
        cos[own, own] = math.nan
        least = min(least, float(cos.nan_to_num(2.0).min()))
        most = max(most, float(cos.nan_to_num(-2.0).max()))
    return math.degrees(math.acos(min(most, 1.0))), math.degrees(math.acos(max(least, -1.0)))


def welch_bound(count: int, width: int) -> float:
    """No `count` directions of `width` dimensions all have a smaller |cos| than this: sqrt((n - d) / (d (n - 1))), Welch 1974."""
    return math.sqrt(max(count - width, 0) / (width * (count - 1)))


def near_orthogonal(width: int, cosine: float, *, seed: int = 0, most: int = 1_000_000) -> int:
    """How many random directions can be drawn before two of them have |cos| above `cosine`.

    A birthday problem: two collide with a chance of about exp(-cosine^2 width / 2), so the number grows as
    exp(cosine^2 width / 4), a lower bound of what can be packed (Johnson & Lindenstrauss 1984).

    Raises:
        ConfigError: `most` were drawn and no two collided.
    """
    if not 0 < cosine < 1 or width < 2:
        raise ConfigError(f"near_orthogonal: cosine={cosine} must lie between 0 and 1, and width={width} be at least 2")
    generator = torch.Generator().manual_seed(seed)
    kept_VD, step = torch.empty(0, width), 16
    while len(kept_VD) < most:
        new_VD = F.normalize(torch.randn(step, width, generator=generator), dim=-1)
        kept_VD = torch.cat([kept_VD, new_VD])
        high = (new_VD @ kept_VD.T).abs_() > cosine
        earlier = torch.arange(len(kept_VD)) < torch.arange(len(kept_VD) - step, len(kept_VD))[:, None]
        collides = (high & earlier).any(-1)
        if bool(collides.any()):
            return len(kept_VD) - step + int(collides.nonzero()[0, 0])
        step = min(max(16, len(kept_VD) // 4), 1024)
    raise ConfigError(
        f"near_orthogonal: {most} directions of width={width} stayed within |cos| <= {cosine}; lower cosine"
    )


def _unit(table_VD: Tensor) -> Tensor:
    return F.normalize(table_VD.detach().float(), dim=-1)


def _ids(where: str, given: Ids, table_VD: Tensor) -> Tensor:
    check_shapes(where, table_VD=table_VD)
    ids = torch.as_tensor(given, dtype=torch.long, device=table_VD.device)
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= len(table_VD):
        raise ConfigError(f"{where}: ids {ids.tolist()} do not all lie in 0..{len(table_VD) - 1}")
    return ids


def _nearest(one_VD: Tensor, query_ND: Tensor, without_NK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and cosines (N, k) of the rows nearest to each query, but for those of `without_NK`."""
    left = len(one_VD) - without_NK.shape[1]
    if not 1 <= k <= left:
        raise ConfigError(f"k={k} must lie in 1..{left}: the table has {len(one_VD)} rows, and those asked for are out")
    ids, cosines = [], []
    for start in range(0, len(query_ND), CHUNK):
        cos_NV = query_ND[start : start + CHUNK] @ one_VD.T
        cos_NV.scatter_(1, without_NK[start : start + CHUNK], -math.inf)
        best = cos_NV.topk(k, dim=-1)
        ids.append(best.indices)
        cosines.append(best.values)
    return torch.cat(ids), torch.cat(cosines)
