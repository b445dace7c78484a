"""How things show themselves: predictions and runs as HTML for notebooks, and parts by the settings that are not the usual ones.

In HTML every text is escaped, and nothing is loaded from elsewhere.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from multimodal.texts import shortened

MOST_CLASSES, MOST_ROWS = 10, 8
WIDTH, HEIGHT = 240, 60  # pixels of the curve


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


def short_form(part: Any) -> str:
    """A declaration by the fields whose values are not the defaults: "ImagePatches(patch=4)"."""
    shown = []
    for field in dataclasses.fields(part) if dataclasses.is_dataclass(part) else ():
        value, default = getattr(part, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.repr and (default is dataclasses.MISSING or value != default):
            shown.append(f"{field.name}={shortened(repr(value), 100)}")
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else shortened(str(value), 40)
