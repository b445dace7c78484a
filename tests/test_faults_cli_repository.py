"""What a clone promises: the suite needs the default groups alone, the README's commands can be followed, examples do what they say."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import sys
import textwrap
import tomllib
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.speed import main as speed
from benchmarks.speed.row import Row

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("tests", "examples", "multimodal", "tokenizers")
# names that packages are imported by, where the distribution has another; asked of the installed ones besides
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "x_transformers": "x-transformers",
    "vit_pytorch": "vit-pytorch",
}
PEERS = {"transformers", "x-transformers", "vit-pytorch"}


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


def third_party(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(top-level module, line) of every import of something that is neither Python's nor this repository's."""
    ours = {path.stem for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    ours |= {"multimodal", "multimodal_tokenizers", "benchmarks", "tests", "examples", "seed_rows"}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in ours:
                yield top, node.lineno  # pyright: ignore[reportAttributeAccessIssue]


def distribution(module: str) -> str:
    known = importlib.metadata.packages_distributions().get(module, [module])
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
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def test_fault_00_every_row_of_the_benchmark_declares_what_the_default_groups_lack() -> None:
    default, wrong, seen = default_groups(), [], set()
    assert not PEERS & default
    for _, row in speed.all_rows():
        assert isinstance(row, Row)
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
    assert seen >= PEERS  # the walk finds what is imported inside of functions


def test_fault_00a_what_is_imported_anywhere_is_installed_by_the_default_groups() -> None:
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
            if distribution(top) not in default and top not in guarded | tried
        ]
    assert wrong == []
