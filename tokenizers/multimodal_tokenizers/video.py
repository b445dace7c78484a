"""Videos as tubes: patches that span a few frames, with their time in seconds, row and column."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from multimodal.media import read_video
from multimodal.shapes import ConfigError, MediaError, check_number, check_whole
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal_tokenizers.placed import PlacedLinear, grid_positions


@dataclass(frozen=True)
class VideoTubes(Tokenizer):
    """A video clip of any size and duration, as tubes of `frames` x `patch` x `patch` pixels (Arnab et al. 2021).

    A value is an array (frames, Y, X) or (frames, Y, X, C), a tensor (frames, C, Y, X), a list of pictures, a pair of one of these
    and its own frames per second, or a file (MP4, WebM, AVI, GIF), which needs the extra `media`. Positions are seconds, rows and
    columns, so that they do not depend on the rate of the recording. At the ends the last frame, row and column of pixels are
    repeated to fill a tube.

    patch: the side of a tube in pixels.
    frames: number of frames of a tube; 1: patches of single frames.
    fps: frames per second that are read; of a clip with another rate, the frames that are shown at these times. A value without a
        rate is taken to have this one.
    channels: number of channels: 1 grey, 3 RGB, 4 RGBA.
    mean: subtracted from pixels in 0..1.
    std: the divisor of the pixels after that.
    position: the encoding of time, row and column that is added to a tube's embedding: "sincos" (fixed, unbounded) or "rotary"
        (none: only the core's rotary places encode them, as they always do).
    max_pixels: the most pixels of all frames of a clip together; a clip with more is refused.
    size: frames, rows and columns of pixels of every written clip; None: clips are only read.

    Examples:
        >>> tokens = VideoTubes(patch=4, channels=1)(np.zeros((6, 8, 8), np.uint8))
        >>> len(tokens), tokens.position_NA[-1].tolist()
        (12, [0.5, 1.0, 1.0])
    """

    patch: int = 16
    frames: int = 2
    fps: float = 8.0
    channels: int = 3
    mean: float = 0.5
    std: float = 0.5
    position: Literal["sincos", "rotary"] = "sincos"
    max_pixels: int = 2**25
    size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        check_whole("VideoTubes", least=1, patch=self.patch, frames=self.frames, max_pixels=self.max_pixels)
        check_number("VideoTubes", fps=self.fps, mean=self.mean, std=self.std)
        if self.channels not in (1, 3, 4) or self.position not in ("sincos", "rotary"):
            raise ConfigError(
                f"VideoTubes: channels={self.channels} must be 1, 3 or 4, and position={self.position!r} 'sincos' or 'rotary'"
            )
        if not 0 < self.fps < math.inf or not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise ConfigError(
                f"VideoTubes: fps={self.fps} and std={self.std} must be more than 0, and mean={self.mean} finite"
            )
        if self.size is not None:
            object.__setattr__(self, "size", size := tuple(self.size))
            whole = (self.frames, self.patch, self.patch)
            if len(size) != 3 or any(n < 1 or n % k for n, k in zip(size, whole, strict=True)):
                raise ConfigError(
                    f"VideoTubes: size={size} must be frames, rows and columns of pixels, multiples of {whole}"
                )

    @property
    def pixel_features(self) -> int:
        """F of the pixels alone: frames x channels x rows x columns of one tube."""
        return self.frames * self.channels * self.patch**2

    @property
    def feature_size(self) -> int:
        """Pixels, and for "sincos" the position of the tube in steps after them."""
        return self.pixel_features + (3 if self.position == "sincos" else 0)

    @property
    def written_features(self) -> int:
        """Only pixels are written; the places are known."""
        return self.pixel_features

    @property
    def step(self) -> tuple[float, float, float]:
        """One tube's time in seconds, a row, a column."""
        return (self.frames / self.fps, 1.0, 1.0)

    @property
    def length(self) -> int | None:
        """Tubes of a written clip."""
        return None if self.size is None else math.prod(self._written_grid)

    @property
    def _written_grid(self) -> tuple[int, int, int]:
        """Times, rows and columns of tubes."""
        if self.size is None:
            raise ConfigError(
                "VideoTubes: to write clips, give it size=(frames, rows, columns) in pixels, which all of them have"
            )
        return self.size[0] // self.frames, self.size[1] // self.patch, self.size[2] // self.patch

    def encode(self, value: Any) -> Tokens:
        clip_NCYX = read_video(
            value, fps=self.fps, channels=self.channels, max_pixels=self.max_pixels, who="VideoTubes.encode"
        )
        count, _, height, width = clip_NCYX.shape
        if min(height, width) < self.patch:
            raise MediaError(
                f"VideoTubes.encode: frames of {height}x{width} pixels are smaller than one patch={self.patch}; enlarge them first"
            )
        ends = (0, -width % self.patch, 0, -height % self.patch, 0, -count % self.frames)
        if any(ends):
            clip_CNYX = F.pad(clip_NCYX.transpose(0, 1)[None], ends, mode="replicate")[0]
            clip_NCYX = clip_CNYX.transpose(0, 1)
        clip_NCYX = (clip_NCYX - self.mean) / self.std
        tubes_NF = rearrange(
            clip_NCYX, "(t f) c (y p) (x q) -> (t y x) (f c p q)", f=self.frames, p=self.patch, q=self.patch
        )
        times, rows, columns = (
            -(-n // k) for n, k in ((count, self.frames), (height, self.patch), (width, self.patch))
        )
        place_NA = grid_positions(times, rows, columns)
        return Tokens(self._with_places(tubes_NF, place_NA), place_NA * torch.tensor(self.step))

    def _with_places(self, pixels_NF: Tensor, place_NA: Tensor) -> Tensor:
        """The content of tokens. place_NA: their positions in steps."""
        return pixels_NF if self.position == "rotary" else torch.cat([pixels_NF, place_NA.to(pixels_NF)], 1)

    def places(self, count: int) -> Tensor:
        times, rows, columns = self._written_grid
        if count > times * rows * columns:
            raise ConfigError(
                f"VideoTubes: places({count}), but a clip of size={self.size} has {times * rows * columns} tubes"
            )
        return grid_positions(times, rows, columns)[:count] * torch.tensor(self.step)

    def fed_back(self, features_NF: Tensor, position_NA: Tensor) -> Tensor:
        # rounded, because a position in seconds over its step is not always whole
        return self._with_places(features_NF, (position_NA / position_NA.new_tensor(self.step)).round())

    def decode(self, tokens: Tokens) -> Tensor:
        """The clip (frames, C, Y, X) in 0..1 that these tubes tile; tubes that are missing before the last are `mean`."""
        place_NA = (tokens.position_NA.cpu() / torch.tensor(self.step)).round().long()
        times, rows, columns = (place_NA.amax(0) + 1).tolist() if len(place_NA) else (0, 0, 0)
        time_N, row_N, column_N = place_NA.unbind(1)
        pixels_NF = torch.zeros(times * rows * columns, self.pixel_features)
        pixels_NF[(time_N * rows + row_N) * columns + column_N] = tokens.content[:, : self.pixel_features].float().cpu()
        clip_NCYX = rearrange(
            pixels_NF,
            "(t y x) (f c p q) -> (t f) c (y p) (x q)",
            t=times, y=rows, x=columns, f=self.frames, c=self.channels, p=self.patch,
        )  # fmt: skip
        return (clip_NCYX * self.std + self.mean).clamp(0, 1)

    def token_names(self, tokens: Tokens) -> list[str]:
        """The time in seconds, row and column of each tube."""
        return [f"{time:.4g} s, row {row:g}, column {column:g}" for time, row, column in tokens.position_NA.tolist()]

    def embed(self, width: int) -> nn.Module:
        if self.position == "rotary":
            return nn.Linear(self.feature_size, width)
        return PlacedLinear(self.pixel_features, 3, width)

    def examples(self) -> list[Tensor]:
        """Values for the conformance checks."""
        draw = torch.Generator().manual_seed(0)
        sizes = [self.size] * 3 if self.size else [(k * self.frames, self.patch, 2 * self.patch) for k in (2, 2, 3)]
        return [torch.rand(n, self.channels, y, x, generator=draw) for n, y, x in sizes]
