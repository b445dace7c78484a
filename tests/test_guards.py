"""Rules that no single module can keep: who imports whom, axis letters, entry points, one version, no code from data."""

import ast
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmarks import house
from multimodal.shapes import LEGEND
from multimodal.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LARGEST_FILE = 2_000_000  # bytes

LAYERS = (
    {
        "texts",
        "shapes",
        "declare",
        "files",
        "value_files",
        "notebook",
        "progress",
        "saving",
        "process_state",
        "old_names",
        "hub",
        "versions",
    },
    {"tokenizer", "composite", "masks", "relations", "positions", "norm", "media"},
    {"attention"},
    {"layers"},
    {"pattern"},
    {"core", "encoder_decoder", "heads"},
    {"task"},
    {"stream", "packer"},
    {"network", "model_parts", "tower"},
    {"checkpoint", "generate", "model", "retrieval", "data", "lora", "quantization", "measures", "augment"},
    {"train"},
    {"count", "look", "transcription", "check", "pretrained", "export", "serve", "card", "publish", "sklearn"},
    {"demo", "start"},
    {"zoo"},
    {""},  # multimodal/__init__.py, which gathers the public names
    {"cli", "__main__"},
)
"""Parts of `multimodal`, lowest first. A part imports from its own layer and from lower ones, never in a circle.

Imports inside functions count, and those for type checkers too.
"""
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}
OPEN_TO_TOKENIZERS = 1
"""The highest layer that `multimodal_tokenizers` may use: what a stranger's tokenizer needs, and no more."""
WITH_TOKENIZERS = {"pretrained", "demo", "sklearn", "start"}
"""Parts that name the tokenizers of this project: trained weights belong to their preprocessing, the demo and the estimators of
scikit-learn declare models, and the quick path chooses one."""
OUTSIDE = {"multimodal_tokenizers", "examples", "benchmarks", "tests"}
CORE = ("model", "generate", "train")
"""Where the core starts: it is all that these parts reach by imports."""
ABOVE_CORE = {
    "look",
    "transcription",
    "check",
    "count",
    "zoo",
    "cli",
    "pretrained",
    "export",
    "serve",
    "tower",
    "card",
    "publish",
    "demo",
    "sklearn",
    "start",
}
"""Parts that the core never imports, so that each can change, or go, without it."""
MAY_PRINT = ("cli", "__main__", "check", "train", "start")


