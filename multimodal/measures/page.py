"""The report of an evaluation: a picture, and a page with the worst answers first. The page needs no other file and no network."""

import io
import math
from collections import Counter
from html import escape
from typing import Any, Protocol

import numpy as np

from multimodal.measures.answered import Answered
from multimodal.measures.named import calibration_bins, class_rows, edits
from multimodal.notebook import data_url, html_page
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer, describe
from multimodal.value_files import file_of

MOST_NAMED = 40  # classes whose names fit beside the matrix
MOST_PAIRS, MOST_LETTERS = 12, 1000
MEDIA = {".png": "image/png", ".wav": "audio/wav"}


class Measured(Protocol):
    """What a report needs of an `Evaluation`."""

    task: str
    figures: dict[str, Any]
    answered: Answered
    sort: str
    left_out: dict[str, str]
    samples: Any
    fields: dict[str, tuple[Tokenizer, bool]]

    def worst(self, count: int = 24) -> list[int]: ...


def confusion(evaluation: Measured) -> np.ndarray:
    """(C, C): number of samples of each wanted class that got each answer; only of tasks with one class a sample."""
    answered = evaluation.answered
    number = {name: i for i, name in enumerate(answered.names)}
    found = np.zeros((len(number), len(number)), dtype=int)
    for wanted, told in zip(answered.wanted, answered.value, strict=True):
        found[number[wanted], number[told]] += 1
    return found


