"""What a clone promises: the suite needs the default groups alone, the README can be followed, examples do what they say."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import re
import shlex
import sys
import textwrap
import tomllib
import types
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.speed import main as speed

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests", "examples", "multimodal", "tokenizers")
OUR_PACKAGES = {"melodies"}  # the examples of packages, which import themselves
# names that packages are imported by, where the distribution has another; asked of the installed ones besides
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "x_transformers": "x-transformers",
    "vit_pytorch": "vit-pytorch",
}
PEERS = {"transformers", "x-transformers", "vit-pytorch"}


@cache
def default_groups() -> set[str]:
    """Distributions that `uv sync` installs: what the project needs, its default groups, and what those need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    groups = project["tool"]["uv"]["default-groups"]
    left = [Requirement(text) for text in project["project"]["dependencies"]]
    left += [Requirement(text) for group in groups for text in project["dependency-groups"][group]]
    found: set[str] = set()
    while left:
        wanted = left.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            left += [Requirement(text) for text in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:  # of another system
            continue
    return found


@cache
def our_modules() -> set[str]:
    files = {path.stem for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    return files | {"multimodal", "multimodal_tokenizers", "benchmarks", "tests", "examples", "seed_rows", "fake_rows"}


def third_party(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(top-level module, line) of every import of something that is neither Python's nor this repository's."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in our_modules():
                yield top, node.lineno  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _installed() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())


@cache
def distribution(module: str) -> str:
    known = _installed().get(module, [module])
    return canonicalize_name(DISTRIBUTIONS.get(module, known[0]))


def called(function: object) -> set[types.FunctionType]:
    """A function of a row and every function of the benchmarks that it, and what it calls, names."""
    found: set[types.FunctionType] = set()
    left: list[object] = [function]
    while left:
        one = left.pop()
        if isinstance(one, partial):
            left += [one.func, *one.args, *one.keywords.values()]
        elif inspect.isclass(one) and one.__module__.startswith("benchmarks."):
            left += [member for member in vars(one).values() if inspect.isfunction(member)]
        elif inspect.isfunction(one) and one not in found and one.__module__.startswith("benchmarks."):
            found.add(one)
            left += [cell.cell_contents for cell in one.__closure__ or ()]
            tree = _tree(one)
            left += [one.__globals__.get(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)]
            for node in ast.walk(tree):  # functions of other modules, imported inside
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
                    module = importlib.import_module(node.module or "")
                    left += [getattr(module, alias.name) for alias in node.names]
    return found


def _tree(function: types.FunctionType) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # written by `dataclass`
        return ast.Module([], [])


def not_installed() -> list[str]:
    """Imports of tests, examples and the package that the default groups do not install, and nothing guards."""
    default, wrong = default_groups(), []
    for path in [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]:
        tree = ast.parse(path.read_text("utf-8"))
        guarded = {
            str(node.args[0].value).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) == "pytest.importorskip"
            and isinstance(node.args[0], ast.Constant)
        }
        tried = {
            top
            for attempt in ast.walk(tree)
            if isinstance(attempt, ast.Try)
            and any(re.search("Import|ModuleNotFound", ast.unparse(h.type)) for h in attempt.handlers if h.type)
            for top, _ in third_party(ast.Module(attempt.body, []))
        }
        wrong += [
            f"{path.relative_to(ROOT)}:{line}: {top}"
            for top, line in third_party(tree)
            if distribution(top) not in default and top not in guarded | tried | OUR_PACKAGES
        ]
    return wrong


@pytest.mark.slow
def test_fault_00_every_row_of_the_benchmark_declares_what_the_default_groups_lack() -> None:
    default, wrong, seen = default_groups(), [], set()
    assert not PEERS & default
    for _, row in speed.all_rows():
        needed = {
            distribution(module)
            for side in (row.ours, row.theirs, row.report)
            if side is not None
            for function in called(side)
            for module, _ in third_party(_tree(function))
        }
        seen |= needed
        lacking = needed - default - {canonicalize_name(name) for name in row.needs}
        wrong += [f"{row.name}: {', '.join(sorted(lacking))}"] if lacking else []
    assert wrong == []
    assert not_installed() == []
    assert seen >= PEERS  # the walk finds what is imported inside of functions


def produced(command: str) -> set[str]:
    """Paths that a line of the README's list makes."""
    words = shlex.split(command)
    if words[:2] == ["multimodal", "train"]:
        return {words[words.index("--folder") + 1] if "--folder" in words else f"runs/{Path(words[2]).stem}"}
    if words[:2] == ["multimodal", "push"]:
        return {words[3]}  # a name on the hub
    return {
        "examples/train_image_classifier.py": {"runs/digits"},
        "examples/one_model_four_jobs.py": {"runs/four_jobs"},
    }.get(words[0], set())


def listed() -> list[str]:
    """The commands of the README's section on the command line, in their order, without their explanations."""
    section = (ROOT / "README.md").read_text("utf-8").split("## On the command line")[1].split("\n## ")[0]
    section = section.split("With the internet")[0]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    uv run ")]
    return [re.split(r"\s{2,}", line.removeprefix("uv run "))[0] for line in lines]


def test_fault_47_each_line_of_the_readme_uses_only_what_is_there_or_was_made_before() -> None:
    there: set[str] = set()
    commands = listed()
    assert len(commands) > 10
    for command in commands:
        for word in shlex.split(command)[1:]:
            if "/" in word and not word.startswith("-") and word not in produced(command):
                file = word.partition(":")[0]
                made = any(file == path or file.startswith(f"{path}/") for path in there)
                assert made or (ROOT / file).exists(), f"{command}: nothing before it makes {file}"
        there |= produced(command)
    assert there >= {"runs/recipe", "runs/two", "runs/digits", "runs/four_jobs"}


@pytest.mark.slow
def test_fault_47a_the_quick_lines_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys) -> None:
    from multimodal.cli import main

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = []
    for command in listed():
        words = shlex.split(command.replace("steps=200", "steps=2").replace("--processes 2 ", ""))
        if (
            words[0] == "multimodal"
            and words[1] in ("train", "report", "plan", "generate")
            and "runs/four_jobs" not in words
        ):
            words += ["--max-tokens", "4"] if words[1] == "generate" else []
            assert main(words[1:]) == 0, capsys.readouterr().err
            ran.append(words[1])
    assert ran == ["train", "train", "report", "plan", "generate"]


