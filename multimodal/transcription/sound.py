"""Sounds of any length, block by block at one rate, and cut into pieces that a model can read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.media import CUT_SHORT, STREAMED, file_source, is_file_like, read_sound, resampled
from multimodal.shapes import MediaError

BLOCK_S = 10.0  # seconds of a file that are read at once


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


def sound_blocks(value: Any, *, rate_hz: int, who: str) -> Iterator[tuple[Tensor, int]]:
    """(one channel (S,) of float32 at `rate_hz`, samples the whole will have), block after block.

    value: whatever `media.read_sound` takes. Files are never held whole; end to end, the blocks are what it would give.

    Raises:
        MediaError: as `media.read_sound`.
    """
    if not is_file_like(value):
        wave_S = read_sound(value, rate_hz=rate_hz, who=who)
        yield wave_S, len(wave_S)
        return
    import soundfile

    source, name = file_source(value, who)
    try:
        file = soundfile.SoundFile(source)
    except Exception as error:  # decoders fail in many ways on damaged files
        raise MediaError(f"{who}: cannot read {name} as sound: {error}") from error
    with file:
        rate, promised = file.samplerate, file.frames
        cut = CUT_SHORT.search(file.extra_info)
        if cut and not int(cut[1]) >= STREAMED and int(cut[2]) < int(cut[1]):
            raise MediaError(
                f"{who}: {name} holds {cut[2]} bytes of the {cut[1]} that its header promises; it was cut short"
            )
        if promised == 0:
            raise MediaError(f"{who}: {name} has no samples")
        total = math.ceil(promised * rate_hz / rate)
        raw = _file_blocks(file, rate, name, who)
        for wave_S in raw if rate == rate_hz else _resampled_blocks(raw, rate, rate_hz, who):
            yield wave_S, total


def _file_blocks(file: Any, rate: int, name: str, who: str) -> Iterator[Tensor]:
    came = 0
    while True:
        try:
            wave = file.read(round(BLOCK_S * rate), dtype="float32", always_2d=True)
        except Exception as error:
            raise MediaError(f"{who}: cannot read {name} as sound: {error}") from error
        if len(wave) == 0:
            break
        came += len(wave)
        if not np.isfinite(wave).all():
            raise MediaError(f"{who}: {name} has samples that are not finite (NaN or infinity)")
        yield torch.from_numpy(wave.mean(1))
    if came < file.frames:
        raise MediaError(
            f"{who}: {name} holds {came} samples of the {file.frames} that its header promises; it was cut short"
        )


def _resampled_blocks(raw: Iterator[Tensor], rate: int, rate_hz: int, who: str) -> Iterator[Tensor]:
    """Resample with enough of the neighbouring blocks that the seams cannot be told."""
    common = math.gcd(rate, rate_hz)
    old, new = rate // common, rate_hz // common
    # torchaudio's filter reaches 6 / 0.99 periods of the lower rate to both sides; whole groups of `old` keep its phase
    context = old * math.ceil((7 * max(1, old / new) + old) / old)
    held, done = torch.empty(0), 0  # done: samples of `held` that were given out and serve as context
    for block_S in raw:
        held = torch.cat([held, block_S])
        ready = (len(held) - done - context) // old * old
        if ready <= 0:
            continue
        given = resampled(held[: done + ready + context], rate, rate_hz, who)
        yield given[done // old * new : (done + ready) // old * new]
        keep = max(done + ready - context, 0)
        held, done = held[keep:], done + ready - keep
    if len(held) > done:
        yield resampled(held, rate, rate_hz, who)[done // old * new :]


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
