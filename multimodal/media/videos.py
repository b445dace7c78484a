"""Reads videos as frames (N, C, Y, X) of float32 in 0..1, at the wanted rate."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from multimodal.media.pictures import read_image
from multimodal.media.sounds import STREAMED
from multimodal.media.sources import (
    FOREIGN,
    file_kind,
    file_source,
    first_bytes,
    is_file_like,
    optional_package,
    unreadable,
)
from multimodal.shapes import MediaError, is_number
from multimodal.tokenizer import describe

DEMUXERS = {"MP4": "mov", "WebM": "matroska", "AVI": "avi", "GIF": "gif"}
"""FFmpeg's demuxer for each kind of file that is read."""
LEAST_PIXELS = 256  # what a smaller frame counts as, because many small frames take memory too
LATE_S = 0.002  # seconds that a frame may be late, since files round times to milliseconds


def read_video(value: Any, *, fps: float, channels: int, max_pixels: int, who: str) -> Tensor:
    """A clip as frames (N, C, Y, X) of float32 in 0..1; frame n is the one that is shown at n / fps seconds.

    value: an array (N, Y, X) or (N, Y, X, C), a tensor (N, Y, X) or (N, C, Y, X), or a list of pictures as `read_image` takes them,
    at `fps`; a pair (one of these, its own frames per second); a file that the package av decodes (MP4, WebM, AVI,
    GIF), as a path, bytes, an open file or a data: URL; or a decoder of torchcodec.
    max_pixels: the most pixels of all frames together; a clip with more is refused as soon as that is known.

    Raises:
        MediaError: names `who`, the value and the repair.
    """
    rate = fps
    if isinstance(value, tuple) and len(value) == 2 and is_number(value[1]):
        value, rate = value[0], float(value[1])
        if not 0 < rate < math.inf:
            raise MediaError(f"{who}: {rate:g} frames per second; wanted more than 0")
    if is_file_like(value):
        frames = _from_file(value, fps, max_pixels, who)
    elif hasattr(value, "get_frame_at") and hasattr(value, "metadata"):
        frames = _from_decoder(value, fps, who)
    elif isinstance(value, (list, tuple, np.ndarray, Tensor)) and getattr(value, "ndim", 3) >= 3:
        frames = _picked(value.__getitem__, _shown_at(len(value), rate, fps))
    else:
        raise MediaError(
            f"{who}: wanted a file, an array (frames, Y, X, C), a tensor (frames, C, Y, X) or a list of pictures, not "
            f"{describe(value)}"
        )
    parts: list[Tensor] = []
    before = None
    for frame in frames:
        if parts and frame is before:  # it is seen for longer, perhaps for hours
            image_CYX = parts[-1]
        else:
            image_CYX = read_image(frame, channels=channels, max_pixels=max_pixels, who=f"{who}: frame {len(parts)}")
        before = frame
        if parts and image_CYX.shape != parts[0].shape:
            raise MediaError(
                f"{who}: frame {len(parts)} is {_size(image_CYX)} pixels, the first {_size(parts[0])}; bring all to one size"
            )
        parts.append(image_CYX)
        if len(parts) * max(image_CYX[0].numel(), LEAST_PIXELS) > max_pixels:
            raise MediaError(
                f"{who}: the clip has more than {len(parts) - 1} frames of {_size(image_CYX)} pixels at fps={fps:g}, more than "
                f"max_pixels={max_pixels}; cut or shrink it, read it at a lower fps, or raise max_pixels"
            )
    if not parts:
        raise MediaError(f"{who}: {describe(value)} has no frames; to leave a field out, give None")
    return torch.stack(parts)


def _size(image_CYX: Tensor) -> str:
    return f"{image_CYX.shape[1]}x{image_CYX.shape[2]}"