def python_files(folder: str) -> Iterator[tuple[str, str]]:
    """(dotted module, source) of everything below a folder of the repository; a package is named without `__init__`."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to((ROOT / folder).parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text(encoding="utf-8")


FRAMEWORK = dict(python_files("multimodal"))
KINDS = dict(python_files("tokenizers/multimodal_tokenizers"))


@cache
def imports_in(source: str) -> tuple[tuple[ast.Import | ast.ImportFrom, bool], ...]:
    """Every import, and whether it runs: those under `if TYPE_CHECKING:` do not."""
    tree = ast.parse(source)
    unreal = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    return tuple(
        (node, id(node) not in unreal) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
    )


def imports(module: str, source: str, modules: set[str], types: bool = True) -> Iterator[tuple[int, str, str]]:
    """(line, module imported, name taken from it or '') of every import; with types=False only of those that run."""
    for node, runs in imports_in(source):
        if not runs and not types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        else:
            base = node.module or ""
            if node.level:
                package = (
                    module if any(name.startswith(module + ".") for name in modules) else module.rpartition(".")[0]
                )
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, *filter(None, [base])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (node.lineno, whole, "") if whole in modules else (node.lineno, base, alias.name)


def part_of(module: str) -> str:
    """'multimodal.attention.plan' -> 'attention'."""
    return module.split(".")[1] if "." in module else ""


def framework_violations(sources: dict[str, str]) -> list[str]:
    """Imports of `multimodal` that go up or out, and a circle of imports that run.

    Circles that imports for type checkers close are found by `circles` of benchmarks/house.py.
    """
    found, edges = [], {}
    modules = set(sources)
    for module, source in sources.items():
        if part_of(module) not in LEVEL:
            found.append(f"{module}: give this part a layer in LAYERS of tests/test_guards.py")
            continue
        edges[module] = set()
        running_imports = {target for _, target, _ in imports(module, source, modules, types=False)}
        for line, target, _ in imports(module, source, modules):
            top = target.split(".")[0]
            if top in OUTSIDE and not (top == "multimodal_tokenizers" and part_of(module) in WITH_TOKENIZERS):
                found.append(f"{module}:{line} imports {target}, which lies outside the framework")
            if top != "multimodal" or part_of(target) not in LEVEL:
                continue
            if LEVEL[part_of(target)] > LEVEL[part_of(module)]:
                found.append(f"{module}:{line} imports {target}, which is higher")
            # a package's own parts run after its first line
            if target in running_imports and not module.startswith(target + "."):
                edges[module].add(target)
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append("a circle: " + " <- ".join(error.args[1]))
    return found


def tokenizer_violations(sources: dict[str, str]) -> list[str]:
    """Imports of `multimodal_tokenizers` that a stranger's package should not need."""
    found = []
    modules = set(sources) | set(FRAMEWORK)
    for module, source in sources.items():
        for line, target, name in imports(module, source, modules):
            top = target.split(".")[0]
            if top in OUTSIDE - {"multimodal_tokenizers"}:
                found.append(f"{module}:{line} imports {target}")
            if top == "multimodal" and LEVEL.get(part_of(target), len(LAYERS)) > OPEN_TO_TOKENIZERS:
                found.append(f"{module}:{line} imports {target}, which is above the tokenizer's contract")
            if top == "multimodal" and name.startswith("_"):
                found.append(f"{module}:{line} imports the private name {name} of {target}")
    return found


def names(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every argument and of everything assigned to, attributes too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def foreign_axes(source: str) -> list[str]:
    """Names such as `x_TQ` whose suffix has letters outside the legend; CONSTANTS_IN_CAPITALS have no suffix."""
    found = []
    for line, name in names(source):
        match = re.fullmatch(r"_*[a-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*_([A-Z]+)", name)
        if match and (foreign := sorted(set(match[1]) - set(LEGEND))):
            found.append(f"line {line}: {name} has {', '.join(foreign)}")
    return found


def prints(source: str) -> list[int]:
    """Lines that call `print`."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def in_new_python(code: str) -> str:
    """What `code` writes to stdout in a fresh interpreter, from the repository's root; nothing may go to stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_the_framework_imports_downwards():
    assert len(FRAMEWORK) > 20
    assert framework_violations(FRAMEWORK) == []


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("multimodal.masks", "from multimodal.core import Core", "higher"),
        ("multimodal.masks", "from multimodal import core", "higher"),
        ("multimodal.masks", "from . import core", "higher"),
        ("multimodal.masks", "def later():\n    import multimodal.model", "higher"),
        ("multimodal.masks", "import multimodal as mm", "higher"),
        ("multimodal.attention.scores", "from ..train.fit import fit", "higher"),
        ("multimodal.cli", "import multimodal_tokenizers.text", "outside"),
        ("multimodal.positions", "from multimodal.media import log", "circle"),
        ("multimodal.new_part", "import math", "give this part a layer"),
    ],
)
def test_a_planted_import_is_found(module: str, line: str, problem: str):
    planted = dict(FRAMEWORK)
    planted["multimodal.media"] += "\nfrom multimodal.positions import rotate\n"
    assert framework_violations(planted) == []
    planted[module] = planted.get(module, "") + "\n" + line + "\n"
    found = framework_violations(planted)
    assert found
    assert all(problem in text or "circle" in text for text in found)  # an import upwards mostly closes a circle too


def test_an_import_upwards_for_type_checkers_is_found():
    planted = FRAMEWORK | {"multimodal.masks": "if TYPE_CHECKING:\n    from multimodal.model import Model\n"}
    assert framework_violations(planted) == ["multimodal.masks:2 imports multimodal.model, which is higher"]


