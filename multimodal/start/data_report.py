"""What was seen of the data before training, and how they were divided: as text, as HTML, as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Self

from multimodal.files import check_fields, read_json, write_atomic
from multimodal.notebook import html_page
from multimodal.shapes import CheckpointError
from multimodal.texts import as_json, listed, shortened

MOST_CLASSES, MOST_COLUMNS, MOST_NAMES = 12, 12, 3
IMBALANCED = 5.0  # times as many samples of the largest class as of the smallest


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was seen of the data. `print` shows it, and so does a notebook.

    source: what was given.
    saw: number of samples that are there.
    fields: by name of a field that is read, its kind and what was measured of it.
    answer: the field that is answered: its name, kind and column, and for classes their names.
    parts: number of samples in each part.
    classes: by name of a class, its number of samples in each part; {} where answers are no classes.
    split: how the parts were chosen, a line each.
    findings: what to know of the data, a line each.
    left_out: by reason, the names of samples that are not used.
    """

    source: str
    saw: int
    fields: dict[str, dict[str, Any]]
    answer: dict[str, Any]
    parts: dict[str, int]
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    split: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Number of samples in all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return "\n".join(f"{name:<10}{text}" if name else f"          {text}" for name, text in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("data", f"{self.source}: {self.saw:,} samples, {self.used:,} are used")]
        for reason, names in self.left_out.items():
            more = ", ..." if len(names) > MOST_NAMES else ""
            lines.append(
                (
                    "",
                    f"left out, {reason}: {len(names):,} ({', '.join(shortened(n, 160) for n in names[:MOST_NAMES])}{more})",
                )
            )
        for name, seen in self.fields.items():
            lines.append(("reads", f"{name}: {_about(seen)}"))
        lines.append(("answers", self._about_answer()))
        lines += [("found" if i == 0 else "", text) for i, text in enumerate(self.findings)]
        shown = ", ".join(f"{count:,} {part.replace('_', ' ')}" for part, count in self.parts.items() if count)
        lines.append(("parts", shown))
        return [*lines, *(("", text) for text in self.split)]

    def _about_answer(self) -> str:
        kind, column = self.answer["kind"], self.answer["column"]
        if not self.classes:
            what = {"number": "a number", "text": "a text"}.get(kind, kind)
            return f"{self.answer['name']}: {what}, of {column}"
        totals = {name: sum(parts.values()) for name, parts in self.classes.items()}
        ordered = sorted(totals, key=lambda name: -totals[name])
        named = listed((f"{shortened(name, 30)} {totals[name]:,}" for name in ordered), MOST_CLASSES)
        ratio = totals[ordered[0]] / max(1, totals[ordered[-1]])
        uneven = f"; the largest has {ratio:.0f} times the samples of the smallest" if ratio >= IMBALANCED else ""
        return f"{self.answer['name']}: {len(totals):,} classes{' (several a sample)' if kind == 'labels' else ''}: {named}{uneven}"

    def _repr_html_(self) -> str:
        """For notebooks: the same as a table, and the classes in each part."""
        rows = "".join(
            f'<tr><td>{escape(name)}</td><td class="left">{escape(text)}</td></tr>' for name, text in self._lines()
        )
        html = f"<table>{rows}</table>"
        if self.classes:
            parts = [part for part, count in self.parts.items() if count]
            head = "".join(f"<th>{escape(part.replace('_', ' '))}</th>" for part in parts)
            body = "".join(
                f"<tr><td>{escape(shortened(name, 60))}</td>{''.join(f'<td>{counts.get(part, 0):,}</td>' for part in parts)}</tr>"
                for name, counts in self.classes.items()
            )
            html += f"<table><tr><th>class</th>{head}</tr>{body}</table>"
        return html

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)

    def save(self, folder: Path) -> None:
        """Write data.json and the page data.html."""
        write_atomic(folder / "data.json", as_json(self.to_json(), 1) + "\n")
        body = f"<h1>{escape(self.source)}</h1>{self._repr_html_()}"
        write_atomic(folder / "data.html", html_page("data", body))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read data.json.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        found = read_json(folder / "data.json", CheckpointError)
        kinds = {"source": str, "saw": int, "fields": dict, "answer": dict, "parts": dict, "classes": dict}
        kinds |= {"split": list, "findings": list, "left_out": dict}
        check_fields(folder / "data.json", found, kinds, CheckpointError)
        return cls(**{name: found[name] for name in kinds})


def _about(seen: Mapping[str, Any]) -> str:
    """A field in a few words."""
    kind = seen["kind"]
    if kind == "image":
        sides = f"{_range(seen['height'])} x {_range(seen['width'])} pixels"
        return f"{'grey' if seen['grey'] else 'colour'} pictures of {sides} (rows x columns)"
    if kind == "audio":
        rates = ", ".join(f"{int(rate):,} Hz" for rate in seen["rates"])
        return f"sounds of {_range(seen['seconds'])} s at {rates}"
    if kind == "series":
        gaps = f", {seen['missing']:,} values missing" if seen["missing"] else ""
        return f"series of {_range(seen['steps'])} steps, {seen['channels']} channels{gaps}"
    if kind == "text":
        return f"texts of {_range(seen['words'])} words, {_range(seen['bytes'])} bytes"
    columns = seen["columns"]
    numbers = [name for name, column in columns.items() if column["kind"] == "number"]
    categories = [name for name in columns if name not in numbers]
    parts = [f"{len(numbers)} columns of numbers ({listed(numbers, MOST_COLUMNS)})"] if numbers else []
    parts += [f"{len(categories)} of categories ({listed(categories, MOST_COLUMNS)})"] if categories else []
    gaps = {name: column["missing"] for name, column in columns.items() if column["missing"]}
    parts += [f"missing: {listed((f'{name} {count:,}' for name, count in gaps.items()), MOST_COLUMNS)}"] if gaps else []
    return "rows with " + ", ".join(parts)


def _range(spread: Mapping[str, float]) -> str:
    least, middle, most = (
        f"{spread[key]:,.4g}" if spread[key] < 1e4 else f"{spread[key]:,.0f}" for key in ("least", "middle", "most")
    )
    return least if least == most else f"{least} to {most} (middle {middle})"