def _picked(get: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """The frames with these numbers; one that follows itself is the same object."""
    frame, last = None, None
    for number in numbers:
        if number != last:
            frame, last = get(number), number
        yield frame


def _shown_at(count: int, rate: float, fps: float) -> Iterable[int]:
    """The indices of the frames that are shown at 0, 1 / fps, 2 / fps, .. seconds, of `count` frames at `rate` per second."""
    if rate == fps:
        return range(count)
    wanted = math.ceil(count * fps / rate - LATE_S * fps)
    return (min(int((n / fps + LATE_S) * rate), count - 1) for n in range(max(wanted, min(count, 1))))


def _from_decoder(video: Any, fps: float, who: str) -> Iterator[Tensor]:
    """The frames of a VideoDecoder of torchcodec, which the data sets of Hugging Face give."""
    count, rate = getattr(video.metadata, "num_frames", None), getattr(video.metadata, "average_fps", None)
    if not count or not rate:
        raise MediaError(
            f"{who}: the video's decoder knows neither its frames nor their rate; give a pair (frames, fps)"
        )

    def get(number: int) -> Tensor:
        try:
            frame = video.get_frame_at(number)
        except Exception as error:
            raise unreadable("the video", "frames", error, who) from error
        return torch.as_tensor(getattr(frame, "data", frame))

    yield from _picked(get, _shown_at(count, rate, fps))


def _from_file(value: Any, fps: float, max_pixels: int, who: str) -> Iterator[np.ndarray]:
    """The frames (Y, X, C) of the first video track of a file, decoded one by one."""
    source, name = file_source(value, who)
    with ExitStack() as stack:
        file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        head = first_bytes(file)
        kind = "GIF" if head[:4] == b"GIF8" else "AVI" if head[8:12] == b"AVI " else file_kind(head)
        if kind not in DEMUXERS:
            why = FOREIGN.get(kind) or (f"it is {kind}" if kind else "it is no MP4, WebM, AVI or GIF")
            raise unreadable(name, "a video", why if head else "it is empty", who)
        av = optional_package("av", "media", f"{who}: {name} is {kind}, whose frames the package av reads")
        if _cut_short(file, kind):
            raise unreadable(name, "a video", f"this {kind} file is cut short; get it again", who)
        try:
            # a fixed demuxer, so that a disguised playlist cannot open other files; titles may be in any encoding
            opened = av.open(file, mode="r", format=DEMUXERS[kind], metadata_errors="replace")
            container = stack.enter_context(opened)
        except Exception as error:
            raise unreadable(name, "a video", error, who) from error
        # a sound may have the picture of its cover as a track
        cover = av.stream.Disposition.attached_pic
        tracks = [track for track in container.streams.video if not track.disposition & cover]
        if not tracks:
            raise MediaError(f"{who}: {name} is {kind} without a video track")
        track = tracks[0]
        track.codec_context.options = {"max_pixels": str(max_pixels)}  # the frames may be larger than the header says
        track.thread_count = 1  # the process may be one of many workers
        if track.width * track.height > max_pixels:
            raise MediaError(
                f"{who}: a frame of {name} has {track.height}x{track.width} pixels, more than max_pixels={max_pixels}; shrink it "
                "first or raise max_pixels"
            )
        try:
            yield from _at_rate(container.decode(track), float(track.average_rate or fps), fps)
        except av.FFmpegError as error:
            raise unreadable(name, "a video", error, who) from error


def _at_rate(frames: Iterator[Any], rate: float, fps: float) -> Iterator[np.ndarray]:
    """The frames that are shown at 0, 1 / fps, 2 / fps, .. seconds, by their own times; the last is shown for 1 / rate seconds."""
    begin_s, end_s, shown, before, seen = None, 0.0, 0, None, None
    for number, frame in enumerate(frames):
        time_s = frame.time if frame.time is not None else (begin_s or 0.0) + number / rate
        begin_s = time_s if begin_s is None else begin_s
        while before is not None and shown / fps < time_s - begin_s - LATE_S:
            seen = _pixels(before) if seen is None else seen
            yield seen
            shown += 1
        before, seen, end_s = frame, None, time_s - begin_s + 1 / rate
    while before is not None and (shown == 0 or shown / fps < end_s - LATE_S):
        seen = _pixels(before) if seen is None else seen
        yield seen
        shown += 1


def _pixels(frame: Any) -> np.ndarray:
    """A frame of av as (Y, X, 3) uint8, or with its alpha (Y, X, 4), upright."""
    form = frame.format
    alpha = form.has_palette or any(part.is_alpha for part in form.components)
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _cut_short(file: BinaryIO, kind: str) -> bool:
    """Whether a file ends before its outermost parts do; FFmpeg then gives the frames that are there, as if they were all."""
    size, at = file.seek(0, 2), 0
    try:
        while at < size:
            file.seek(at)
            head = file.read(32)
            if kind == "MP4":
                length, first = int.from_bytes(head[:4], "big"), 8
                length = int.from_bytes(head[8:16], "big") if length == 1 else length
                if length < first:  # 0: up to the end of the file; others are none
                    return False
                at += length
            elif kind == "AVI":
                length = int.from_bytes(head[4:8], "little")
                return head[:4] == b"RIFF" and 0 < length < STREAMED and 8 + length > size + 1
            elif kind == "WebM":
                name = 4  # bytes, both of EBML and of the segment behind it
                many = 9 - head[name].bit_length()
                length = int.from_bytes(head[name : name + many], "big") & ((1 << 7 * many) - 1)
                if head[:4] == b"\x18\x53\x80\x67":
                    unknown = length == (1 << 7 * many) - 1
                    return not unknown and at + name + many + length > size
                at += name + many + length
            else:
                return False
        return at > size
    except IndexError:
        return True
    finally:
        file.seek(0)
