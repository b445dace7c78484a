"""Measures how the code reads: the walk of one call through it, its rooms, its import circles, its private words.

uv run benchmarks/house.py                  prints the report, in less than a minute on one core
uv run benchmarks/house.py --list           prints also the functions of each walk, in the order of their first entry
uv run benchmarks/house.py --write PATH     writes the report also to a file
"""

import argparse
import ast
import dis
import gc
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"multimodal": ROOT / "multimodal", "multimodal_tokenizers": ROOT / "tokenizers" / "multimodal_tokenizers"}
PACKAGES = {**LIBRARY, "benchmarks": ROOT / "benchmarks"}
CORE = ("multimodal.model", "multimodal.generate", "multimodal.train.loop")

HEADER = """\
# How the code reads

`uv run benchmarks/house.py`

## Walks

A function is what `def` makes in a file of the library. Lambdas, comprehensions, generator expressions, class bodies and
methods that a dataclass generates are part of what surrounds them. An entry is one call of a function; a generator is
entered once, when it starts. The walk is the list of distinct functions in the order of their first entry, as a reader
opens them. A change is a step of this list into another file; it leads back if an earlier function lies in that file.
Changes of all entries count each repetition (layers, steps) too. Frames to the kernel are the functions on the stack, from
the public call down to `scaled_dot_product_attention`, both ends of ours included. Calls of torch are not counted.
One call with a model of the same kind warms up; the call that is measured has a model and a sample of its own.
"""

# A pattern, in which the case of letters makes no difference, and the word of the field.
# fmt: off
WORDS = (
    (r"\bkept\b", "cached"), (r"\btold\b", "given"), (r"_told", "all-reduce"), (r"begun", "tokens given as the beginning"),
    (r"so many", "n"), (r"(?<![a-z])resting", "inference mode"), (r"_rests", "inference mode"), (r"\brests\b", "plain words"),
    (r"telling", "incremental detokenizer"), (r"unsaid", "pending text"), (r"news\(", "new text"), (r"lineup", "decode batch"),
    (r"line-up", "decode batch"), (r"\bseats?\b", "row of the decode batch"), (r"choosing", "next token"),
    (r"\btrouble", "loss spikes, replay"), (r"feed\.py|train\.feed", "loaders"), (r"host\.py|train\.host", "runtime"),
    (r"members\.py|data\.members", "codecs"), (r"typed\.py|cli\.typed", "argument parsing"), (r"cli\.find\b", "loading"),
    (r"obituary", "plain words"), (r"harmless", "plain words"), (r"strange", "plain words"), (r"mattered", "plain words"),
    (r"read freely|\bfree\b(?! form| memory)", "bidirectional"), (r"\broles\b", "parameter count"),
    (r"\bfacts\b", "fact editing"), (r"draw_in", "plain words"), (r"draw_out", "plain words"),
)
# fmt: on


class Step(NamedTuple):
    """A function, its file and the number of the library's functions that were on the stack when it was entered first."""

    name: str
    file: str
    depth: int


@dataclass(frozen=True)
class Walk:
    """What one call entered.

    first: the distinct functions in the order of their first entry; entries: number of all entries.
    all_changes: changes of file between consecutive entries of all; kernels: the stack at each call of the kernel, outermost first.
    """

    first: tuple[Step, ...]
    entries: int
    all_changes: int
    kernels: tuple[tuple[Step, ...], ...]

    def row(self, name: str) -> str:
        """A row of the table."""
        files = len({step.file for step in self.first})
        changes = sum(a.file != b.file for a, b in pairwise(self.first))
        back = changes - (files - 1)  # every file but the first is entered once as a new one
        frames = [f"{len(stack)} in {len({step.file for step in stack})}" for stack in self.kernels]
        cells = (name, f"{len(self.first)} / {files}", f"{changes} ({back})", frames[0], frames[-1])
        return f"| {' | '.join(cells)} | {self.entries:,} | {self.all_changes:,} |"