def test_no_modules_import_one_another():
    """In multimodal, multimodal_tokenizers and benchmarks; imports for type checkers count, those inside functions do not."""
    assert house.circles() == []


CIRCLES = {
    "of imports that run": {"a": "from room import b", "b": "import room.a"},
    "closed for types": {"a": "from room.b import B", "b": "if TYPE_CHECKING:\n    from room.a import A"},
    "for types alone": {
        "a": "if TYPE_CHECKING:\n    from room.b import B",
        "b": "if TYPE_CHECKING:\n    from .a import A",
    },
    "of scripts that find one another in their folder": {"a": "import b", "b": "from a import A"},
}


@pytest.mark.parametrize("sources", CIRCLES.values(), ids=CIRCLES)
def test_a_planted_circle_is_found(tmp_path: Path, sources: dict[str, str]):
    for name, source in {**sources, "__init__": "", "c": "from room import a"}.items():
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    assert house.circles({"room": tmp_path}) == [("room.a", "room.b")]


def test_circles_are_looked_for_in_every_folder_of_ours():
    assert {"multimodal", "multimodal_tokenizers", "benchmarks"} <= set(house.PACKAGES)
    assert {"multimodal.model", "multimodal_tokenizers.text", "benchmarks.house"} <= set(
        house.modules_of(house.PACKAGES)
    )


def reached_by_core(sources: dict[str, str]) -> set[str]:
    """Parts of `multimodal` that model, generate and train reach by any import, also one inside a function or for types."""
    modules, found = set(sources), set()
    ahead = [module for module in modules if part_of(module) in CORE]
    while ahead:
        module = ahead.pop()
        if module not in found:
            found.add(module)
            targets = {target for _, target, _ in imports(module, sources[module], modules)} & modules
            # to import multimodal.attention.plan runs multimodal.attention first
            ahead += [*targets, *(name for name in modules if module.startswith(name + "."))]
    return {part_of(module) for module in found}


def test_the_core_never_imports_what_stands_on_it():
    reached = reached_by_core(FRAMEWORK)
    assert {"attention", "core", "files", "heads", "packer", *CORE} <= reached
    assert reached & ABOVE_CORE == set()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("multimodal.model", "from multimodal.look import xray"),
        ("multimodal.attention.scores", "def later():\n    import multimodal.check"),
        ("multimodal.generate.engine", "if TYPE_CHECKING:\n    from ..transcription import Listener"),
        ("multimodal.train", "from multimodal import zoo"),
    ],
)
def test_a_planted_import_of_what_stands_on_the_core_is_found(module: str, line: str):
    planted = FRAMEWORK | {module: FRAMEWORK[module] + f"\n{line}\n"}
    assert reached_by_core(planted) & ABOVE_CORE


def imports_of_zoo(sources: dict[str, str]) -> list[str]:
    """Imports of `multimodal.zoo` from outside it."""
    modules = set(sources)
    return [
        f"{module}:{line} imports {target}"
        for module, source in sources.items()
        if part_of(module) != "zoo"
        for line, target, _ in imports(module, source, modules)
        if part_of(target) == "zoo"
    ]


def test_nothing_imports_the_zoo():
    assert "multimodal.zoo" in FRAMEWORK
    assert imports_of_zoo(FRAMEWORK) == []
    planted = FRAMEWORK | {"multimodal.cli": "def later():\n    from multimodal.zoo.pruning import pruned\n"}
    assert imports_of_zoo(planted) == ["multimodal.cli:2 imports multimodal.zoo.pruning"]


def test_no_module_is_hidden_behind_a_name_of_its_package():
    assert house.hidden() == []


def test_a_planted_name_that_hides_a_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "fit.py").write_text("def fit(): ...", encoding="utf-8")
    (tmp_path / "loop.py").write_text("def train(): ...", encoding="utf-8")
    (tmp_path / "__init__.py").write_text("from room.fit import fit\nfrom room.loop import train\n", encoding="utf-8")
    monkeypatch.setattr(house, "LIBRARY", {"room": tmp_path})
    assert house.hidden() == ["room.fit"]