@pytest.fixture
def example():
    """example("image_sets"): a program of examples/ as a module."""
    loaded = []

    def load(name: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        loaded.append(spec.name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


def test_fault_48_pictures_that_are_shown_or_checked_are_of_every_class(example) -> None:
    pictures = example("image_sets").Pictures
    test = pictures([f"{name}{i}" for name in "abc" for i in range(40)], [name for name in "abc" for _ in range(40)])
    assert [sample["image"] for sample in test.some(5)] == ["a0", "b0", "c0", "a1", "b1"]
    assert sorted(sample["image"] for sample in test.some(500)) == sorted(test.images)
    source = (ROOT / "examples" / "train_image_classifier.py").read_text("utf-8")
    assert source.count("test.some(") == 2  # of those shown, and of those of --check


def header(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "examples" / name).read_text("utf-8"))) or ""


def test_fault_45_the_example_of_a_new_kind_trains_as_long_as_its_header_needs(example, monkeypatch, tmp_path) -> None:
    """What it reaches in this number of steps is measured by the test below; here, that a fresh clone trains as long."""
    module = example("new_tokenizer")
    monkeypatch.setenv("MULTIMODAL_DATA", str(tmp_path))
    asked: dict[str, int] = {}

    class Stop(Exception):
        pass

    def fit(*_: object, steps: int, **__: object) -> None:
        asked["steps"] = steps
        raise Stop

    monkeypatch.setattr(module.mm, "fit", fit)
    for arguments, steps in (([], 1000), (["--steps", "7"], 7)):
        with pytest.raises(Stop):
            module.main(arguments)
        assert asked["steps"] == steps
    first = next(line for line in header("new_tokenizer.py").splitlines() if line.strip().startswith("uv run"))
    assert "100 % of 200" in first
    assert "tones" in first  # what a fresh clone gets


@pytest.mark.training
def test_fault_45a_the_example_of_a_new_kind_reaches_what_its_header_says(program, tmp_path) -> None:
    printed = program("examples/new_tokenizer.py", cwd=tmp_path, MULTIMODAL_DATA=str(tmp_path), seconds=1200)
    (line,) = [line for line in printed.splitlines() if line.startswith("tones: ")]
    assert float(line.split()[1].rstrip("%")) >= 99.5


def test_fault_45b_headers_of_the_attention_zoo_agree_with_what_was_measured() -> None:
    """A bar that a program missed is said to be missed where the program is listed, with what was reached."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import seeds

    results = json.loads((ROOT / "benchmarks" / "results" / "seeds.json").read_text("utf-8"))
    table = (ROOT / "examples" / "attention" / "README.md").read_text("utf-8").splitlines()
    missed = {
        row.name
        for row in seeds.ROWS
        for run in results.get(row.of or row.name, {}).values()
        if row.file.startswith("examples/attention/") and not seeds.is_met(row, run["values"])
    }
    assert missed >= {"snail", "soft-captions"}
    for name in missed:
        (line,) = [line for line in table if f"| `{name}` |" in line]
        assert ", missed" in line, f"{name}: {line}"
    snail = results["snail"]["0"]["values"]["SNAIL share right"]
    assert f"SNAIL share right = {snail:.4g} (bar >= 0.72, missed)" in " ".join(header("attention/snail.py").split())
    soft = results["soft-captions"]["0"]["values"]
    captions = " ".join(header("attention/captions.py").split())
    assert f"exact = {soft['exact']:.4g} (bar >= 0.9, missed; " in captions
    assert f"pointing = {soft['pointing']:.4g} (bar >= 0.95, missed)" in captions
