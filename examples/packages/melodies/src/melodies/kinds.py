"""Melodies: pitches and lengths, a token for each note."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import multimodal as mm

LENGTHS = (1, 2, 4, 8)  # sixteenths of a note


@dataclass(frozen=True)
class Melody(mm.Tokenizer):
    """A list of (pitch, sixteenths), or the path of a .melody file with such a pair a line.

    lowest: the lowest pitch, as MIDI numbers it.
    pitches: number of pitches from there on.
    """

    lowest: int = 48
    pitches: int = 36

    @property
    def vocab_size(self) -> int:
        return self.pitches * len(LENGTHS)

    def encode(self, value: Any) -> mm.Tokens:
        if isinstance(value, (str, Path)) and str(value).endswith(".melody"):
            value = [tuple(map(int, line.split())) for line in Path(value).read_text(encoding="utf-8").splitlines()]
        if type(value) is not list or not value:
            raise mm.MediaError(f"Melody.encode: wanted a list of (pitch, sixteenths), not {type(value).__name__}")
        return mm.Tokens(torch.tensor(list(self._ids(value))), self.places(len(value)))

    def _ids(self, value: list[Any]) -> Iterator[int]:
        for pitch, length in value:
            if not 0 <= pitch - self.lowest < self.pitches or length not in LENGTHS:
                highest = self.lowest + self.pitches - 1
                raise mm.MediaError(
                    f"Melody.encode: ({pitch}, {length}): wanted a pitch of {self.lowest} to {highest} and a length in {LENGTHS}"
                )
            yield (pitch - self.lowest) * len(LENGTHS) + LENGTHS.index(length)

    def decode(self, tokens: mm.Tokens) -> list[tuple[int, int]]:
        return [(self.lowest + i // len(LENGTHS), LENGTHS[i % len(LENGTHS)]) for i in tokens.content.tolist()]

    def write(self, value: Any, path: str | Path) -> Path:
        path = Path(path).with_suffix(".melody")
        path.write_text("".join(f"{pitch} {length}\n" for pitch, length in value), encoding="utf-8")
        return path

    def token_names(self, tokens: mm.Tokens) -> list[str]:
        return [f"pitch {pitch}, {length}/16" for pitch, length in self.decode(tokens)]