def test_tokenizers_import_only_the_contract():
    assert len(KINDS) >= 5
    assert tokenizer_violations(KINDS) == []


@pytest.mark.parametrize(
    "line",
    [
        "from multimodal.packer import Packer",
        "import multimodal",
        "from multimodal import model",
        "from multimodal.media import _opened",
        "import tests.helpers",
    ],
)
def test_a_planted_import_of_a_tokenizer_is_found(line: str):
    assert len(tokenizer_violations({"multimodal_tokenizers.mine": line})) == 1


@pytest.mark.parametrize("module", [*FRAMEWORK, *KINDS])
def test_axis_letters_are_in_the_legend(module: str):
    assert foreign_axes((FRAMEWORK | KINDS)[module]) == []


def test_suffixes_are_met_and_planted_letters_found():
    met = [name for source in FRAMEWORK.values() for _, name in names(source) if re.search("_[A-Z]+$", name)]
    assert {"stream_TD", "k_BMGK", "position_NA"} <= set(met)
    assert foreign_axes("def f(x_TQ, /): ...") == ["line 1: x_TQ has Q"]
    assert foreign_axes("for y_NZW in []:\n    self.cache_BE = 1") == [
        "line 1: y_NZW has W, Z",
        "line 2: cache_BE has E",
    ]
    assert foreign_axes("TOKENIZER_CHECKS = _LONG_NAME = PREFIX_LM = lr = plain_name = x_TD = 1") == []


def test_the_folder_tokenizers_stays_a_bare_source_root():
    assert [path.name for path in (ROOT / "tokenizers").iterdir() if path.suffix in (".py", ".pyi")] == []
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import tokenizers; print(tokenizers.__file__); print(tokenizers.Tokenizer.__module__)"
    )
    file, module = in_new_python(code).split()
    assert not Path(file).is_relative_to(ROOT / "tokenizers")
    assert module == "tokenizers"


