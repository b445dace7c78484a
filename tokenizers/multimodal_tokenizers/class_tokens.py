"""Learned tokens before those of another tokenizer, and learned positions of both, as in vision transformers."""

from dataclasses import dataclass
from math import pi
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.shapes import ConfigError, MediaError, StreamError, check_whole
from multimodal.texts import shortened
from multimodal.tokenizer import Places, Tokenizer, Tokens, at_times

RESAMPLE: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "bicubic"},
    "antialiased": {"mode": "bicubic", "antialias": True},  # whose cubic coefficient is -0.5, and -0.75 without
    "bilinear": {"mode": "bilinear"},
    "nearest": {},
}


@dataclass(frozen=True)
class ClassTokens(Tokenizer):
    """`count` learned tokens, then the tokens of `of`: a class token (Dosovitskiy et al. 2021), a distillation token (Touvron
    et al. 2021), registers (Darcet et al. 2023).

    The learned tokens have the first `count` times, and the value's own times begin after them. A grid of learned positions is
    resized to the rows and columns of each value, whose tokens must come row by row.

    of: the tokenizer of the values, whose embedding must not depend on places.
    count: number of learned tokens.
    placed: how many of them, the first ones, have learned positions too.
    table: rows and columns of the grid of learned positions; None: there is none.
    resample: how the grid is resized: "bicubic" (transformers), "antialiased" bicubic (timm), "bilinear", or "nearest": a token has
        the position of the grid's cell that its row and column fall into (Dehghani et al. 2023; Idefics 3, SmolVLM).
    turns: rows and columns are measured from the middle of a value, and span this many turns of the fastest rotary pair to either
        side, whatever its size (Simeoni et al. 2025); None: they are counted from 0.
    """

    of: Tokenizer
    count: int = 1
    placed: int = 0
    table: tuple[int, int] | None = None
    resample: Literal["bicubic", "antialiased", "bilinear", "nearest"] = "bicubic"
    turns: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.of, Tokenizer):
            raise ConfigError(
                f"ClassTokens: of is {shortened(repr(self.of), 100)}, not a Tokenizer made by its constructor"
            )
        if self.of.classes or self.of.files():
            raise ConfigError(f"ClassTokens: of={type(self.of).__name__} has classes or files, which is not supported")
        check_whole("ClassTokens", least=0, count=self.count, placed=self.placed)
        if self.placed > self.count:
            raise ConfigError(f"ClassTokens: placed={self.placed} is more than count={self.count}")
        if self.table is not None:
            object.__setattr__(self, "table", table := tuple(self.table))
            if len(table) != 2 or not all(type(side) is int and side > 0 for side in table):
                raise ConfigError(f"ClassTokens: table={table} is not rows and columns, such as (14, 14)")
        if self.resample not in RESAMPLE:
            raise ConfigError(f"ClassTokens: resample={self.resample!r} must be one of {', '.join(RESAMPLE)}")
        if self.turns is not None and (self.table is not None or not self.turns > 0):
            raise ConfigError(f"ClassTokens: turns={self.turns} must be above 0, and needs table=None")

    @property
    def vocab_size(self) -> int | None:
        return self.of.vocab_size

    @property
    def feature_size(self) -> int | None:
        return self.of.feature_size

    @property
    def learned(self) -> int:
        return self.count

    @property
    def causal(self) -> bool:
        return self.of.causal

    @property
    def lossy(self) -> bool:
        return self.of.lossy

    @property
    def axes(self) -> tuple[str, ...]:
        return self.of.axes

    @property
    def relations(self) -> tuple[str, ...]:
        return self.of.relations

    @property
    def step(self) -> tuple[float, ...]:
        return self.of.step

    def encode(self, value: Any) -> Tokens:
        try:
            tokens = self.of(value)
        except ValueError as error:
            raise MediaError(f"ClassTokens.encode: {shortened(str(error), 1000)}") from error
        position_NA = tokens.position_NA.clone()
        if self.turns is not None:
            for axis in (1, 2):
                step = self.step[axis]
                place_N = position_NA[:, axis] / step
                size = place_N.max().round() + 1
                position_NA[:, axis] = 2 * pi * self.turns * (2 * ((place_N + 0.5) / size) - 1) * step
        position_NA[:, 0] += self.count * self.step[0]
        first_NA = at_times(torch.arange(self.count) * self.step[0], self.axes)
        empty = tokens.content.new_zeros(self.count, *tokens.content.shape[1:])
        pairs = None if tokens.pairs is None else tokens.pairs + torch.tensor([self.count, self.count, 0])
        return Tokens(torch.cat([empty, tokens.content]), torch.cat([first_NA, position_NA]), pairs)

    def places(self, count: int) -> Tensor:
        raise ConfigError("ClassTokens: this kind can be read but not written")

    def answered(self, tokens: Tokens) -> Tensor:
        return torch.cat([torch.zeros(self.count, dtype=torch.bool), self.of.answered(self._own(tokens))])

    def token_names(self, tokens: Tokens) -> list[str]:
        first = ["class token"] if self.count == 1 else [f"learned {i}" for i in range(self.count)]
        return first + self.of.token_names(self._own(tokens))

    def picture(self, tokens: Tokens) -> Tensor | None:
        return self.of.picture(self._own(tokens))

    def _own(self, tokens: Tokens) -> Tokens:
        """The tokens as `of` gave them."""
        position_NA = tokens.position_NA[self.count :].clone()
        position_NA[:, 0] -= self.count * self.step[0]
        if self.turns is not None:
            for axis in (1, 2):
                position_NA[:, axis] = position_NA[:, axis].unique(return_inverse=True)[1] * self.step[axis]
        return Tokens(tokens.content[self.count :], position_NA)

    def embed(self, width: int) -> nn.Module:
        return _Embed(self, width)


