"""Geometry of an embedding table: nearest neighbours, angles between rows, and how many directions are nearly orthogonal."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.shapes import ConfigError, check_shapes

CHUNK = 4096  # rows compared at a time, which bounds the memory of the table of cosines

Ids = Sequence[int] | Tensor | int


def neighbours(table_VD: Tensor, ids: Ids, k: int = 5) -> tuple[Tensor, Tensor]:
    """The k rows with the largest cosine to each of `ids`, itself excluded: their ids (N, k) and cosines (N, k).

    Raises:
        ConfigError: ids outside the table, or k larger than the number of other rows.
    """
    id_N = checked_ids("neighbours", ids, table_VD).reshape(-1)
    unit_VD = unit_rows(table_VD)
    return nearest(unit_VD, unit_VD[id_N], id_N[:, None], k)


def neighbour_table(table_VD: Tensor, ids: Sequence[int], names: Sequence[str], k: int = 5) -> str:
    """`neighbours` as text, a line for each id: its name, then the names of its neighbours with their cosines."""
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
    unit_VD = unit_rows(table_VD)
    least, most = 1.0, -1.0
    for start in range(0, len(unit_VD), CHUNK):
        part = unit_VD[start : start + CHUNK]
        cos = part @ unit_VD[start:].T
        own = torch.arange(len(part))  # a row has no angle with itself
        cos[own, own] = math.nan
        least = min(least, float(cos.nan_to_num(2.0).min()))
        most = max(most, float(cos.nan_to_num(-2.0).max()))
    return math.degrees(math.acos(min(most, 1.0))), math.degrees(math.acos(max(least, -1.0)))


def welch_bound(count: int, width: int) -> float:
    """The least possible maximum of |cos| among `count` directions of `width` dimensions (Welch 1974).

    sqrt((n - d) / (d (n - 1))) for n directions of d dimensions.
    """
    return math.sqrt(max(count - width, 0) / (width * (count - 1)))


def near_orthogonal(width: int, cosine: float, *, seed: int = 0, most: int = 1_000_000) -> int:
    """The number of random directions drawn before two of them have |cos| above `cosine`.

    A birthday problem: two collide with probability of about exp(-cosine^2 width / 2), so the number grows as
    exp(cosine^2 width / 4), a lower bound of how many fit (Johnson & Lindenstrauss 1984).

    Raises:
        ConfigError: `most` were drawn and no two collided, or cosine or width is out of range.
    """
    if not 0 < cosine < 1 or width < 2:
        raise ConfigError(f"near_orthogonal: cosine={cosine} must lie between 0 and 1, and width={width} be at least 2")
    generator = torch.Generator().manual_seed(seed)
    drawn_VD, step = torch.empty(0, width), 16
    while len(drawn_VD) < most:
        new_VD = F.normalize(torch.randn(step, width, generator=generator), dim=-1)
        drawn_VD = torch.cat([drawn_VD, new_VD])
        high = (new_VD @ drawn_VD.T).abs_() > cosine
        earlier = torch.arange(len(drawn_VD)) < torch.arange(len(drawn_VD) - step, len(drawn_VD))[:, None]
        collides = (high & earlier).any(-1)
        if bool(collides.any()):
            return len(drawn_VD) - step + int(collides.nonzero()[0, 0])
        step = min(max(16, len(drawn_VD) // 4), 1024)
    raise ConfigError(
        f"near_orthogonal: {most} directions of width={width} stayed within |cos| <= {cosine}; lower cosine"
    )


def unit_rows(table_VD: Tensor) -> Tensor:
    """The rows as float32, scaled to length 1."""
    return F.normalize(table_VD.detach().float(), dim=-1)


def checked_ids(where: str, given: Ids, table_VD: Tensor) -> Tensor:
    """`given` as a tensor of ids on the table's device; a ConfigError unless all are rows of the table."""
    check_shapes(where, table_VD=table_VD)
    ids = torch.as_tensor(given, dtype=torch.long, device=table_VD.device)
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= len(table_VD):
        raise ConfigError(f"{where}: ids {ids.tolist()} do not all lie in 0..{len(table_VD) - 1}")
    return ids


def nearest(unit_VD: Tensor, query_ND: Tensor, without_NK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and cosines (N, k) of the rows nearest to each query; the ids in `without_NK` are excluded."""
    left = len(unit_VD) - without_NK.shape[1]
    if not 1 <= k <= left:
        raise ConfigError(
            f"k={k} must lie in 1..{left}: the table has {len(unit_VD)} rows, and those asked for are out"
        )
    ids, cosines = [], []
    for start in range(0, len(query_ND), CHUNK):
        cos_NV = query_ND[start : start + CHUNK] @ unit_VD.T
        cos_NV.scatter_(1, without_NK[start : start + CHUNK], -math.inf)
        best = cos_NV.topk(k, dim=-1)
        ids.append(best.indices)
        cosines.append(best.values)
    return torch.cat(ids), torch.cat(cosines)
