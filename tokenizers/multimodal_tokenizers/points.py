"""Point clouds: each point is a token at its own position."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.media import file_source, is_file_like, optional_package
from multimodal.media.sources import as_numbers
from multimodal.shapes import AXES, ConfigError, MediaError, check_number, check_whole
from multimodal.texts import listed, shortened
from multimodal.tokenizer import Tokenizer, Tokens, describe
from multimodal.value_files import with_ending
from multimodal_tokenizers.placed import PlacedLinear
from multimodal_tokenizers.scaling import check_near, scale_of

STEPS = 16  # steps of rotary positions across four standard deviations of a cloud


@dataclass(frozen=True)
class Points(Tokenizer):
    """An array (points, dims + features): the coordinates x, y and, in 3D, z of each point; then its features, such as a colour.

    Make one with `Points.of(clouds)`, from the clouds to train on. A token is a point. Its position is its offset from `centre` in
    the units of the cloud: x on the axis column, y on row, z on depth; its time is 0, so that the order of points does not matter.
    For 3D points the core must know the axis depth: `core.replace(axes=Points.SPACE)`. A value may also be a .ply file, which needs
    the extra `points`.

    centre: subtracted from the coordinates.
    size: the standard deviation of the coordinates, one number for all.
    mean: subtracted from each feature.
    std: the divisor of each feature after that.
    spacing: the distance that is one step of the core's rotary positions; None: a quarter of `size`, so that most of a cloud lies
        within 16 steps.
    count: number of points of every written cloud; None: the head decides when to stop.

    Examples:
        >>> points = Points.of([np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[4.0, 2.0]])])
        >>> tokens = points(np.array([[4.0, 1.0]]))
        >>> tokens.position_NA.round(decimals=3).tolist(), points.decode(tokens).round(3).tolist()
        ([[0.0, -1.0, 2.0]], [[4.0, 1.0]])
    """

    PLANE = AXES
    SPACE = (*AXES, "depth")

    centre: tuple[float, ...]
    size: float
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    spacing: float | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        for name in ("centre", "mean", "std"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        check_number("Points", size=self.size, **({} if self.spacing is None else {"spacing": self.spacing}))
        if self.count is not None:
            check_whole("Points", least=1, count=self.count)
        if len(self.centre) not in (2, 3) or len(self.mean) != len(self.std):
            raise ConfigError(
                f"Points: centre={self.centre} must have 2 numbers or 3, and mean ({len(self.mean)}) as many "
                f"as std ({len(self.std)})"
            )
        if not all(map(math.isfinite, (*self.centre, *self.mean))):
            raise ConfigError(f"Points: centre={self.centre} and mean={self.mean} must be finite")
        if not all(0 < x < math.inf for x in (self.size, self._spacing, *self.std)):
            raise ConfigError(
                f"Points: size={self.size}, spacing={self.spacing} and std={self.std} must be more than 0 and finite"
            )

    @classmethod
    def of(
        cls, clouds: Iterable[Any], *, dims: int = 0, spacing: float | None = None, count: int | None = None
    ) -> Self:
        """Make one with the centre and size of these clouds, and the mean and standard deviation of their features.

        dims: number of coordinates, 2 or 3; 0: all columns of the arrays are coordinates.

        Raises:
            ConfigError: no clouds, or only equal points. MediaError: a cloud that cannot be read.
        """
        found = [_read(cloud, None, dims, "Points.of") for cloud in clouds]
        columns = {cloud.shape[1] for cloud in found}
        if len(columns) != 1:
            came = f"the clouds have {sorted(columns)} columns" if columns else "there are no clouds"
            raise ConfigError(f"Points.of: {came}; give one or more, all with the same columns")
        dims = dims or columns.pop()
        rows = np.concatenate(found)
        if dims not in (2, 3) or rows.shape[1] < dims:
            raise ConfigError(
                f"Points.of: dims={dims} of {rows.shape[1]} columns; points have 2 or 3 coordinates, then features; say how many "
                "are coordinates, dims=2 or dims=3"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            centre = rows[:, :dims].mean(0)
            size = float(np.sqrt(((rows[:, :dims] - centre) ** 2).mean()))
        if not size > 0:
            raise ConfigError("Points.of: all points have the same coordinates; give clouds of different points")
        for i in range(dims):
            check_near(f"Points.of: coordinate {'xyz'[i]}", rows[:, i], float(centre[i]), size)
        features = rows[:, dims:].T
        scales = [scale_of(f"Points.of: feature {i}", feature) for i, feature in enumerate(features)]
        mean, std = zip(*scales, strict=True) if scales else ((), ())
        return cls(centre.tolist(), size, mean, std, spacing, count)

    @property
    def _spacing(self) -> float:
        return 4 * self.size / STEPS if self.spacing is None else self.spacing

    @property
    def axes(self) -> tuple[str, ...]:
        return self.PLANE if len(self.centre) == 2 else self.SPACE

    @property
    def feature_size(self) -> int:
        """The standardised features of a point, then its coordinates: their offset from `centre`, divided by `size`."""
        return len(self.mean) + len(self.centre)

    @property
    def step(self) -> tuple[float, ...]:
        """A step in the units of the cloud; no point has another time than 0."""
        return (1.0, *(self._spacing,) * len(self.centre))

    @property
    def length(self) -> int | None:
        return self.count

    def encode(self, value: Any) -> Tokens:
        rows = _read(value, self.feature_size, len(self.centre), "Points.encode")
        dims = len(self.centre)
        scaled = [(rows[:, dims:] - self.mean) / self.std, (rows[:, :dims] - self.centre) / self.size]
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is refused
            content_NF = torch.from_numpy(np.concatenate(scaled, 1).astype(np.float32))
        return Tokens(content_NF, self._positions(content_NF))

    def _positions(self, content_NF: Tensor) -> Tensor:
        """The positions of points with this content: time 0, then y, x, z."""
        x, y, *z = (content_NF[:, -len(self.centre) :].float() * self.size).unbind(1)
        return torch.stack([torch.zeros_like(x), y, x, *z], 1)

    def next_place(self, written: Tokens, content: Tensor) -> Tensor:
        return self._positions(content)[0]

    def decode(self, tokens: Tokens) -> np.ndarray:
        """The array (points, dims + features), in the order in which the points were given."""
        content, dims = tokens.content.double().cpu().numpy(), len(self.centre)
        features, places = content[:, :-dims], content[:, -dims:]
        return np.concatenate([places * self.size + self.centre, features * self.std + self.mean], 1)

    def write(self, value: Any, path: str | Path) -> Path:
        """Save a cloud as a .ply file: x, y, z (0 in 2D), then its features as f0, f1, .."""
        rows = _read(value, self.feature_size, len(self.centre), "Points.write")
        if len(self.centre) == 2:
            rows = np.insert(rows, 2, 0.0, axis=1)
        plyfile, path = _plyfile("Points.write"), with_ending(path, ".ply")
        names = ("x", "y", "z", *(f"f{i}" for i in range(rows.shape[1] - 3)))
        table = np.array(list(map(tuple, rows)), dtype=[(name, "f8") for name in names])
        plyfile.PlyData([plyfile.PlyElement.describe(table, "vertex")]).write(str(path))
        return path

    def token_names(self, tokens: Tokens) -> list[str]:
        """The coordinates of each point."""
        return [", ".join(f"{x:.4g}" for x in row[: len(self.centre)]) for row in self.decode(tokens).tolist()]

    def embed(self, width: int) -> nn.Module:
        return PlacedLinear(self.feature_size, len(self.centre), width, self.size / self._spacing)

    def examples(self) -> list[np.ndarray]:
        """Values for the conformance checks."""
        random = np.random.default_rng(0)
        scale, middle = (*(self.size,) * len(self.centre), *self.std), (*self.centre, *self.mean)
        counts = [self.count] * 4 if self.count else (6, 9, 9, 14)
        return [random.standard_normal((n, self.feature_size)) * scale + middle for n in counts]


def _read(value: Any, columns: int | None, dims: int, who: str) -> np.ndarray:
    """The rows (points, columns) of a cloud as a new array of float64.

    columns: how many are wanted; None: any number. dims: how many of them are coordinates; 0: that is not known.
    """
    given = value
    if is_file_like(value):
        value = _from_file(value, dims, who)
    form = f"an array or tensor (points, {columns or 'coordinates and features'})"
    wanted = f"wanted {form} of numbers"
    if not isinstance(value, (np.ndarray, Tensor)) or value.ndim != 2:
        raise MediaError(f"{who}: {wanted}, not {describe(given)}")
    value = as_numbers(value, who, form)
    if columns not in (None, value.shape[1]):
        turned = "; turn it round" if value.shape[0] == columns else ""
        raise MediaError(f"{who}: {wanted}, not {describe(value)}{turned}")
    if not value.size:
        raise MediaError(f"{who}: {describe(given)} has no points; to leave a field out, give None")
    if not np.isfinite(value).all():
        raise MediaError(f"{who}: {describe(given)} has a number that is not finite (NaN or infinity)")
    return value


def _plyfile(who: str) -> Any:
    return optional_package("plyfile", "points", f"{who}: the package plyfile reads and writes .ply files")


def _from_file(value: Any, dims: int, who: str) -> np.ndarray:
    """The points of a .ply file as rows; in 2D (dims=2) without z, which has to be 0 everywhere."""
    source, name = file_source(value, who)
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        data = file.read(3)
        data = data + file.read() if data == b"ply" else b""
    if not data:
        raise MediaError(f"{who}: {name} is no .ply file; of other files give the array of points")
    plyfile = _plyfile(who)
    try:
        vertex = plyfile.PlyData.read(BytesIO(data))["vertex"]
        names = [p.name for p in vertex.properties if not isinstance(p, plyfile.PlyListProperty)]
        rows = np.stack([np.asarray(vertex[name], dtype=np.float64) for name in names], 1)
    except Exception as error:  # a crafted header makes the library fail in any way
        raise MediaError(
            f"{who}: cannot read {name} as points: {shortened(str(error) or type(error).__name__)}"
        ) from error
    if names[:2] != ["x", "y"] or (dims == 3 and names[2:3] != ["z"]):
        raise MediaError(
            f"{who}: the points of {name} have {listed(names)}; wanted x, y{' and z' if dims != 2 else ''} first, then features"
        )
    if dims != 2 or names[2:3] != ["z"]:
        return rows
    if rows[:, 2].any():
        raise MediaError(
            f"{who}: the points of {name} are in space, with z, and these lie in a plane; give the array without z"
        )
    return np.delete(rows, 2, 1)