class _Embed(nn.Module):
    """The embedding of `of`, the learned tokens, and the learned positions: of the first `placed` tokens, then of the grid."""

    reads_places = True  # where a value begins, and how large it is

    def __init__(self, tokenizer: ClassTokens, width: int) -> None:
        super().__init__()
        self.of = tokenizer.of.embed(width)
        if getattr(self.of, "reads_places", False):
            raise ConfigError(
                f"ClassTokens: the embedding of {type(tokenizer.of).__name__} depends on places, and a learned token has none"
            )
        self.full_precision = getattr(self.of, "full_precision", False)
        self.placed, self.table, self.resample = tokenizer.placed, tokenizer.table, RESAMPLE[tokenizer.resample]
        self.count = tokenizer.count
        rows, columns = tokenizer.table or (0, 0)
        self.tokens_ND = nn.Parameter(torch.randn(tokenizer.count, width) * 0.02) if tokenizer.count else None
        positions = tokenizer.placed + rows * columns
        self.positions_ND = nn.Parameter(torch.randn(positions, width) * 0.02) if positions else None

    def forward(self, content: Tensor, places: Places) -> Tensor:
        length_B = torch.tensor(places.lengths, device="cpu")
        end_B = length_B.cumsum(0)
        learned_T = torch.zeros(int(end_B[-1]), dtype=torch.bool, device="cpu")
        first_BN = (end_B - length_B)[:, None] + torch.arange(self.count, device="cpu")
        learned_T[first_BN.flatten()] = True
        row_N = (~learned_T).nonzero()[:, 0].to(content.device)
        embedded_ND = self.of(content[row_N])
        if self.table is not None:
            embedded_ND = embedded_ND + self._grids(places).to(embedded_ND.dtype)
        if self.tokens_ND is None:
            return embedded_ND
        stream_TD = embedded_ND.new_zeros(len(learned_T), embedded_ND.shape[1]).index_copy(0, row_N, embedded_ND)
        tokens_ND = self.tokens_ND
        if self.placed and self.positions_ND is not None:
            tokens_ND = tokens_ND + F.pad(self.positions_ND[: self.placed], (0, 0, 0, self.count - self.placed))
        tokens_ND = tokens_ND.to(embedded_ND.dtype).repeat(len(places.lengths), 1)
        return stream_TD.index_copy(0, first_BN.flatten().to(content.device), tokens_ND)

    def padded(self, content: Tensor, position_BNA: Tensor, length_B: Tensor) -> Tensor:
        """The same for values side by side (B, N), padded behind; every size may differ from value to value and is computed."""
        batch, count = content.shape[:2]
        embedded_BND = self.of(content.flatten(0, 1)).view(batch, count, -1)
        index_N = torch.arange(count, device=content.device)
        if self.table is not None:
            assert self.positions_ND is not None
            there_BN = index_N < length_B[:, None]
            row_B = position_BNA[..., 1].masked_fill(~there_BN, 0.0).amax(1)
            rows_B = (row_B + 1).round().long().clamp(min=1)
            columns_B = ((length_B - self.count) // rows_B).clamp(min=1)
            # padding counts as the last cell, since beyond the grid no cell of the table has a share
            cell_BN = torch.minimum(
                (index_N - self.count).clamp(min=0).expand(batch, count), (rows_B * columns_B - 1)[:, None]
            )
            down_BNY = self._shares(self.table[0], cell_BN // columns_B[:, None], rows_B)
            along_BNX = self._shares(self.table[1], cell_BN % columns_B[:, None], columns_B)
            share_BNF = (down_BNY[..., None] * along_BNX[..., None, :]).flatten(2)
            embedded_BND = embedded_BND + share_BNF @ self.positions_ND[self.placed :]
        if self.tokens_ND is None:
            return embedded_BND
        learned_ND = self.tokens_ND
        if self.placed and self.positions_ND is not None:
            learned_ND = learned_ND + F.pad(self.positions_ND[: self.placed], (0, 0, 0, self.count - self.placed))
        return torch.where((index_N < self.count)[:, None], learned_ND[index_N.clamp(max=self.count - 1)], embedded_BND)

    def _shares(self, have: int, place_BN: Tensor, size_B: Tensor) -> Tensor:
        """(B, N, have): the share that each cell of a side of the table has in the cell `place_BN` of a side of `size_B` cells, as
        F.interpolate has them."""
        cell_F = torch.arange(have, dtype=torch.float32, device=place_BN.device)
        size_B1 = size_B[:, None].float()
        if not self.resample:
            fraction_BN = (place_BN * (1.0 / size_B1)).clamp(max=1 - 1e-6)
            edge_F = torch.arange(1 / have, 1.0, 1 / have, device=place_BN.device)
            return ((edge_F <= fraction_BN[..., None]).sum(-1, keepdim=True) == cell_F).float()
        scale_B1 = have / size_B1
        centre_BN1 = (scale_B1 * (place_BN + 0.5))[..., None]
        if self.resample.get("antialias"):
            wide_B11 = scale_B1.clamp(min=1)[..., None]  # a smaller grid averages over more cells
            first_BN1 = (centre_BN1 - 2 * wide_B11 + 0.5).floor().clamp(min=0)
            last_BN1 = (centre_BN1 + 2 * wide_B11 + 0.5).floor().clamp(max=have)
            share_BNF = _cubic((cell_F + 0.5 - centre_BN1) / wide_B11, -0.5)
            share_BNF = torch.where((cell_F >= first_BN1) & (cell_F < last_BN1), share_BNF, 0.0)
            return share_BNF / share_BNF.sum(-1, keepdim=True)
        source_BN1 = centre_BN1 - 0.5
        if self.resample["mode"] == "bilinear":
            return (1 - (source_BN1.clamp(0, have - 1) - cell_F).abs()).clamp(min=0)
        first_BN1 = source_BN1.floor()
        share_BNF = torch.zeros_like(cell_F)
        for step in (-1, 0, 1, 2):  # what lies beyond the table counts as its edge
            share_BN1 = _cubic(first_BN1 + step - source_BN1, -0.75)
            share_BNF = share_BNF + torch.where((first_BN1 + step).clamp(0, have - 1) == cell_F, share_BN1, 0.0)
        return share_BNF

    def _grids(self, places: Places) -> Tensor:
        """The positions of the tokens of all values, end to end."""
        assert self.table is not None
        assert self.positions_ND is not None
        table_ND = self.positions_ND[self.placed :]
        # the cells of a grid of the table's own size are not always its own, since they are found in float32
        known: dict[tuple[int, int], Tensor] = {self.table: table_ND} if self.resample else {}
        found = []
        for length, extent in zip(places.lengths, places.extents, strict=True):
            rows = extent[1]
            columns, rest = divmod(length - self.count, rows)
            if rest:
                raise StreamError(f"ClassTokens: {length - self.count} tokens are no grid of {rows} rows")
            grid = (rows, columns)
            if not self.resample and grid not in known:
                cells = [_cells(have, size).to(table_ND.device) for have, size in zip(self.table, grid, strict=True)]
                known[grid] = table_ND[(cells[0][:, None] * self.table[1] + cells[1]).flatten()]
            if grid not in known:
                # bicubic weights of half precision would shift the positions
                table_DYX = table_ND.float().unflatten(0, self.table).permute(2, 0, 1)
                resized = F.interpolate(table_DYX[None], size=grid, align_corners=False, **self.resample)[0]
                known[grid] = resized.flatten(1).T
            found.append(known[grid])
        return torch.cat(found)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """The kernel of cubic convolution (Keys 1981, equation 4)."""
    x = distance.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def _cells(have: int, size: int) -> Tensor:
    """For each of `size` rows the one of `have` rows of a table that it falls into, in float32 as Idefics 3 was trained."""
    fraction_N = (
        torch.arange(size, dtype=torch.float32, device="cpu") * (1.0 / torch.tensor(size, device="cpu"))
    ).clamp(max=1 - 1e-6)
    edges = torch.arange(1 / have, 1.0, 1 / have, device="cpu")
    return torch.bucketize(fraction_N, edges, right=True)