def walk(call: Callable[[], Any], folders: Iterable[Path] = tuple(LIBRARY.values())) -> Walk:
    """Run the call and record which functions of the folders it enters."""
    files: dict[CodeType, str | None] = {}

    def file_of(code: CodeType) -> str | None:
        if code not in files:
            path = Path(code.co_filename).resolve()
            home = next((folder for folder in folders if path.is_relative_to(folder)), None)
            files[code] = f"{home.name}/{path.relative_to(home)}" if home and code.co_name[0] != "<" else None
        return files[code]

    def stack(frame: FrameType | None) -> tuple[Step, ...]:
        found: list[tuple[str, str]] = []
        while frame is not None:
            if (file := file_of(frame.f_code)) is not None:
                found.append((frame.f_code.co_qualname, file))
            frame = frame.f_back
        return tuple(Step(name, file, i) for i, (name, file) in enumerate(reversed(found)))

    first: dict[CodeType, Step] = {}
    order: list[str] = []
    kernels: list[tuple[Step, ...]] = []

    def enter(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or (file := file_of(code)) is None:
            return
        # a generator goes on at a RESUME whose argument is not 0; a function that starts has the argument 0
        if (
            frame.f_lasti >= 0
            and code.co_code[frame.f_lasti] == dis.opmap["RESUME"]
            and code.co_code[frame.f_lasti + 1]
        ):
            return
        order.append(file)
        if code not in first:
            first[code] = Step(code.co_qualname, file, len(stack(frame)) - 1)

    kernel = F.scaled_dot_product_attention

    def probe(*args: Any, **options: Any) -> torch.Tensor:
        kernels.append(stack(sys._getframe(1)))
        return kernel(*args, **options)

    F.scaled_dot_product_attention = probe
    gc.collect()
    gc.disable()  # a finalizer that runs in between is no part of the call
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
        F.scaled_dot_product_attention = kernel
    changes = sum(a != b for a, b in pairwise(order))
    return Walk(tuple(first.values()), len(order), changes, tuple(kernels))


def image_loss(seed: int) -> Callable[[], Any]:
    """One image to its loss, by a new model."""
    import multimodal as mm
    from multimodal_tokenizers import ImagePatches, Labels

    tokenizers = {"image": ImagePatches(patch=4, channels=1), "label": Labels(("circle", "square"))}
    model = mm.Model(tokenizers=tokenizers, core=mm.Core.tiny(), tasks=["image -> label"], seed=seed)
    sample = {"image": torch.rand(16, 16, generator=torch.Generator().manual_seed(seed)).numpy(), "label": "square"}
    return lambda: model.loss(model.pack("image -> label", [sample]))


def text_tokens(seed: int) -> Callable[[], Any]:
    """One prompt to eight tokens, by a new model."""
    import multimodal as mm
    from multimodal_tokenizers import TextBytes

    model = mm.Model(tokenizers={"text": TextBytes()}, core=mm.Core.tiny(), tasks=["text -> text"], seed=seed)

    def call() -> None:
        count = len(model.generate("text -> text", text=f"prompt {seed}", max_tokens=8).tokens)
        if count != 8:
            raise RuntimeError(f"house: the toy model wrote {count} tokens; another seed writes all 8")

    return call


def litgpt_walks() -> dict[str, Walk]:
    """The same two walks through litgpt, which reads ids of tokens in place of an image."""
    from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]
    from litgpt.generate.base import generate  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    folders = [Path(str(sys.modules["litgpt"].__file__)).resolve().parent]
    size = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 257, "padded_vocab_size": 257}
    ids = torch.arange(8)

    def loss(seed: int) -> Callable[[], Any]:
        model = GPT(Config(**size))
        return lambda: chunked_cross_entropy(model(ids[None]), ids[None])

    def tokens(seed: int) -> Callable[[], Any]:
        model = GPT(Config(**size)).eval()
        model.set_kv_cache(batch_size=1)
        return lambda: generate(model, ids, max_returned_tokens=len(ids) + 8, temperature=0.0)

    return walks({"litgpt: tokens -> loss": loss, "litgpt: prompt -> 8 tokens": tokens}, folders)


def walks(calls: Mapping[str, Callable[[int], Callable[[], Any]]], folders: Sequence[Path]) -> dict[str, Walk]:
    """The walk of each call, which is made anew after another one has warmed up."""
    found = {}
    for name, make in calls.items():
        make(1)()
        found[name] = walk(make(2), folders)
    return found


