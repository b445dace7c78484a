"""Where measured figures go: a file in results/, and from there into README.md, never by hand.

uv run benchmarks/report.py                                     show in the documents what results/ holds
PROGRAM | uv run benchmarks/report.py NAME TITLE "PROGRAM"      save what a program prints as results/NAME.md
"""

import os
import platform
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "xray.md")


def keep(name: str, title: str, command: str, body: str) -> Path:
    """Write results/NAME.md with date, machine and command, and refresh what README.md shows of it."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, {gpu}, torch {torch.__version__}"
    path = ROOT / "benchmarks" / "results" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# {title}\n\n`{command}`\n{facts}\n\n{body.strip()}\n", encoding="utf-8")
    refresh()
    return path


def refresh() -> None:
    """Show in the documents what results/ holds."""
    for readme in READMES:
        readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_results(text: str) -> str:
    """The text with everything between `<!-- benchmarks/results/X.md -->` and `<!-- / -->` taken anew from that file."""
    pieces = text.split("<!-- benchmarks/results/")
    for i, piece in enumerate(pieces[1:], 1):
        name, rest = piece.split(" -->", 1)
        _, after = rest.split("<!-- / -->", 1)
        path = ROOT / "benchmarks" / "results" / name
        body = path.read_text(encoding="utf-8").split("\n\n", 2)[2] if path.is_file() else "not measured yet\n"
        pieces[i] = f"{name} -->\n\n{body}\n<!-- / -->{after}"
    return "<!-- benchmarks/results/".join(pieces)


def save_output(name: str, title: str, command: str) -> None:
    """Save what comes from standard input without its indented lines: progress, and examples of data that is not ours."""
    lines = [line.rstrip() for line in sys.stdin if not line.startswith("  ")]
    keep(name, title, command, "```text\n" + "\n".join(lines).strip() + "\n```")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        save_output(*sys.argv[1:])
    refresh()
