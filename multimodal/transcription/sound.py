"""Sounds that come block by block, cut into pieces that a model can read."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A part of a sound: its samples, where they start (samples), and the rows of it that count, first to stop.

    last: the sound ends with it; total: samples that the whole sound promises to have.
    """

    wave_S: Tensor
    start: int
    first: int
    stop: int | None
    last: bool
    total: int


def overlapping(blocks: Iterator[tuple[Tensor, int]], *, window: int, overlap: int, unit: int) -> Iterator[Piece]:
    """Windows of `window` tokens that share `overlap` with their neighbours; a token is `unit` samples.

    The rows that count meet in the middle of each overlap.
    """
    half, first, start = overlap // 2, 0, 0
    held, total = torch.empty(0), 0
    for block_S, total in blocks:
        held = torch.cat([held, block_S])
        while len(held) > window * unit:
            yield Piece(held[: window * unit].clone(), start, first, window - overlap + half, False, total)
            start += (window - overlap) * unit
            held, first = held[(window - overlap) * unit :], half
    if len(held):
        yield Piece(held, start, first, None, True, total)


def at_quiet_places(blocks: Iterator[tuple[Tensor, int]], *, window: int, search: int, unit: int) -> Iterator[Piece]:
    """Pieces of at most `window` tokens end to end, each ending at the quietest of the last `search` tokens of its window."""
    start = 0
    held, total = torch.empty(0), 0
    for block_S, total in blocks:
        held = torch.cat([held, block_S])
        while len(held) > window * unit:
            zone_NS = held[(window - search) * unit : window * unit].view(search, unit)
            energy_N = zone_NS.square().mean(1)
            around_N = torch.nn.functional.avg_pool1d(energy_N[None], 5, 1, 2, count_include_pad=False)[0]
            quiet = int((around_N + 1e-3 * energy_N).argmin())
            end = max(window - search + quiet, 1) * unit
            yield Piece(held[:end].clone(), start, 0, None, False, total)
            start += end
            held = held[end:]
    if len(held):
        yield Piece(held, start, 0, None, True, total)
