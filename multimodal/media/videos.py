"""Reads clips of moving pictures as frames (N, C, Y, X) of float32 in 0..1, so many a second."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multimodal.media.pictures import read_image
from multimodal.media.sources import FOREIGN, file_kind, file_source, first_bytes, is_file_like, unreadable
from multimodal.shapes import MediaError
from multimodal.tokenizer import describe

DEMUXERS = {"MP4": "mov", "WebM": "matroska", "AVI": "avi", "GIF": "gif"}
"""FFmpeg's demuxer for each kind of file that is read."""
LATE_S = 0.002  # files round the times of frames to milliseconds or less; a frame so late counts as in time


def read_video(value: Any, *, fps: float, channels: int, max_pixels: int, who: str) -> Tensor:
    """A clip as frames (N, C, Y, X) float32 in 0..1, of which the n-th is what is seen after n / fps seconds.

    value: an array (N, Y, X) or (N, Y, X, C), a tensor (N, Y, X) or (N, C, Y, X), or a list of pictures as `read_image` takes them,
    whose frames have `fps`; a pair (any of these, its own frames per second); a file that the package av decodes (MP4, WebM, AVI,
    GIF), as a path, bytes, an open file or a data: URL; or a decoder of torchcodec.
    max_pixels: the most pixels of all frames together; a clip with more is refused as soon as that is known.

    Raises:
        MediaError: names `who`, the value and the repair.
    """
    rate = fps
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Real) and not isinstance(value[1], bool):
        value, rate = value[0], float(value[1])
        if not 0 < rate < math.inf:
            raise MediaError(f"{who}: {rate:g} frames per second; wanted more than 0")
    if is_file_like(value):
        frames = _from_file(value, fps, max_pixels, who)
    elif hasattr(value, "get_frame_at") and hasattr(value, "metadata"):
        frames = _from_decoder(value, fps, who)
    elif isinstance(value, (list, tuple, np.ndarray, Tensor)) and getattr(value, "ndim", 3) >= 3:
        frames = (value[i] for i in _shown_at(len(value), rate, fps))
    else:
        raise MediaError(
            f"{who}: wanted a file, an array (frames, Y, X, C), a tensor (frames, C, Y, X) or a list of pictures, not "
            f"{describe(value)}"
        )
    parts: list[Tensor] = []
    for frame in frames:
        image_CYX = read_image(frame, channels=channels, max_pixels=max_pixels, who=f"{who}: frame {len(parts)}")
        if parts and image_CYX.shape != parts[0].shape:
            raise MediaError(
                f"{who}: frame {len(parts)} is {_size(image_CYX)} pixels, the first {_size(parts[0])}; bring all to one size"
            )
        parts.append(image_CYX)
        if len(parts) * image_CYX[0].numel() > max_pixels:
            raise MediaError(
                f"{who}: the clip has more than {len(parts) - 1} frames of {_size(image_CYX)} pixels at fps={fps:g}, more than "
                f"max_pixels={max_pixels}; cut or shrink it, read it at a lower fps, or raise max_pixels"
            )
    if not parts:
        raise MediaError(f"{who}: {describe(value)} has no frames; to leave a field out, give None")
    return torch.stack(parts)


def _size(image_CYX: Tensor) -> str:
    return f"{image_CYX.shape[1]}x{image_CYX.shape[2]}"


def _shown_at(count: int, rate: float, fps: float) -> Sequence[int]:
    """The number of the frame that is seen after 0, 1, 2, .. times 1 / fps seconds, of `count` frames at `rate`."""
    if rate == fps:
        return range(count)
    wanted = math.ceil(count * fps / rate - LATE_S * fps)
    return [min(int((n / fps + LATE_S) * rate), count - 1) for n in range(max(wanted, min(count, 1)))]


def _from_decoder(video: Any, fps: float, who: str) -> Iterator[Tensor]:
    """The frames of a VideoDecoder of torchcodec, which the data sets of Hugging Face give."""
    count, rate = getattr(video.metadata, "num_frames", None), getattr(video.metadata, "average_fps", None)
    if not count or not rate:
        raise MediaError(
            f"{who}: the video's decoder knows neither its frames nor their rate; give a pair (frames, fps)"
        )
    for i in _shown_at(count, rate, fps):
        try:
            frame = video.get_frame_at(i)
        except Exception as error:
            raise unreadable("the video", "moving pictures", error, who) from error
        yield torch.as_tensor(getattr(frame, "data", frame))


def _from_file(value: Any, fps: float, max_pixels: int, who: str) -> Iterator[np.ndarray]:
    """The frames (Y, X, C) of the first picture track of a file, decoded one by one."""
    source, name = file_source(value, who)
    with ExitStack() as stack:
        file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        head = first_bytes(file)
        kind = "GIF" if head[:4] == b"GIF8" else "AVI" if head[8:12] == b"AVI " else file_kind(head)
        if kind not in DEMUXERS:
            why = FOREIGN.get(kind) or (f"it is {kind}" if kind else "it is no MP4, WebM, AVI or GIF")
            raise unreadable(name, "moving pictures", why if head else "it is empty", who)
        try:
            import av
        except ImportError:
            raise MediaError(
                f"{who}: {name} is {kind}, whose frames the package av reads: pip install 'multimodal-stream[media]'"
            ) from None
        try:
            # a fixed demuxer, so that a disguised play list cannot open other files
            container = stack.enter_context(av.open(file, mode="r", format=DEMUXERS[kind]))
        except Exception as error:
            raise unreadable(name, "moving pictures", error, who) from error
        if not container.streams.video:
            raise MediaError(f"{who}: {name} is {kind} without moving pictures")
        track = container.streams.video[0]
        track.thread_count = 1  # the process may be one of many workers
        if track.width * track.height > max_pixels:
            raise MediaError(
                f"{who}: a frame of {name} has {track.height}x{track.width} pixels, more than max_pixels={max_pixels}; shrink it "
                "first or raise max_pixels"
            )
        try:
            yield from _at_rate(container.decode(track), float(track.average_rate or fps), fps)
        except av.FFmpegError as error:
            raise unreadable(name, "moving pictures", error, who) from error


def _at_rate(frames: Iterator[Any], rate: float, fps: float) -> Iterator[np.ndarray]:
    """Of frames with their times, those that are seen after 0, 1, 2, .. times 1 / fps seconds; the last is seen for 1 / rate."""
    begin_s, end_s, shown, before = None, 0.0, 0, None
    for frame in frames:
        time_s = frame.time if frame.time is not None else (begin_s or 0.0) + shown / rate
        begin_s = time_s if begin_s is None else begin_s
        while before is not None and shown / fps < time_s - begin_s - LATE_S:
            yield _pixels(before)
            shown += 1
        before, end_s = frame, time_s - begin_s + 1 / rate
    while before is not None and (shown == 0 or shown / fps < end_s - LATE_S):
        yield _pixels(before)
        shown += 1


def _pixels(frame: Any) -> np.ndarray:
    """A frame of av as (Y, X, 3) uint8, upright."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
