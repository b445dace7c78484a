"""examples/packages: an installed kind is found by its checkpoints, also by those saved before the class moved."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import multimodal as mm
from multimodal import declare

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "examples" / "packages" / "melodies"
TASK = "melody -> answer:melody"
SAMPLE = {"melody": [(60, 4), (62, 4)]}


def installed(folder: Path, module: str, points: dict[str, str]) -> Path:
    """The package in a folder as an installer leaves it, the class in this module; no network and no build are needed."""
    data = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.copytree(PACKAGE / "src" / "melodies", folder / "melodies")
    if module != "kinds":
        (folder / "melodies" / "kinds.py").rename(folder / "melodies" / f"{module}.py")
        (folder / "melodies" / "__init__.py").write_text(f"from melodies.{module} import Melody\n", encoding="utf-8")
    about = folder / f"multimodal_melodies-{data['version']}.dist-info"
    about.mkdir()
    names = f"Metadata-Version: 2.1\nName: {data['name']}\nVersion: {data['version']}\n"
    (about / "METADATA").write_text(names, encoding="utf-8")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (about / "entry_points.txt").write_text(f"[multimodal.tokenizers]\n{lines}", encoding="utf-8")
    return folder


def points() -> dict[str, str]:
    data = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))
    return data["project"]["entry-points"]["multimodal.tokenizers"]


@pytest.fixture
def use(monkeypatch):
    """A function that puts one folder with the package on the path, and forgets another that was there."""

    def put(folder: Path) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "melodies"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(
            declare, "_defined", {k: v for k, v in declare._defined.items() if not k.startswith("melodies")}
        )
        monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if "melodies_at" not in p)])
        importlib.invalidate_caches()

    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] == "melodies"]:
        del sys.modules[name]


def test_a_checkpoint_of_a_class_that_moved_loads_where_the_new_package_is_installed(tmp_path, use):
    old = installed(tmp_path / "melodies_at_0.1", "notes", {"Melody": "melodies.notes:Melody"})
    use(old)
    kind = importlib.import_module("melodies.notes").Melody()
    model = mm.Model({"melody": kind}, mm.Core(width=16, depth=1, heads=2), [TASK]).eval()
    wanted = model.generate(TASK, [SAMPLE], max_tokens=5)[0].value
    model.save(tmp_path / "m")
    assert "melodies.notes:Melody" in (tmp_path / "m" / "config.json").read_text(encoding="utf-8")

    use(tmp_path / "melodies_at_nowhere")  # not installed
    with pytest.raises(mm.CheckpointError, match=r"'melodies\.notes:Melody' is not installed.*mm\.alias"):
        mm.Model.load(tmp_path / "m")

    moved = {name: value for name, value in points().items() if ":" not in name}
    use(installed(tmp_path / "melodies_at_0.2_without", "kinds", moved))  # moved, and nobody said so
    with pytest.raises(mm.CheckpointError, match=r"mm\.alias\('melodies\.notes:Melody', NewClass\)"):
        mm.Model.load(tmp_path / "m")

    use(installed(tmp_path / "melodies_at_0.2", "kinds", points()))
    again = mm.Model.load(tmp_path / "m").eval()  # nobody has imported melodies
    assert type(again.packer.tokenizers["melody"]).__module__ == "melodies.kinds"
    assert again.generate(TASK, [SAMPLE], max_tokens=5)[0].value == wanted
    again.save(tmp_path / "n")
    assert "melodies.kinds:Melody" in (tmp_path / "n" / "config.json").read_text(encoding="utf-8")


PLAIN = """
import sys

def test_nothing_of_ours_is_loaded():
    assert not [name for name in sys.modules if name.partition(".")[0] in ("multimodal", "torch")]
"""
BROKEN = '''
import multimodal as mm
from melodies import Melody


class Hears(Melody):
    """Drops the last note."""

    def encode(self, value):
        return super().encode(value[:-1] if type(value) is list and len(value) > 1 else value)


test_hears = mm.check.tests(Hears(), lambda: [[(60, 4), (62, 4), (64, 8)], [(67, 2), (60, 8)]])
'''


@pytest.mark.slow
def test_one_line_in_a_test_file_is_a_test_for_each_check(tmp_path):
    folder = installed(tmp_path / "site", "kinds", points())
    shutil.copytree(PACKAGE / "tests", tmp_path / "tests")
    (tmp_path / "tests" / "test_hears.py").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "test_plain.py").write_text(PLAIN, encoding="utf-8")
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tokenizers")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}

    def pytest_of(*arguments: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout

    chosen = "trains or nothing_lost or declared or decode_gives_value or file_holds_value"
    out = pytest_of("tests", "-k", chosen, "-rfs")
    assert "1 failed, 16 passed, 3 skipped" in out, out
    assert "FAILED tests/test_hears.py::test_hears[nothing_lost]" in out
    assert "multimodal.check.report.ConformanceError: nothing_lost: list" in out
    assert "needs nothing_lost" in out
    assert "1 passed" in pytest_of("plain")
