"""A format that traces nothing: programs run as the modules they are, so that most of an export is tested in no time."""

from pathlib import Path

import pytest

from multimodal.export import formats
from multimodal.export.compare import RunProgram
from multimodal.export.programs import Program


class Untraced(formats.Format):
    ending = ".pt2"

    def __init__(self) -> None:
        self.made: dict[str, Program] = {}

    def write(self, program: Program, path: Path) -> None:
        path.touch()
        self.made[program.name] = program

    def read(self, paths: dict[str, Path]) -> RunProgram:
        assert all(path.is_file() for path in paths.values())
        return lambda name, inputs: self.made[name](inputs)


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> Untraced:
    """The format pt2 writes empty files."""
    form = Untraced()
    monkeypatch.setitem(formats.FORMATS, "pt2", form)
    return form