ENTRY_POINTS = PYPROJECT["project"]["entry-points"]["multimodal.tokenizers"]


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_are_tokenizers(name: str):
    module, _, attribute = ENTRY_POINTS[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert issubclass(found, Tokenizer)
    assert found.__name__ == name


def test_every_tokenizer_we_ship_is_an_entry_point():
    shipped = importlib.import_module("multimodal_tokenizers")
    assert sorted(ENTRY_POINTS) == sorted(shipped.__all__)


def test_a_checkpoint_finds_entry_points_that_nobody_imported():
    installed = {point.name: point.value for point in importlib.metadata.entry_points(group="multimodal.tokenizers")}
    for name, value in ENTRY_POINTS.items():
        assert installed.get(name) == value, (
            "the installed metadata are old; run `uv sync --reinstall-package multimodal-stream`"
        )
    code = (
        "import sys\nfrom multimodal.declare import find\n"
        "assert 'multimodal_tokenizers' not in sys.modules\n"
        f"print(*(find(value).__name__ for value in {list(ENTRY_POINTS.values())!r}))"
    )
    assert in_new_python(code).split() == list(ENTRY_POINTS)


def test_the_version_has_one_owner_and_a_changelog():
    headings = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == PYPROJECT["project"]["version"]
    assert len(set(headings)) == len(headings)


def tracked_files() -> list[Path]:
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_are_small_and_have_no_lock():
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    assert [str(path) for path in files if path.stat().st_size > LARGEST_FILE] == []
    assert ROOT / "uv.lock" not in files


def test_only_the_command_line_and_training_print():
    quiet = {module: source for module, source in FRAMEWORK.items() if part_of(module) not in MAY_PRINT} | KINDS
    assert {module: lines for module, source in quiet.items() if (lines := prints(source))} == {}
    assert prints("x = 1\nif x:\n    print(x)") == [3]


RUNS_CODE = {
    "pickle": "",
    "cPickle": "",
    "dill": "",
    "cloudpickle": "",
    "joblib": "",
    "shelve": "",
    "marshal": "",
    "subprocess": "",
    "pty": "",
    "runpy": "",
    "yaml": "",
    "pandas": "read_pickle",
}
"""Modules whose import must be on the list below."""
CALLS = (
    r"eval|exec|compile|__import__|(builtins\.)?(eval|exec|__import__)",
    r"(\w+\.)*(import_module|find_spec|exec_module|spec_from_file_location|entry_points)",
    r"os\.(system|popen|exec\w*|spawn\w*|posix_spawn\w*|fork|startfile)",
    r"torch\.(load|hub\.\w+|jit\.load|package\.\w+|ops\.load_library|classes\.load_library)",
    r"dcp\.(load|save)|torch\.distributed\.checkpoint\.\w+",
    r"(\w+\.)*(all_gather_object|broadcast_object_list|gather_object|scatter_object_list)",
    r"ctypes\.\w+|(\w+\.)?(CDLL|WinDLL|PyDLL)",
)
"""Calls that run, load or unpickle what they are given."""
ALLOWED = {
    ("multimodal", "import_module"): "the public names of this package, from a list of its own",
    ("multimodal.cli.checks", "import_module"): "the benchmarks, under a fixed name",
    ("multimodal.cli.checks", "importlib.import_module"): "the same",
    ("multimodal.train.runtime", "CDLL"): "the C library that this process has already",
    ("multimodal.cli.loading", "find_spec"): "a file that the user names on the command line",
    ("multimodal.cli.loading", "spec_from_file_location"): "a file that the user names on the command line",
    ("multimodal.cli.loading", "exec_module"): "a file that the user names on the command line",
    ("multimodal.cli.loading", "import_module"): "a module that the user names on the command line",
    ("multimodal.check.models", "pickle"): "checks that a part of one's own comes through a pickle to a worker",
    ("multimodal.check.cases", "pickle"): "compares values in the process, writes only",
    (
        "multimodal.check.fresh",
        "pickle",
    ): "sends the user's own values to the new interpreter that a check starts",
    ("multimodal.checkpoint", "import_module"): "multimodal.pretrained, under a fixed name",
    ("multimodal.check.fresh", "subprocess"): "that interpreter",
    ("multimodal.check.fresh", "os.fork"): "a copy of that interpreter for each question",
    ("multimodal.check.fresh", "find_spec"): "finds there the file of the class that is checked",
    ("multimodal.check.fresh", "spec_from_file_location"): "the same",
    ("multimodal.check.fresh", "exec_module"): "the same",
    ("multimodal.check.fresh", "import_module"): "the same",
    ("multimodal.data.fetching", "CDLL"): "the C library that this process has already",
    ("multimodal.data.packs", "pickle"): "what one's own data workers send",
    ("multimodal.data.tables", "import_module"): "optional libraries, under fixed names",
    ("multimodal.declare", "import_module"): "modules of the framework, from a list of its own",
    ("multimodal.old_names", "import_module"): "the same",
    ("multimodal.media.sources", "import_module"): "optional packages, under fixed names",
    ("multimodal.measures.evaluation", "find_spec"): "whether optional libraries are there, under fixed names",
    ("multimodal.export.formats", "import_module"): "optional libraries, under fixed names",
    ("multimodal.train.trackers", "import_module"): "optional packages, under fixed names",
    ("multimodal.model", "import_module"): "multimodal.pretrained, .export and .publish, under fixed names",
    ("multimodal.pretrained.gate", "import_module"): "transformers, under a fixed name",
    (
        "multimodal.pretrained.source",
        "torch.load",
    ): "with weights_only, and only if the user says that it may be a pickle",
    ("multimodal.old_names", "find_spec"): "the same",
    ("multimodal.progress", "find_spec"): "whether ipywidgets is there, under a fixed name",
    ("multimodal.declare", "entry_points"): "installed packages alone: who installs one runs it",
    ("multimodal.train.launch", "subprocess"): "starts this program once more a process, with the user's own arguments",
    ("multimodal.train.processes", "all_gather_object"): "between one's own processes, of one user and one run",
    ("multimodal.train.state", "dcp.load"): "a state of an earlier version, in a run that the user names as trusted",
    ("examples.make_spoken_words", "subprocess"): "the speech synthesiser, on sentences of the script's own",
}
"""(module, what it does) -> why that is no data that runs code."""


def running(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything that may run code which data brought: imports, calls, and settings of calls."""
    found = []
    tree = ast.parse(source)
    for node, runs in imports_in(source):
        if not runs:
            continue
        whole = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        found += [(node.lineno, name.split(".")[0]) for name in whole if name.split(".")[0] in RUNS_CODE]
        if isinstance(node, ast.ImportFrom):
            taken = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in taken if any(re.fullmatch(call, name) for call in CALLS)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if any(re.fullmatch(call, name) for call in CALLS):
            found.append((node.lineno, name if name.startswith(("os.", "torch.", "dcp.")) else name.split(".")[-1]))
        for keyword in node.keywords:
            dangerous = (keyword.arg in ("shell", "allow_pickle", "trust_remote_code")) or (
                keyword.arg == "weights_only" and ast.unparse(keyword.value) != "True"
            )
            if dangerous and ast.unparse(keyword.value) != "False":
                found.append((node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"))
            if keyword.arg == "weights_only" and ast.unparse(keyword.value) == "False":
                found.append((node.lineno, "weights_only=False"))
        if name.endswith(("np.load", "numpy.load")) and not any(k.arg == "allow_pickle" for k in node.keywords):
            found.append((node.lineno, f"{name} without allow_pickle=False"))
    return found


def code_violations(sources: dict[str, str]) -> list[str]:
    return [
        f"{module}:{line} {what}"
        for module, source in sources.items()
        for line, what in running(source)
        if (module, what) not in ALLOWED
    ]


EXAMPLES = dict(python_files("examples"))


def test_fault_03_nothing_runs_code_that_data_brought():
    everything = FRAMEWORK | KINDS | EXAMPLES
    assert code_violations(everything) == []
    met = {(module, what) for module, source in everything.items() for _, what in running(source)}
    assert {place for place in ALLOWED if place[0] in everything} - met == set()  # the list has no idle entries


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("def later():\n    import dill as d", "dill"),
        ("import yaml\nyaml.load(text)", "yaml"),
        ("import marshal, json", "marshal"),
        ("import shelve", "shelve"),
        ("import subprocess", "subprocess"),
        ("from subprocess import run", "subprocess"),
        ("x = eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("import builtins\nbuiltins.eval(text)", "eval"),
        ("__import__(name)", "__import__"),
        ("import importlib\nimportlib.import_module(entry['type'])", "import_module"),
        ("from importlib import import_module", "importlib.import_module"),
        ("import os\nos.system(text)", "os.system"),
        ("import os\nos.popen(text)", "os.popen"),
        ("from os import system", "os.system"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "weights_only=False"),
        ("torch.hub.load(name)", "torch.hub.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("np.load(path)", "np.load without"),
        ("f(text, shell=True)", "shell=True"),
        ("import torch.distributed.checkpoint as dcp\ndcp.load(tensors)", "dcp.load"),
        ("dist.broadcast_object_list(values)", "broadcast_object_list"),
        ("import ctypes\nctypes.CDLL(path)", "CDLL"),
    ],
)
def test_fault_03_planted_lines_that_run_code_are_found(line: str, what: str):
    found = code_violations({"multimodal.masks": FRAMEWORK["multimodal.masks"] + "\n" + line + "\n"})
    assert any(what in text for text in found), found


def test_fault_03_safe_lines_are_not_found():
    assert code_violations({"m": "model.eval()\nnp.load(p, allow_pickle=False)\nre.compile('x')\njson.load(f)"}) == []
