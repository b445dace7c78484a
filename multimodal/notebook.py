"""How things show themselves: pages, predictions and runs as HTML, and parts by the settings that are not the usual ones.

In HTML every text is escaped, and nothing is loaded from elsewhere.
"""

import base64
import dataclasses
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from multimodal.texts import shortened

STYLE = """
:root { color-scheme: light }
body { margin: 0 auto; max-width: 1080px; padding: 28px 24px 80px; background: #fff; color: #222;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 24px; margin: 0 0 2px }
h2 { font-size: 17px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid #e4e4e4 }
h3 { font-size: 14px; margin: 18px 0 4px; font-weight: 600 }
p { margin: 4px 0 10px; max-width: 78ch }
.note { color: #666; font-size: 13px }
.answer { font-size: 19px; margin: 6px 0 12px; white-space: pre-wrap }
.bars td { padding: 1px 10px 1px 0 }
.bar { display: inline-block; height: 11px; background: #d95f02; vertical-align: middle; border-radius: 2px }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th { text-align: right; font-weight: 600; padding: 4px 9px; border-bottom: 1px solid #ccc }
td { text-align: right; padding: 2px 9px }
th:first-child, td:first-child { text-align: left }
td.left { text-align: left }
td.left i { font-style: normal; margin-right: 14px; display: inline-block }
td:first-child { white-space: nowrap }
.matrix td:first-child { white-space: normal }
tr.first td { border-top: 1px solid #e4e4e4 }
.row { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-end; margin: 4px 0 12px }
figure { margin: 0 }
img { display: block; image-rendering: pixelated; border-radius: 3px }
img.wide { max-width: 100%; image-rendering: auto }
figcaption { font-size: 12px; color: #666 }
.grid { position: relative; width: max-content }
.grid div { position: absolute; inset: 0; display: grid }
.learned { height: 7px; margin-top: 2px; background: #eee; display: flex; border-radius: 2px }
.learned i { background: #d95f02; opacity: .6; border-right: 1px solid #fff }
.text { display: flex; margin: 2px 0 8px; font: 14px/1.9 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace }
.text p { margin: 0; max-width: none; white-space: pre-wrap; overflow-wrap: anywhere }
.text p span { border-radius: 3px; padding: 2px 0 }
.text b { flex: 0 0 170px; font: 12.5px/26px system-ui, sans-serif; color: #666 }
.scroll { overflow-x: auto; margin: 4px 0 }
.matrix { font: 11px/1.2 ui-monospace, Menlo, Consolas, monospace }
.matrix td { min-width: 16px; height: 18px; padding: 0; border: 1px solid #f1f1f1 }
.matrix th, .matrix th:first-child { padding: 2px 5px; border: 0; font-weight: 400; text-align: right; white-space: pre }
.matrix thead th { vertical-align: bottom; padding: 2px 0 }
.matrix thead span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg); text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 14px }
.card { border: 1px solid #e4e4e4; border-radius: 5px; padding: 10px; font-size: 13px; overflow-wrap: anywhere }
.card img { width: 100%; max-height: 220px; object-fit: contain }
.card audio { width: 100% }
.card pre { white-space: pre-wrap; margin: 4px 0; max-height: 220px; overflow: auto; font-size: 12px }
details { margin: 6px 0 }
summary { cursor: pointer; color: #a54700; font-size: 13.5px }
dt { font-weight: 600; margin-top: 8px }
dd { margin: 0; color: #444; max-width: 82ch }
"""

MOST_CLASSES, MOST_ROWS = 10, 8
MOST_LINES = 50  # of a table
MOST_BARS, MOST_PARTS = 16, 200  # samples of a stream, and fields of one
BAR_WIDTH = 480  # pixels
# seen on white and on black
COLOURS = ("#4c8dd6", "#e0813c", "#4ea865", "#b0679e", "#9a8b3f", "#4aa5a8", "#c85a5a", "#7b79c9")
WIDTH, HEIGHT = 240, 60  # pixels of the curve


def html_page(title: str, body: str) -> str:
    """A page of its own, in the one style of all pages. title, body: HTML, so escaped already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def data_url(media_type: str, data: bytes) -> str:
    """Bytes as a URL, so that a page needs no other file."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def prediction_html(value: Any, confidence: float, probability: Mapping[str, float]) -> str:
    """The answer, its confidence, and a bar for each of the most probable classes."""
    shape = getattr(value, "shape", None)
    text = f"{type(value).__name__} {tuple(shape)}" if isinstance(shape, tuple) else str(value)
    lines = [f"<b>{escape(shortened(text, 1000))}</b> &nbsp; confidence {confidence:.1%}"]
    best = sorted(probability.items(), key=lambda item: -item[1])[:MOST_CLASSES]
    for name, p in best:
        bar = f'<div style="background:#4c72b0;height:0.8em;width:{max(0.0, min(p, 1.0)) * 10:.2f}em"></div>'
        lines.append(f"<tr><td>{escape(shortened(name, 60))}</td><td>{bar}</td><td>{p:.1%}</td></tr>")
    if len(probability) > len(best):
        lines.append(f"<tr><td colspan=3>... {len(probability) - len(best)} more</td></tr>")
    return lines[0] + (f"<table>{''.join(lines[1:])}</table>" if lines[1:] else "")


