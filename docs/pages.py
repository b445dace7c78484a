"""Pages that mkdocs makes beside the guides: the README, CONTRIBUTING and one page of the API reference for each room."""

import ast
import re
from pathlib import Path, PurePosixPath
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "multimodal": (),
    "model": (),
    "data": (),
    "augment": (),
    "train": (),
    "start": (),
    "generate": (),
    "heads": (),
    "attention": (),
    "masks": (),
    "layers": (),
    "transcription": (),
    "check": (),
    "count": (),
    "look": ("embeddings", "layers", "lens", "parameter_count", "probes", "steering"),
    "zoo": ("adversarial", "analogies", "fact_editing", "mixture", "sparse_autoencoder"),
    "media": (),
    "pretrained": ("gate", "nanovlm", "paligemma", "smolvlm", "whisper"),
    "sklearn": (),
    "tower": (),
    "export": (),
    "lora": (),
    "norm": (),
    "positions": (),
}
"""Each room with the modules in it that are used by their own names."""

FIRST = ("start.md", "quick.md", "recipes.md", "concepts.md", "coming_from.md", "features.md", "troubleshooting.md")
"""The guides for somebody who is new, in this order."""

DOCUMENTS = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Documents of the repository that are pages too."""


def top_names() -> dict[str, str]:
    """Each name of `multimodal` -> the module that has it."""
    tree = ast.parse((ROOT / "multimodal" / "__init__.py").read_text(encoding="utf-8"))
    made = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_FROM"
    )
    return {name: module for module, names in ast.literal_eval(made).items() for name in names.split()}


def on_config(config: Any) -> Any:
    """The order of the pages."""
    guides = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    first = [name for name in FIRST if name in guides]
    config.nav = [
        {"multimodal": "index.md"},
        {"Start here": first},
        {"Guides": [*(name for name in guides if name not in first), "contributing.md"]},
        {"API": [{room: f"api/{room}.md"} for room in ROOMS]},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file in docs/ has."""
    pages = {f"api/{room}.md": reference(room) for room in ROOMS}
    pages |= {uri: (ROOT / name).read_text(encoding="utf-8") for name, uri in DOCUMENTS.items()}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Links to files of the repository lead to their page; where there is none, their path is shown."""
    uri = page.file.src_uri
    source = next((name for name, made in DOCUMENTS.items() if made == uri), f"docs/{uri}")

    def link(match: re.Match[str]) -> str:
        text, target, part = match["text"], match["target"], match["part"] or ""
        path = relpath(str(PurePosixPath(source).parent / target))
        made = DOCUMENTS.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(made) is not None:
            return f"[{text}]({relpath(made, str(PurePosixPath(uri).parent))}{part})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return re.sub(r"\[(?P<text>[^\]\n]+)\]\((?!\w+:)(?P<target>[^)#\s]+)(?P<part>#[^)\s]*)?\)", link, markdown)


def reference(room: str) -> str:
    """The page of a room: what its docstrings say."""
    if room != "multimodal":
        modules = [f"multimodal.{room}", *(f"multimodal.{room}.{name}" for name in ROOMS[room])]
        return f"# {room}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
    lines = [
        "# multimodal",
        "",
        "What `import multimodal as mm` has by itself; all else is in its room.",
        "Examples run in `tests/test_docstring_examples.py`, which makes what they use: a small trained `model`, its `samples`,",
        "the pictures `square` and `circle`, and a `wave` of 8 kHz.",
        "",
        "| name | |",
        "|---|---|",
    ]
    own = []
    for name, module in sorted(top_names().items()):
        path = f"multimodal.{module}.{name}"
        lines.append(f'| <a id="multimodal.{name}"></a>[`{name}`][{path}] | in `{module}` |')
        if module not in ROOMS:
            own.append(f"::: {path}")
    return "\n".join([*lines, "", *own]) + "\n"