def draw(evaluation: Measured) -> bytes | None:
    """A PNG: of classes the confusion and how far confidence can be trusted, of texts the error rates, of numbers answers by what
    was wanted; None: there is no picture of other answers."""
    from matplotlib.figure import Figure

    if evaluation.sort not in ("class", "texts", "numbers") or not len(evaluation.answered):
        return None
    columns = 2 if evaluation.sort == "class" else 1
    figure = Figure(figsize=(6.2 * columns, 5.4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    if evaluation.sort == "class":
        _draw_confusion(evaluation, figure, axes[0])
        _draw_confidence(evaluation, axes[1])
    elif evaluation.sort == "texts":
        rows = edits(evaluation.answered, letters=True)
        axes[0].hist(np.minimum(rows[:, 0] / np.maximum(rows[:, 1], 1), 1), bins=20, range=(0, 1))
        axes[0].set(xlabel="letters wrong, for each wanted one (1 and more together)", ylabel="samples")
    else:
        pairs = [
            (np.ravel(np.asarray(x, float)), np.ravel(np.asarray(y, float)))
            for x, y in zip(evaluation.answered.wanted, evaluation.answered.value, strict=True)
        ]
        pairs = [(x, y) for x, y in pairs if x.shape == y.shape]
        wanted, told = (
            np.concatenate(side) if side else np.zeros(0) for side in ([x for x, _ in pairs], [y for _, y in pairs])
        )
        axes[0].plot(wanted, told, ".", markersize=3, alpha=0.5)
        if len(wanted):
            axes[0].axline((wanted.min(), wanted.min()), slope=1, color="0.6", linewidth=1)
        axes[0].set(xlabel="wanted", ylabel="answered")
    data = io.BytesIO()
    figure.savefig(data, dpi=110)
    return data.getvalue()


def _draw_confusion(evaluation: Measured, figure: Any, axes: Any) -> None:
    count = confusion(evaluation)
    share = count / np.maximum(count.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(xlabel="answered", ylabel="wanted", title="share of each wanted class")
    if len(count) <= MOST_NAMED:
        names = [shortened(str(name), 20).replace("$", r"\$") for name in evaluation.answered.names]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(count) <= 12:
        for (i, j), number in np.ndenumerate(count):
            if number:
                axes.text(
                    j, i, number, ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.6 else "black"
                )


def _draw_confidence(evaluation: Measured, axes: Any) -> None:
    answered = evaluation.answered
    bins = calibration_bins(class_rows(answered))
    size = [max(12.0, 300 * math.sqrt(count / len(answered))) for count, _, _ in bins]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.scatter([sure for _, sure, _ in bins], [right for _, _, right in bins], s=size, alpha=0.6)
    axes.set(xlabel="confidence", ylabel="share that is right", title="points on the line: confidence can be trusted")
    axes.set(xlim=(0, 1.02), ylim=(0, 1.05))
    axes.grid(alpha=0.3)


def page(evaluation: Measured, picture: bytes | None) -> str:
    """The report as HTML."""
    answered = evaluation.answered
    title = escape(evaluation.task)
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{len(answered):,} samples</p>" if len(answered) else "",
        figures_table(evaluation),
    ]
    if picture is not None:
        parts.append(
            f'<p><img class="wide" alt="answers beside what was wanted" src="{data_url("image/png", picture)}"></p>'
        )
    if evaluation.sort == "class":
        parts.append(_confused(evaluation))
    worst = evaluation.worst()
    if worst:
        parts += [
            "<h2>The worst answers</h2>",
            f'<div class="cards">{"".join(_card(evaluation, i) for i in worst)}</div>',
        ]
    return html_page(f"evaluation of {title}", "\n".join(part for part in parts if part))


def figures_table(evaluation: Measured) -> str:
    """The figures as a table in HTML."""
    rows = [
        f'<tr><td>{escape(name)}</td><td>{escape(str(figure))}</td><td class="left">{escape(figure.says)}</td></tr>'
        for name, figure in evaluation.figures.items()
    ]
    rows += [
        f'<tr><td>{escape(name)}</td><td>left out</td><td class="left">{escape(why)}</td></tr>'
        for name, why in evaluation.left_out.items()
    ]
    drawn = any(figure.interval for figure in evaluation.figures.values())
    note = '<p class="note">In brackets: 95 % of the values when the samples are drawn again.</p>' if drawn else ""
    return f"<table>{''.join(rows)}</table>{note}"


def _confused(evaluation: Measured) -> str:
    answered = evaluation.answered
    pairs = Counter((a, b) for a, b in zip(answered.wanted, answered.value, strict=True) if a != b).most_common(
        MOST_PAIRS
    )
    if not pairs:
        return ""
    rows = "".join(
        f'<tr><td>{escape(str(a))}</td><td class="left">{escape(str(b))}</td><td>{count}</td></tr>'
        for (a, b), count in pairs
    )
    return f'<h2>Most often confused</h2><table><tr><th>wanted</th><th class="left">answered</th><th>times</th></tr>{rows}</table>'


def _card(evaluation: Measured, i: int) -> str:
    answered = evaluation.answered
    sample = evaluation.samples[i]
    fields = "".join(
        _shown(name, tokenizer, value)
        for name, (tokenizer, starred) in evaluation.fields.items()
        for value in (sample.get(name) or [None] if starred else [sample.get(name)])
    )
    wanted, told = (escape(shortened(str(x), MOST_LETTERS)) for x in (answered.wanted[i], answered.value[i]))
    return (
        f'<div class="card"><span class="note">sample {i}</span>{fields}<div>wanted <b>{wanted}</b></div>'
        f"<div>answered <b>{told}</b>, confidence {answered.confidence[i]:.0%}</div></div>"
    )


def _shown(name: str, tokenizer: Tokenizer, value: Any) -> str:
    """A value as the model reads it: what its kind makes of the tokens."""
    if value is None:
        return f'<div class="note">{escape(name)}: none</div>'
    found = file_of(tokenizer, tokenizer.decode(tokenizer(value)), texts=True) if tokenizer.decodes else None
    suffix, data = found or ("", b"")
    if suffix == ".png":
        shown = f'<img alt="{escape(name)}" src="{data_url(MEDIA[suffix], data)}">'
    elif suffix == ".wav":
        shown = f'<audio controls src="{data_url(MEDIA[suffix], data)}"></audio>'
    else:
        text = value if isinstance(value, str) else describe(value)
        text = data.decode("utf-8", "replace") if suffix in (".txt", ".json") else text
        shown = f"<pre>{escape(shortened(text, MOST_LETTERS))}</pre>"
    return f'<div><span class="note">{escape(name)}</span>{shown}</div>'
