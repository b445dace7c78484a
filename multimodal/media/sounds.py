"""Reads sounds as one channel of float32 at the wanted rate, whole or block by block."""

import itertools
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from multimodal.media.sources import (
    FOREIGN,
    as_tensor,
    file_kind,
    file_source,
    first_bytes,
    is_file_like,
    unreadable,
    warn_once,
)
from multimodal.shapes import MediaError
from multimodal.texts import shortened
from multimodal.tokenizer import describe

BLOCK_S = 10.0  # seconds of a file that are read at once
BLOCK_SAMPLES = 2**20  # the most samples of a block, all channels together, before and after resampling
HOUR_S = 3600.0
BUSIEST = 400_000  # samples a second, all channels together; above it, `max_seconds` allows proportionally less
LOUDEST = 16.0  # 24 dB above full scale: decoders and mixtures exceed 1 a little, integers of 16 bits by far
CANCELLED = 0.01  # least share of the channels' power in their mean; below it, their correlation is below -0.98
MOST_CHANNELS = 16  # of an array

CUT_SHORT = re.compile(r"^ *(?:data|SSND|Data Size|Riff size|riff) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
STREAMED = 0x7FFF0000  # writers to a pipe do not know the size yet, and put this many bytes or more in the header
UNKNOWN = 2**62  # the number of samples that libsndfile gives where the header has none
MP3 = re.compile(rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # a tag, or a frame of layer III of MPEG 2.5, 2 or 1
_LARGEST_FILTER = 2**24  # coefficients; the filter grows with both rates over their common divisor

Filter = Literal["kaiser", "hann"]
FILTERS: dict[str, dict[str, Any]] = {
    # a narrow transition band (to -80 dB) that ends at half the lower rate
    "kaiser": {
        "lowpass_filter_width": 64,
        "rolloff": 0.965,
        "resampling_method": "sinc_interp_kaiser",
        "beta": 8.0,
    },
    "hann": {"lowpass_filter_width": 6, "rolloff": 0.99, "resampling_method": "sinc_interp_hann"},
}
"""Low-pass filters of resampling. "hann", that of multimodal 0.1, is short and lets aliases through."""
DEMUXERS = {"MP4": "mov", "WebM": "matroska", "AAC": "aac", "WMA": "asf", "AMR": "amr", "WavPack": "wv"}
"""FFmpeg's demuxer for each kind of file that libsndfile does not know."""


def read_sound(
    value: Any, *, rate_hz: int, who: str, max_seconds: float = HOUR_S, resampling: Filter = "kaiser"
) -> Tensor:
    """A sound as one channel (S,) of float32 at `rate_hz`; channels are averaged; resampling is logged once.

    value: a path, bytes, an open file or a data: URL; a pair (wave, rate in Hz); a mapping with "array" and "sampling_rate"; or
    a decoder of torchcodec, as the data sets of Hugging Face give them. The wave is an array or tensor (S,), (channels, S) or
    (S, channels), of floats in -1..1 or of int8, uint8, int16 or int32.
    max_seconds: a longer sound is refused, by its header before decoding, or else as soon as decoding exceeds it.

    Raises:
        MediaError: names `who`, the value and the repair.
    """
    blocks = sound_blocks(value, rate_hz=rate_hz, who=who, max_seconds=max_seconds, resampling=resampling)
    parts = [wave_S for wave_S, _ in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_as_recorded(value: Any, *, who: str, max_seconds: float = HOUR_S) -> tuple[Tensor, int]:
    """A sound as one channel (S,) of float32 and its own rate in Hz; otherwise as `read_sound`.

    Raises:
        MediaError: as `read_sound`.
    """
    with _opened(value, who) as sound:
        rate = _checked_rate(sound.rate, who)
        _check_length(sound, sound.samples or 0, rate, max_seconds, who)
        parts = list(_one_channel(sound, rate, max_seconds, who))
    return parts[0] if len(parts) == 1 else torch.cat(parts), rate


def sound_blocks(
    value: Any, *, rate_hz: int, who: str, max_seconds: float = math.inf, resampling: Filter = "kaiser"
) -> Iterator[tuple[Tensor, int]]:
    """Yields (one channel (S,) of float32 at `rate_hz`, total number of samples or 0 if unknown) for each block.

    Takes what `read_sound` takes; the blocks in a row are what it returns. A file is never in memory as a whole.

    Raises:
        MediaError: as `read_sound`.
    """
    with _opened(value, who) as sound:
        rate = _checked_rate(sound.rate, who)
        _check_length(sound, sound.samples or 0, rate, max_seconds, who)
        total = math.ceil((sound.samples or 0) * rate_hz / rate)
        raw = _one_channel(sound, rate, max_seconds, who)
        for wave_S in raw if rate == rate_hz else _resampled_blocks(raw, rate, rate_hz, resampling, who):
            yield wave_S, total


@dataclass
class _Sound:
    """An open sound.

    name: for error messages.
    rate: samples a second by its header, not yet checked.
    channels: number of channels.
    samples: number of samples of each channel; None if unknown.
    blocks: yields tensors (C, S) of floats.
    """

    name: str
    rate: Any
    channels: int
    samples: int | None
    blocks: Callable[[], Iterator[Tensor]]


@contextmanager
def _opened(value: Any, who: str) -> Iterator[_Sound]:
    with ExitStack() as stack:
        if is_file_like(value):
            yield _open_file(value, who, stack)
        elif hasattr(value, "get_all_samples"):  # torchcodec's AudioDecoder, which datasets give
            yield _decoder(value, "the sound", who)
        elif hasattr(value, "get_frame_at"):
            raise MediaError(f"{who}: a decoder of a video is no sound; give the AudioDecoder of its file")
        else:
            yield _from_memory(value, who)


def _checked_rate(rate: Any, who: str) -> int:
    if (
        isinstance(rate, bool)
        or not isinstance(rate, (int, float, np.integer, np.floating))
        or not 1 <= rate <= 10_000_000
        or rate != int(rate)
    ):
        raise MediaError(
            f"{who}: the rate {describe(rate)} is not a whole number of samples a second (Hz), such as 16000"
        )
    return int(rate)


def _check_length(sound: _Sound, samples: int, rate: int, max_seconds: float, who: str) -> None:
    seconds = samples * max(1 / rate, sound.channels / BUSIEST)
    if seconds > max_seconds:
        raise MediaError(
            f"{who}: {sound.name} has {samples} samples at {rate} Hz in {sound.channels} channels, {samples / rate:.0f} s, more "
            f"than max_seconds={max_seconds:g} allows; cut it into pieces, or raise max_seconds"
        )


def _one_channel(sound: _Sound, rate: int, max_seconds: float, who: str) -> Iterator[Tensor]:
    """The mean of the channels (S,), block by block, with the checks that need the samples."""
    came, power, power_of_mean = 0, 0.0, 0.0
    for wave_CS in sound.blocks():
        if wave_CS.numel() == 0:
            continue
        came += wave_CS.shape[1]
        # headers may lie, so the length is checked again while samples come
        _check_length(sound, came, rate, max_seconds, who)
        flat = (wave_CS if wave_CS.is_contiguous() else wave_CS.T).reshape(-1)  # in the order of memory, without a copy
        _check_range(flat, sound.name, who)
        wave_S = wave_CS.mean(0)
        if len(wave_CS) > 1:
            power += float(flat.dot(flat)) / len(wave_CS)
            power_of_mean += float(wave_S.dot(wave_S))
        yield wave_S
    if not came:
        raise MediaError(f"{who}: {sound.name} has no samples")
    if power_of_mean < CANCELLED * power:
        warn_once(
            f"{who}: the {sound.channels} channels of {sound.name} cancel each other when they are averaged, as one is the "
            "negative of the other; turn one of them round, or give one channel"
        )


def _check_range(wave: Tensor, name: str, who: str) -> None:
    low, high = (float(x) for x in wave.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MediaError(f"{who}: {name} has samples that are not finite (NaN or infinity)")
    peak = max(-low, high)
    # floats that are all whole numbers were integers, which nobody has divided by their range
    if peak > LOUDEST or (peak > 1.5 and bool((wave == wave.round()).all())):
        raise MediaError(
            f"{who}: {name} runs from {low:g} to {high:g}, but floats are wanted in -1..1; whole numbers of 16 bits are divided "
            "by 32768, or given as int16"
        )


class Resampler:
    """Resamples a sound that comes in blocks, with enough of the neighbouring blocks that the result is that of the whole.

    rate, rate_hz: samples a second before and after. who: who is named in errors.

    Raises:
        MediaError: the two rates take too large a filter.
    """

    def __init__(self, rate: int, rate_hz: int, *, resampling: Filter = "kaiser", who: str) -> None:
        common = math.gcd(rate, rate_hz)
        self.old, self.new = old, new = rate // common, rate_hz // common
        if old * new > _LARGEST_FILTER:
            raise MediaError(
                f"{who}: {rate} Hz and {rate_hz} Hz have only {common} as a common divisor, which takes too large a filter; "
                "resample it first to a usual rate such as 16000, 22050, 44100 or 48000 Hz"
            )
        if rate != rate_hz:
            warn_once(f"{who}: resampling {rate} Hz to {rate_hz} Hz")
        make = _resampler if old * new <= 2**20 else _resampler.__wrapped__  # large filters are not cached
        self._resample = make(old, new, resampling)
        # the reach of the filter to either side, in periods of the lower rate; multiples of `old` samples keep its phase
        reach = math.ceil(FILTERS[resampling]["lowpass_filter_width"] / FILTERS[resampling]["rolloff"]) + 1
        self._context = old * math.ceil((reach * max(1, old / new) + old) / old)
        self._pending = torch.empty(0)
        self._done = 0  # samples of `_pending` that were resampled already and serve as context

    def push(self, block_S: Tensor) -> Tensor:
        """Take more samples, and return the resampled ones (S,) that no later sample changes."""
        if self.old == self.new:
            return block_S
        old, new, context, done = self.old, self.new, self._context, self._done
        pending = torch.cat([self._pending, block_S]) if len(self._pending) else block_S
        ready = (len(pending) - done - context) // old * old
        if ready <= 0:
            self._pending = pending
            return pending[:0]
        given = self._resample(pending[: done + ready + context])
        keep = max(done + ready - context, 0)
        self._pending, self._done = pending[keep:], done + ready - keep
        return given[done // old * new : (done + ready) // old * new]

    def finish(self) -> Tensor:
        """The sound is over: return the rest of the resampled samples (S,)."""
        pending, done = self._pending, self._done
        self._pending, self._done = pending[:0], 0
        return self._resample(pending)[done // self.old * self.new :] if len(pending) > done else pending[:0]


def _resampled_blocks(raw: Iterator[Tensor], rate: int, rate_hz: int, resampling: Filter, who: str) -> Iterator[Tensor]:
    """Resample block by block; none of the blocks is empty."""
    resampler = Resampler(rate, rate_hz, resampling=resampling, who=who)
    size = max(BLOCK_SAMPLES * resampler.old // resampler.new, 1)
    for block_S in (part_S for whole_S in raw for part_S in whole_S.split(size)):
        if len(given_S := resampler.push(block_S)):
            yield given_S
    if len(rest_S := resampler.finish()):
        yield rest_S


@lru_cache(maxsize=16)
def _resampler(old: int, new: int, resampling: Filter) -> Callable[[Tensor], Tensor]:
    from torchaudio.transforms import Resample

    return Resample(old, new, **FILTERS[resampling])


def _from_memory(value: Any, who: str) -> _Sound:
    """The sound of a pair, a mapping or AudioSamples, whose wave is an array or a tensor."""
    if isinstance(value, Mapping) and {"array", "sampling_rate"} <= set(value):
        wave, rate = value["array"], value["sampling_rate"]
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        wave, rate = value
    elif hasattr(value, "data") and hasattr(value, "sample_rate"):  # torchcodec's AudioSamples
        samples: Any = value
        wave, rate = samples.data, samples.sample_rate
    else:
        raise MediaError(
            f"{who}: wanted a file or a pair (wave, rate_hz), not {describe(value)}; an array alone does not say its rate"
        )
    came = describe(wave)
    if not isinstance(wave, (np.ndarray, Tensor)):
        raise MediaError(f"{who}: the wave is {came}; wanted an array or a tensor, (S,) or (channels, S)")
    tensor = as_tensor(wave, who)
    wave_CS = channels_first(tensor, came, who)
    if wave_CS.dtype not in _SCALES and not wave_CS.is_floating_point():
        raise MediaError(f"{who}: the wave is {came}, which has no known range; give int16, int32 or floats in -1..1")

    def blocks() -> Iterator[Tensor]:
        size = max(BLOCK_SAMPLES // max(len(wave_CS), 1), 1)
        for start in range(0, wave_CS.shape[1], size):
            block = wave_CS[:, start : start + size]
            zero, scale = _SCALES.get(block.dtype, (0, 1))
            yield (block.float() - zero) / scale if scale > 1 else block.float()

    return _Sound("the sound", rate, len(wave_CS), wave_CS.shape[1], blocks)


_SCALES = {torch.uint8: (128, 2**7), torch.int8: (0, 2**7), torch.int16: (0, 2**15), torch.int32: (0, 2**31)}
"""{integer type: (value of silence, scale of 1.0)}."""


def channels_first(wave: Any, came: str, who: str) -> Any:
    """A wave (S,), (channels, S) or (S, channels), array or tensor, as (channels, S) with at most 16 channels and more samples.

    came: the description of the wave for errors.
    """
    if wave.ndim == 1:
        return wave[None]
    if wave.ndim == 2:
        rows, columns = wave.shape
        if 0 in (rows, columns):
            return wave.reshape(1, 0)
        if rows == 1 or rows <= MOST_CHANNELS < columns:
            return wave
        if columns == 1 or columns <= MOST_CHANNELS < rows:
            return wave.T
        if max(rows, columns) <= MOST_CHANNELS:
            raise MediaError(
                f"{who}: the wave is {came}, and which of its axes are channels is ambiguous, as both are short; average the "
                "channels first and give (S,)"
            )
    raise MediaError(
        f"{who}: the wave is {came}; wanted (S,) or (channels, S) with at most {MOST_CHANNELS} channels, or (S, channels)"
    )


def _open_file(value: Any, who: str, stack: ExitStack) -> _Sound:
    """The sound of a file, by libsndfile or else by another package."""
    source, name = file_source(value, who)
    label = name if isinstance(source, Path) else "the sound"
    try:
        file = _by_libsndfile(source, stack)
    except Exception as error:  # decoders fail in many ways on damaged files
        return _open_other(source, name, label, who, error, stack)
    # libsndfile raises no error for a file that was cut short: it lowers `frames` and notes that in its log, or reads less
    cut = CUT_SHORT.search(file.extra_info)
    if cut and int(cut[2]) < int(cut[1]) < STREAMED:
        raise MediaError(
            f"{who}: {name} holds {cut[2]} bytes of the {cut[1]} that its header promises; it was cut short"
        )
    known = file.frames < UNKNOWN
    if not known:
        file.seekable = lambda: False  # else soundfile seeks beyond the end, and fails

    def blocks() -> Iterator[Tensor]:
        size = max(min(round(BLOCK_S * file.samplerate), BLOCK_SAMPLES // file.channels), 1)
        came = 0
        while True:
            try:
                wave = file.read(size, dtype="float32", always_2d=True)
            except Exception as error:
                raise unreadable(name, "sound", error, who) from error
            if len(wave) == 0:
                break
            came += len(wave)
            yield torch.from_numpy(wave).T
        if known and came < file.frames:
            raise MediaError(
                f"{who}: {name} holds {came} samples of the {file.frames} that its header promises; it was cut short"
            )

    return _Sound(label, file.samplerate, file.channels, file.frames if known else None, blocks)


def _by_libsndfile(source: Any, stack: ExitStack) -> Any:
    """Open a file by libsndfile, which at times (1.2.2) refuses MP3 from memory, and reads the same bytes from a path."""
    import soundfile

    try:
        return stack.enter_context(soundfile.SoundFile(source))
    except soundfile.LibsndfileError as error:
        if isinstance(source, Path) or not MP3.match(first_bytes(source)):
            raise
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "sound.mp3"
        with path.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        source.seek(0)
        try:
            return stack.enter_context(soundfile.SoundFile(path))
        except soundfile.LibsndfileError:
            raise error from None  # the second one names the copy


def _open_other(source: Any, name: str, label: str, who: str, error: Exception, stack: ExitStack) -> _Sound:
    """Open a file that libsndfile refuses by another package; if none is installed, the error names the one to install."""
    file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
    head = first_bytes(file)
    kind = file_kind(head)
    if kind not in DEMUXERS:
        text = FOREIGN.get(kind) or ("it is a picture (HEIC)" if kind == "HEIC" else error if head else "it is empty")
        raise unreadable(name, "sound", text, who) from error
    try:
        import av
    except ImportError:
        try:
            from torchcodec.decoders import AudioDecoder  # pyright: ignore[reportMissingImports]  an extra

            return _decoder(AudioDecoder(file), label, who)
        except ImportError:
            tried = ""
        except Exception as other:  # it is damaged, or FFmpeg's libraries are missing
            tried = f" (torchcodec is installed, and says: {shortened(' '.join(str(other).split()), 80)})"
        raise MediaError(
            f"{who}: {name} is {kind}, which the package av reads: pip install 'multimodal-stream[media]'{tried}"
        ) from None
    try:
        # a fixed demuxer, so that a disguised play list cannot open other files
        container = stack.enter_context(av.open(file, format=DEMUXERS[kind], metadata_errors="replace"))
    except Exception as other:
        raise unreadable(name, "sound", other, who) from other
    if not container.streams.audio:
        raise MediaError(f"{who}: {name} is {kind} without a sound track")
    if len(container.streams.audio) > 1:
        text = f"{who}: {name} has {len(container.streams.audio)} sound tracks; only the first is read, as of every such file"
        warn_once(text, key="sound tracks")
    return _by_ffmpeg(container, kind, name, label, who)


def _by_ffmpeg(container: Any, kind: str, name: str, label: str, who: str) -> _Sound:
    """The first sound track of a file that the package av has opened."""
    import av

    stream = container.streams.audio[0]
    try:
        frames = container.decode(stream)
        first = next(frames)  # headers of AAC may give another rate and other channels than the frames have
    except (av.FFmpegError, StopIteration) as error:
        raise unreadable(name, "sound", error, who) from error
    rate, channels = first.sample_rate, first.layout.nb_channels
    seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    exact = kind in ("MP4", "WebM")  # FFmpeg estimates the duration of other kinds from the file size

    def blocks() -> Iterator[Tensor]:
        to_floats, came = av.AudioResampler(format="fltp", layout=first.layout, rate=rate), 0
        frames_CS: list[np.ndarray] = []
        try:
            for frame in itertools.chain([first], frames, [None]):  # None: the rest of the resampler
                frames_CS += [part.to_ndarray() for part in to_floats.resample(frame)]
                if frames_CS and (frame is None or sum(part.shape[1] for part in frames_CS) >= BLOCK_S * rate):
                    wave_CS = torch.from_numpy(np.concatenate(frames_CS, 1))
                    came, frames_CS = came + wave_CS.shape[1], []
                    yield wave_CS
        except av.FFmpegError as error:
            raise unreadable(name, "sound", error, who) from error
        if exact and came < (seconds - 0.25) * rate:
            raise MediaError(
                f"{who}: {name} holds {came / rate:.2f} s of the {seconds:.2f} s that its header promises; it was cut short"
            )

    return _Sound(label, rate, channels, round(seconds * rate) if exact and seconds else None, blocks)


def _decoder(decoder: Any, label: str, who: str) -> _Sound:
    """The sound of an AudioDecoder of torchcodec."""
    metadata = getattr(decoder, "metadata", None)
    rate, channels = getattr(metadata, "sample_rate", None), getattr(metadata, "num_channels", None) or 1
    seconds = getattr(metadata, "duration_seconds_from_header", None) or getattr(metadata, "duration_seconds", None)

    def samples() -> Any:
        try:
            return decoder.get_all_samples()
        except Exception as error:
            raise unreadable(label, "sound", error, who) from error

    def blocks() -> Iterator[Tensor]:
        return _from_memory(samples(), who).blocks()

    if rate is None:  # without metadata, it is decoded at once
        return _from_memory(samples(), who)
    return _Sound(label, rate, channels, round(seconds * rate) if seconds else None, blocks)