def run_html(summary: str, history: Sequence[Mapping[str, Any]]) -> str:
    """The summary, the curve of the training loss, and the last rows of the log."""
    losses = [(row["step"], row["loss"]) for row in history if _is_number(row.get("loss")) and "step" in row]
    columns = list(dict.fromkeys(key for row in history[-MOST_ROWS:] for key in row))
    head = "".join(f"<th>{escape(shortened(key, 40))}</th>" for key in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_shown(row.get(key)))}</td>" for key in columns) + "</tr>"
        for row in history[-MOST_ROWS:]
    )
    table = f"<table><tr>{head}</tr>{body}</table>" if history else ""
    return f"<b>{escape(summary)}</b><br>{_curve(losses)}{table}"


def tables_html(title: str, tables: Mapping[str, Sequence[Sequence[object]]]) -> str:
    """A title, and below each heading the rows of a table; of a long table the first rows, and their number."""
    lines = [f"<b>{escape(shortened(title, 300))}</b>"]
    for heading, rows in tables.items():
        if not rows:
            continue
        body = "".join(
            "<tr>" + "".join(f'<td style="text-align:left">{escape(_in_full(cell))}</td>' for cell in row) + "</tr>"
            for row in rows[:MOST_LINES]
        )
        if len(rows) > MOST_LINES:
            body += f"<tr><td colspan={len(rows[0])}>... {len(rows) - MOST_LINES:,} more</td></tr>"
        lines.append(f"<div>{escape(shortened(heading, 100))}</div><table>{body}</table>")
    return "".join(lines)


def declaration_html(part: Any) -> str:
    """The fields of a declaration with their values and meanings; those that are not the usual ones are marked."""
    meanings = field_meanings(type(part))
    rows = []
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        mark = "" if _is_default(part, field) else "set"
        value = shortened(
            short_form(own) if dataclasses.is_dataclass(own := getattr(part, field.name)) else repr(own), 100
        )
        rows.append((field.name, value, mark, meanings.get(field.name, "")))
    return tables_html(type(part).__name__, {"": rows})


def field_meanings(kind: type) -> dict[str, str]:
    """{field: what it is} from the lines "name: meaning" of a class's docstring and of those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        name = ""
        for line in inspect.cleandoc(vars(base).get("__doc__") or "").splitlines():
            begins = re.match(r"([\w, ]+): (.+)", line)
            if begins:
                name = ""
                for name in begins[1].split(", "):
                    found[name] = begins[2]
            elif name and line.startswith("    "):
                found[name] += " " + line.strip()
            else:
                name = ""
    return found


def packed_html(title: str, samples: Sequence[Sequence[tuple[str, int]]], totals: Mapping[str, int]) -> str:
    """A bar for each sample of a packed stream: (kind, number of tokens) of its fields, in order, to one scale.

    totals: number of tokens by kind.
    """
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(totals)}
    legend = "".join(
        f'<span style="margin-right:1em"><span style="color:{colours[kind]}">&#9632;</span> '
        f"{escape(shortened(kind, 40))} {count:,}</span>"
        for kind, count in list(totals.items())[:MOST_LINES]
    )
    longest = max((sum(count for _, count in sample) for sample in samples[:MOST_BARS]), default=0) or 1
    bars = []
    for number, sample in enumerate(samples[:MOST_BARS]):
        x, parts = 0.0, []
        for kind, count in sample[:MOST_PARTS]:
            width = count / longest * BAR_WIDTH
            parts.append(
                f'<rect x="{x:.1f}" y="{number * 14}" width="{max(width - 0.5, 0.3):.1f}" height="11" fill="{colours[kind]}">'
                f"<title>{escape(shortened(kind, 40))}: {count:,} tokens</title></rect>"
            )
            x += width
        total = sum(count for _, count in sample)
        parts.append(
            f'<text x="{BAR_WIDTH + 6}" y="{number * 14 + 10}" font-size="10" fill="currentColor">{total:,}</text>'
        )
        bars += parts
    height = 14 * min(len(samples), MOST_BARS)
    more = f"<br>... {len(samples) - MOST_BARS:,} more samples" if len(samples) > MOST_BARS else ""
    picture = f'<svg width="{BAR_WIDTH + 60}" height="{height}" role="img" aria-label="samples of the stream">{"".join(bars)}</svg>'
    return f"<b>{escape(title)}</b><br>{legend}<br>{picture}{more}"


def short_form(part: Any) -> str:
    """A declaration by the fields whose values are not the defaults: "ImagePatches(patch=4)"."""
    shown = []
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        if field.repr and not _is_default(part, field):
            shown.append(f"{field.name}={shortened(repr(getattr(part, field.name)), 100)}")
    return f"{type(part).__name__}({', '.join(shown)})"


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A line through points (step, loss), as SVG."""
    if len(points) < 2:
        return ""
    (left, right), values = (points[0][0], points[-1][0]), [y for _, y in points]
    low, high = min(values), max(values)
    # equal steps or equal losses are a line in the middle
    place = [
        ((x - left) / ((right - left) or 1) * WIDTH, HEIGHT - (y - low) / ((high - low) or 1) * HEIGHT)
        for x, y in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="training loss">'
        f'<polyline points="{line}" fill="none" stroke="#4c72b0"/></svg>'
        f"<br>training loss {values[0]:.4g} to {values[-1]:.4g}"
    )


def _is_default(part: Any, field: Any) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    try:
        return default is not dataclasses.MISSING and bool(getattr(part, field.name) == default)
    except (ValueError, RuntimeError):  # of arrays
        return False


def _in_full(value: object) -> str:
    """A cell, as long as a paragraph."""
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if type(value) is int
        else shortened(str(value), 300)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else shortened(str(value), 40)