def modules_of(packages: Mapping[str, Path]) -> dict[str, Path]:
    """Dotted name of each module -> its file."""
    found = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def nodes(node: ast.AST | Path, inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All syntax nodes below one or in a file, and whether each lies in a function or class."""
    tree = ast.parse(node.read_text(encoding="utf-8")) if isinstance(node, Path) else node
    for child in ast.iter_child_nodes(tree):
        yield child, inside
        yield from nodes(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))


def exported(package: str, path: Path) -> set[str]:
    """Names that an __init__ binds by itself or lists in __all__; a submodule that it imports as such is not among them."""
    names: set[str] = set()
    for node, inside in nodes(path) if path.name == "__init__.py" else ():
        if inside:
            continue
        if isinstance(node, ast.ImportFrom) and node.module not in (None, package):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= {str(n.value) for n in ast.walk(node.value) if isinstance(n, ast.Constant)}
    return names


def imports(packages: Mapping[str, Path] = PACKAGES) -> tuple[dict[str, set[str]], int]:
    """Each module's imports of others at module level, those for types included; and how many stand inside functions.

    `from a import b` leads to a.b if that is a module which a/__init__ does not replace by a name of its own, else to a.
    """
    modules = modules_of(packages)
    bound = {name: exported(name, path) for name, path in modules.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    later = 0
    for name, path in modules.items():
        home = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node, inside in nodes(path):
            if isinstance(node, ast.Import):
                wanted = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = home[: len(home) - node.level + 1] if node.level else []
                wanted = [(".".join((*above, *filter(None, [node.module]))), alias.name) for alias in node.names]
            else:
                continue
            targets = set()
            for source, taken in wanted:
                # a script finds the modules beside it without the name of their folder
                source = next((s for s in (source, f"{name.split('.')[0]}.{source}") if s in modules), None)
                if source is not None:
                    inner = f"{source}.{taken}"
                    targets.add(inner if inner in modules and taken not in bound[source] else source)
            if inside:
                later += bool(targets)
            else:
                graph[name] |= targets
    return graph, later


def reached(graph: Mapping[str, set[str]], starts: Sequence[str]) -> set[str]:
    """What imports lead to from these modules, without these unless imports lead back to them."""
    found: set[str] = set()
    ahead = list(starts)
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def circles(packages: Mapping[str, Path] = PACKAGES) -> list[tuple[str, ...]]:
    """Groups of modules that import one another at module level, imports for types included; the largest first."""
    graph, _ = imports(packages)
    reach = {name: reached(graph, [name]) for name in graph}
    found = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return sorted(found, key=lambda group: (-len(group), group))


def lines() -> dict[str, tuple[int, int, int, int]]:
    """Each package or top-level file of the library: its lines, whole lines of comment, functions, and lines in the core."""
    core = reached(imports(LIBRARY)[0], CORE) | set(CORE)
    rooms: dict[str, tuple[int, int, int, int]] = {}
    for name, path in modules_of(LIBRARY).items():
        text = path.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = sum(t.type == tokenize.COMMENT and not t.line[: t.start[1]].strip() for t in tokens)
        functions = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for node, _ in nodes(path))
        count = text.count("\n")
        inner = path.is_relative_to(LIBRARY["multimodal"])
        room = path.relative_to(LIBRARY["multimodal"]).parts[0] if inner else "tokenizers"
        before = rooms.get(room, (0, 0, 0, 0))
        core_lines = before[3] + count * (name in core)
        rooms[room] = before[0] + count, before[1] + comments, before[2] + functions, core_lines
    return rooms


def words() -> list[tuple[str, str, dict[str, int]]]:
    """How often each private word occurs: its pattern, the word of the field, the number by room."""
    places = {"library": [path for folder in LIBRARY.values() for path in folder.rglob("*.py")]}
    places |= {name: list((ROOT / name).rglob("*.py")) for name in ("tests", "benchmarks", "examples")}
    places["docs"] = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    places["docs"] += [path for name in ("benchmarks", "examples") for path in (ROOT / name).rglob("README.md")]
    own = Path(__file__).resolve()  # this file names each of them
    texts = {
        room: "\n".join(path.read_text(encoding="utf-8") for path in paths if path != own)
        for room, paths in places.items()
    }
    return [
        (word, said, {room: len(re.findall(word, text, re.IGNORECASE)) for room, text in texts.items()})
        for word, said in WORDS
    ]


def hidden() -> list[str]:
    """Modules that cannot be reached by name, because their package exports something else under it."""
    modules = modules_of(LIBRARY)
    names = [f"{package}.{name}" for package, path in modules.items() for name in sorted(exported(package, path))]
    return [name for name in names if name in modules]


def report(listed: bool = False) -> Iterator[str]:
    """The lines of the report."""
    import multimodal as mm

    ours = walks({"image -> loss, now": image_loss, "prompt -> 8 tokens, now": text_tokens}, list(LIBRARY.values()))
    try:
        peers, note = litgpt_walks(), ""
    except ImportError as error:
        peers, note = {}, f"litgpt is not installed ({error}), so nothing is measured beside ours.\n"
    yield HEADER
    yield "| call | functions / files | changes (back) | frames to the first kernel | to the last | entries | all changes |"
    yield "|---|---|---|---|---|---|---|"
    yield from (found.row(name) for name, found in (ours | peers).items())
    yield f"\n{note}Frames to the first kernel are those of the prefill, to the last those of one decoding step."
    yield "Aims: image -> loss 75 functions in 15 files and 9 frames; prompt -> 8 tokens 140 functions."
    for name, found in (ours | peers).items() if listed else ():
        for title, steps in (
            ("functions in the order of first entry", found.first),
            ("first kernel", found.kernels[0]),
        ):
            yield f"\n{name}: {title} (depth, function, file)\n"
            yield from (f"    {step.depth:3}  {'  ' * step.depth}{step.name}  {step.file}" for step in steps)
        yield f"\n{name}: last kernel (depth, function, file)\n"
        yield from (f"    {step.depth:3}  {'  ' * step.depth}{step.name}  {step.file}" for step in found.kernels[-1])

    yield f"\n## Rooms\n\nCore: what imports at module level, those for types included, lead to from {', '.join(CORE)}"
    yield "(the __init__ of a parent package counts where the code names it); tools: all else, the tokenizers included.\n"
    yield "| room | lines | whole lines of comment | functions | core | tools |\n|---|---|---|---|---|---|"
    rooms = sorted(lines().items(), key=lambda item: -item[1][0])
    total = [sum(column) for column in zip(*(numbers for _, numbers in rooms), strict=True)]
    for room, (count, comments, functions, core) in (*rooms, ("all", total)):
        share = f"{comments} ({comments / max(count, 1):.1%})"
        yield f"| {room} | {count:,} | {share} | {functions:,} | {core:,} | {count - core:,} |"

    graph, later = imports()
    found = circles()
    edges = sum(map(len, graph.values()))
    yield f"\n## Import circles\n\nCircles: {len(found)}, among {len(graph)} modules with {edges} imports at module level"
    yield f"(those for types included); {later} import statements inside functions and classes are not part of them.\n"
    yield from (f"- {len(group)} modules: {', '.join(group)}" for group in found)

    counted = words()
    columns = list(counted[0][2])
    yield f"\n## Private words\n\n| pattern | the field says | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}"
    counted.append(("all", "", {c: sum(counts[c] for _, _, counts in counted) for c in columns}))
    for word, said, counts in counted:
        pattern = word if word == "all" else f"`{word}`".replace("|", "\\|")
        yield f"| {pattern} | {said} | {' | '.join(str(counts[c]) for c in columns)} |"

    shadowed = hidden()
    yield f"\n## The face\n\nPublic names at the top of multimodal: {len(mm.__all__)}."
    yield f"Modules hidden behind a name that their package exports: {len(shadowed)} ({', '.join(shadowed)})."


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tokenizers")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the functions of each walk")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the report also to this file")
    options = parser.parse_args()
    text = "\n".join(report(options.list)) + "\n"
    print(text, end="")
    if options.write:
        options.write.write_text(text, encoding="utf-8")
