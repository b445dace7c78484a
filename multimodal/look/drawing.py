"""The X-ray as one picture: heat over photographs, under spectrograms, along words; alignments; a table of heads."""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.files import save_figure
from multimodal.look.answers import answer_line
from multimodal.look.layer_xray import NAMES, LayerXRay, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from multimodal.look.attention_xray import XRay, XRayField

WIDTH = 11.0  # inches
DPI = 110
MARGIN = 1.5  # inches to the left of tables and pictures, for the names of layers
SHADE = (0.85, 0.37, 0.01)
"""The colour that attention has on white."""
GREY = "0.8"
"""The colour of the sink."""
LINE = 96  # characters in a line of shaded words
TITLE = 125  # characters in a line of a title
TILE = 84  # pixels that the longer side of a small picture has at least
MOST_TOKENS = 480  # tokens of a text that a picture shows; the page shows all
READOUTS = {
    "effective": "effective number of keys",
    "evidence": "evidence, nats",
    "prior": NAMES["prior"],
    "score": NAMES["score"],
}
Looks = list[tuple[LayerXRay, Tensor]]
"""Layers, each with the shares of its heads' attention on the tokens of a field: (H, N), or (H, T, N) by query."""
Heads = Mapping[str, Sequence[int]]
"""Which heads of each layer are drawn."""


@dataclass(frozen=True)
class Panel:
    """A part of the picture.

    title: the line above it.
    height: in inches, without the title.
    draw: draws it into a box (left, bottom, width, height) in inches.
    """

    title: str
    height: float
    draw: "Callable[[Figure, tuple[float, float, float, float]], None]"


def draw(ray: "XRay", path: "str | Path | io.BytesIO") -> None:
    """Write the whole picture."""
    from matplotlib.figure import Figure

    parts = panels(ray)
    note = left_out(ray)
    top, gap, heading = 0.7 if note else 0.5, 0.22, 0.32
    titles = [textwrap.wrap(plain(p.title), TITLE) for p in parts]
    height = top + sum(
        p.height + heading + 0.16 * (len(lines) - 1) + gap for p, lines in zip(parts, titles, strict=True)
    )
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    at = height - 0.3
    figure.text(0.35 / WIDTH, at / height, plain(ray.task), fontsize=14, weight="bold", va="center")
    figure.text(1 - 0.35 / WIDTH, at / height, plain(answer_line(ray)), fontsize=11, va="center", ha="right")
    if note:
        figure.text(0.35 / WIDTH, (at - 0.26) / height, note, fontsize=8, color="0.4", va="center")
    at -= top - 0.3
    for part, lines in zip(parts, titles, strict=True):
        at -= heading + 0.16 * (len(lines) - 1)
        figure.text(0.35 / WIDTH, (at + 0.1) / height, "\n".join(lines), fontsize=10, color="0.25")
        at -= part.height
        part.draw(figure, (0.35, at, WIDTH - 0.7, part.height))
        at -= gap
    if isinstance(path, str | Path):
        save_figure(path, figure, DPI)
    else:
        figure.savefig(path, dpi=DPI)


def panels(ray: "XRay") -> list[Panel]:
    """All parts, from top to bottom."""
    heads = ray.chosen_heads()
    found = [panel for field in ray.reads for panel in _field_panels(ray, field, heads)]
    found += [panel for field in ray.reads for panel in _written_panels(ray, field, heads)]
    memories = [layer for layer in ray.layers if layer.key_M is None and heads[layer.name]]
    return [*found, *(_slots(layer, heads[layer.name]) for layer in memories), _readouts(ray, heads)]


def without_tail(field: "XRayField", looks: Looks) -> "tuple[XRayField, Looks, str]":
    """A field and its shares without equal tokens at its end, if they are more than half of it and more than eight, as silence
    after a sound is; and what a title says of them."""
    size = len(field) - field.equal + 1
    if field.flat or field.equal <= max(8, len(field) // 2):
        return field, looks, ""
    picture_YXC = field.picture_YXC
    if picture_YXC is not None:
        picture_YXC = picture_YXC[:, : size * picture_YXC.shape[1] // len(field)]
    second_N = None if field.second_N is None else field.second_N[:size]
    cut = replace(
        field, row_N=field.row_N[:size], labels=field.labels[:size], picture_YXC=picture_YXC, second_N=second_N, equal=1
    )
    share = sum(float(heat[..., size:].sum(-1).mean()) for _, heat in looks) / max(len(looks), 1)
    note = f"; not shown: {len(field) - size} equal tokens at its end, which get {percent(share)}"
    return cut, [(layer, heat[..., :size]) for layer, heat in looks], note


def without_sink(ray: "XRay", field: "XRayField", looks: Looks) -> tuple[Looks, str]:
    """Shares with 0 in place of the sink's, if it is a token of the field, and what a title says of it."""
    at = ray.sunk(field.name)
    if at is None or not looks:
        return looks, ""
    share = sum(float(heat[..., at].mean()) for _, heat in looks) / len(looks)
    others = [(layer, heat.index_fill(-1, torch.tensor([at]), 0.0)) for layer, heat in looks]
    return others, f"; not shaded: the first token, where heads look that read nothing ({percent(share)})"


def left_out(ray: "XRay") -> str:
    """The note on a picture that does not show every head; otherwise empty."""
    every, drawn = sum(layer.heads for layer in ray.layers), sum(map(len, ray.chosen_heads().values()))
    return f"{drawn} of {every} heads: the last block and the sharpest; the page has all" if drawn < every else ""


def scale(ray: "XRay", looks: Looks, *, mean: bool = False) -> str:
    """The largest share, of the heads or of their mean, beside the share under uniform attention."""
    most = [float((heat.mean(0) if mean else heat).max()) for _, heat in looks]
    strongest = max(range(len(most)), key=most.__getitem__)
    return f"up to {percent(most[strongest])}, even would be {percent(ray.even(looks[strongest][0]))}"


def panel_image(panel: Panel) -> bytes:
    """One part alone, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, panel.height + 0.1), facecolor="white")
    panel.draw(figure, (0.0, 0.05, WIDTH - 0.1, panel.height))
    data = io.BytesIO()
    figure.savefig(data, dpi=DPI, format="png")
    return data.getvalue()


def plain(text: str) -> str:
    """Text in which matplotlib finds no formula, with visible line ends."""
    return visible(text).replace("$", r"\$")


def visible(text: str) -> str:
    """Text with symbols in place of characters that would break a line."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎")


def shown(label: str) -> str:
    """The label of a token that stands alone, with symbols for spaces at its ends."""
    return visible(label).replace(" ", "␣") if not label.strip() or label != label.strip() else visible(label)


def overlay(picture_YXC: Tensor, heat_N: Tensor, grid: tuple[int, int], *, longer: int = TILE) -> np.ndarray:
    """A picture (Y, X, 3) in bytes with heat over it, brightest where the heat is largest; enlarged to `longer` pixels or more."""
    from matplotlib import colormaps

    picture = _enlarged(picture_YXC, longer)
    heat = np.asarray(heat_N.reshape(grid), dtype=np.float32)
    heat = heat / max(float(heat.max()), 1e-12)
    high, wide = picture.shape[:2]
    rows = np.arange(high) * grid[0] // high
    columns = np.arange(wide) * grid[1] // wide
    heat = heat[rows][:, columns]
    colour = colormaps["inferno"](heat)[:, :, :3]
    # a grey picture, so that every colour in the result stands for a share
    grey = picture.mean(2, keepdims=True).repeat(3, 2)
    alpha = 0.35 + 0.35 * heat[:, :, None]
    return np.rint(255 * ((1 - alpha) * grey + alpha * colour)).astype(np.uint8)


def shown_picture(picture_YXC: Tensor, *, longer: int = TILE) -> np.ndarray:
    """The picture (Y, X, 3) in bytes as it is, enlarged like `overlay`."""
    return np.rint(255 * _enlarged(picture_YXC, longer)).astype(np.uint8)


def _enlarged(picture_YXC: Tensor, longer: int) -> np.ndarray:
    """The picture in three colours, with `longer` pixels on its longer side, or up to twice as many."""
    shrink = max(1, max(picture_YXC.shape[:2]) // longer)
    small_CYX = F.avg_pool2d(picture_YXC.cpu().float().permute(2, 0, 1), shrink, ceil_mode=True)
    picture = small_CYX.permute(1, 2, 0).numpy()
    times = max(1, -(-longer // max(picture.shape[:2])))
    picture = picture.repeat(times, 0).repeat(times, 1)
    return picture.repeat(3, 2) if picture.shape[2] == 1 else picture[:, :, :3]


def _axes(figure: "Figure", box: tuple[float, float, float, float]) -> "Axes":
    """Axes at (left, bottom, width, height) in inches."""
    wide, high = figure.get_size_inches()
    left, bottom, width, height = box
    axes = figure.add_axes((left / wide, bottom / high, width / wide, height / high))
    axes.tick_params(labelsize=7, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _shaded(
    figure: "Figure", box: tuple[float, float, float, float], values: Tensor, most: float | None = None
) -> "Axes":
    """Framed axes with a table of shares, darkest at `most` (its own largest unless given)."""
    axes = _axes(figure, box)
    axes.imshow(values.numpy(), aspect="auto", cmap=_shades(), interpolation="nearest", vmin=0, vmax=most)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(visible=True, color="0.8")
    return axes


def _photograph(figure: "Figure", box: tuple[float, float, float, float], pixels: np.ndarray) -> "Axes":
    axes = _axes(figure, box)
    axes.imshow(pixels, aspect="auto", interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    return axes


def _field_panels(ray: "XRay", field: "XRayField", heads: Heads) -> list[Panel]:
    """Attention of the asked queries on one field, for every layer and head that is drawn."""
    looks = [(layer, heat) for layer, heat in ray.looking_at(field.name) if heads[layer.name]]
    if not looks:
        return []
    if field.flat:
        return [_tiles(ray, field, looks, heads)]
    found = [_words(ray, field, looks)] if field.text else []
    maps = [(layer, part) for layer, part in own_looks(ray, field) if heads[layer.name]]
    mapped = {layer.name for layer, _ in maps}
    if others := [(layer, heat) for layer, heat in looks if layer.name not in mapped]:
        found.append(strips(ray, field, others, heads))
    if maps:
        found.append(_alignment(ray, field, maps, heads))
    return found


def _tiles(ray: "XRay", field: "XRayField", looks: Looks, heads: Heads) -> Panel:
    """The picture, and for every layer a row of it with the heat of the mean of heads and of each head."""
    picture_YXC = field.picture_YXC
    assert picture_YXC is not None
    looks, note = without_sink(ray, field, looks)
    most = max(len(heads[layer.name]) for layer, _ in looks)
    high, wide = picture_YXC.shape[:2]
    gap, bar = 0.06, 0.15 if field.learned else 0.0
    size = min(1.25, (WIDTH - 0.7 - MARGIN) / (most + 2) - gap)
    tall, above = size * min(high / wide, 2.0), 0.34
    font = 6.5 if size > 0.7 else 4.5

    def picture(figure: "Figure", box: tuple[float, float, float, float]) -> None:
        left, bottom, _, height = box
        for i, (layer, heat_HN) in enumerate(looks):
            under = bottom + height - (i + 1) * (tall + above + bar) + bar
            _name_layer(figure, left, under + tall / 2, layer)
            tiles = [("mean", heat_HN.mean(0))] if layer.heads > 1 else []
            tiles += [(f"head {h}", heat_HN[h]) for h in heads[layer.name]]
            # the first column holds the picture itself, in the first row alone
            if i == 0:
                box = (left + MARGIN, under, size, tall)
                _photograph(figure, box, shown_picture(picture_YXC)).set_title(plain(field.name), fontsize=font, pad=2)
            for j, (name, share_N) in enumerate(tiles, start=1):
                at, heat_N = left + MARGIN + j * (size + gap), share_N[field.learned :]
                axes = _photograph(figure, (at, under, size, tall), overlay(picture_YXC, heat_N, field.grid))
                said = f"{name} {percent(float(heat_N.sum()))}\nup to {percent(float(heat_N.max()))}"
                axes.set_title(said, fontsize=font, pad=2, color="0.3")
                if field.learned:
                    _bar(figure, (at, under - bar + 0.02, size, bar - 0.04), share_N[: field.learned].tolist(), font)

    patches = [(layer, heat[:, field.learned :]) for layer, heat in looks]
    title = f"{field.name}: where the answer looked, and the share of the head that fell on it; one patch {scale(ray, patches)}"
    if field.learned:
        title += f"; bars: {learned_names(field)}"
    return Panel(title + note, len(looks) * (tall + above + bar), picture)


def learned_names(field: "XRayField") -> str:
    """What stands before the patches: "class token", "learned 0 to 4"."""
    first, last = field.labels[0], field.labels[field.learned - 1]
    return first if first == last else f"{first} to {last.rpartition(' ')[2]}"


def _bar(figure: "Figure", box: tuple[float, float, float, float], shares: Sequence[float], font: float) -> None:
    """A bar as long as the whole attention of a head, filled by the shares of its learned tokens, and their sum."""
    axes = _axes(figure, box)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], facecolor="0.93")
    begin = 0.0
    for share in shares:
        axes.axvspan(begin, begin + share, facecolor=(*SHADE, 0.6), edgecolor="white", linewidth=0.4)
        begin += share
    axes.text(0.98, 0.45, percent(begin), fontsize=font - 1, color="0.3", ha="right", va="center")


def _name_layer(figure: "Figure", left: float, middle: float, layer: LayerXRay) -> None:
    """Write the name of a layer into the margin of a box that begins at `left`."""
    wide, high = figure.get_size_inches()
    figure.text((left + MARGIN - 0.1) / wide, middle / high, plain(layer.name), fontsize=8, ha="right", va="center")


def _words(ray: "XRay", field: "XRayField", looks: Looks) -> Panel:
    """For every layer the text, each token on the shade of the mean of the heads; the sink in grey."""
    field, looks, tail = without_tail(field, looks)
    looks, note = without_sink(ray, field, looks)
    sink = ray.sunk(field.name)
    labels = [visible(label) for label in field.labels[:MOST_TOKENS]]
    # lines are broken between tokens, at LINE characters of a monospaced font
    places, line, column = [], 0, 0
    for label in labels:
        if column and column + len(label) > LINE:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(label)
    lines, step = line + 1, 0.22

    def words(figure: "Figure", box: tuple[float, float, float, float]) -> None:
        from matplotlib.patches import Rectangle

        left, bottom, width, height = box
        for i, (layer, heat_HN) in enumerate(looks):
            under = bottom + height - (i + 1) * lines * step - i * 0.08
            axes = _axes(figure, (left + MARGIN, under, width - MARGIN, lines * step))
            _name_layer(figure, left, under + lines * step - step / 2, layer)
            axes.set(xlim=(0, LINE), ylim=(lines, 0), xticks=[], yticks=[])
            mean_N = heat_HN.mean(0)
            strength = (mean_N / mean_N.max().clamp(min=1e-12)).tolist()
            for n, (label, (row, begin), s) in enumerate(zip(labels, places, strength, strict=False)):
                colour = GREY if n == sink else (*SHADE, 0.75 * s)
                axes.add_patch(Rectangle((begin, row + 0.06), len(label), 0.88, color=colour, linewidth=0))
                axes.text(begin, row + 0.52, plain(label), fontsize=10, family="monospace", va="center")

    more = len(field) - len(labels)
    title = f"{field.name}: where the answer looked, mean of the heads; a token {scale(ray, looks, mean=True)}"
    title += f"; {more} more tokens" if more else ""
    return Panel(title + note + tail, len(looks) * (lines * step + 0.08), words)


def strips(ray: "XRay", field: "XRayField", looks: Looks, heads: Heads | None = None) -> Panel:
    """A row for each head, a column for each token; under the picture where there is one, such as a spectrogram."""
    field, looks, tail = without_tail(field, looks)
    looks, note = without_sink(ray, field, looks)
    sink = ray.sunk(field.name)
    if heads is not None:
        looks = [(layer, heat[list(heads[layer.name])]) for layer, heat in looks]
    # each head is shaded up to its own largest share: a head that spreads evenly would be white otherwise
    heat_HN = torch.cat([heat / heat.amax(-1, keepdim=True).clamp(min=1e-12) for _, heat in looks])
    rows, tokens = heat_HN.shape
    row, above = 0.16, 0.0 if field.picture_YXC is None else 1.6
    below = 0.0
    if field.second_N is not None:
        below = 0.2
    elif tokens <= 60:  # more labels would overlap
        below = min(0.9, 0.12 + 0.07 * max(map(len, field.labels)))

    def rows_of_heads(figure: "Figure", box: tuple[float, float, float, float]) -> None:
        left, bottom, width, height = box
        width = min(width, MARGIN + max(0.3 * tokens, 4.0)) if field.picture_YXC is None else width
        _spectrogram(figure, (left + MARGIN, bottom + height - above, width - MARGIN, above - 0.05), field)
        axes = _shaded(figure, (left + MARGIN, bottom + below, width - MARGIN, rows * row), heat_HN, most=1)
        if sink is not None:
            axes.axvspan(sink - 0.5, sink + 0.5, color=GREY)
        at = 0
        for layer, heat in looks:
            middle = bottom + below + rows * row - (at + len(heat) / 2) * row
            _name_layer(figure, left, middle, layer)
            at += len(heat)
            if at < rows:
                axes.axhline(at - 0.5, color="0.6", linewidth=0.6)
        _name_columns(axes, field, below > 0)

    title = "the same for each head (a row each" if field.text else "where the answer looked, a row for each head ("
    title = f"{field.name}: {title}{'; ' if field.text else ''}darkest: its largest); a token {scale(ray, looks)}"
    return Panel(title + note + tail, above + rows * row + below, rows_of_heads)


def _spectrogram(figure: "Figure", box: tuple[float, float, float, float], field: "XRayField") -> None:
    """The field's picture in this box, if it has one, above the tokens that tile it along time."""
    if field.picture_YXC is None:
        return
    left, bottom, width, height = box
    before = width * field.learned / len(field)
    axes = _axes(figure, (left + before, bottom, width - before, height))
    axes.imshow(field.picture_YXC.numpy(), aspect="auto", cmap="magma", interpolation="nearest", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _name_columns(axes: "Axes", field: "XRayField", each: bool) -> None:
    """The times of a sound below axes with a column for each token, or if `each` the label of every token."""
    if field.second_N is not None:
        from matplotlib.ticker import MaxNLocator

        time_N = field.second_N.numpy()
        seconds = [t for t in MaxNLocator(8).tick_values(0, time_N[-1]) if time_N[0] <= t <= time_N[-1]]
        axes.set_xticks(np.interp(seconds, time_N, np.arange(len(time_N))), [f"{t:g} s" for t in seconds], fontsize=6.5)
    elif each:
        upright = max(map(len, field.labels)) <= 2
        names = [plain(shown(label)) for label in field.labels]
        axes.set_xticks(range(len(names)), names, rotation=0 if upright else 90, fontsize=6.5, family="monospace")


def _shades() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("attention", [(1, 1, 1), (1, 0.85, 0.65), SHADE, (0.35, 0.12, 0)])


def written_looks(ray: "XRay", field: "XRayField") -> Looks:
    """The layers that have the rows the head reads, with their shares on a field that was read: (H, T, N)."""
    looks = []
    for layer in ray.layers if ray.written is not None else ():
        part = ray.onto(layer, field.name)
        if part is not None and bool(torch.isin(layer.query_T, ray.asked_N).any()):
            looks.append((layer, part))
    return looks


def own_looks(ray: "XRay", field: "XRayField") -> Looks:
    """The layers whose asked queries are all of their queries, with the shares (H, N, N) of a field's tokens on each other.

    The mean over such queries says little of a head that reads the neighbours of each.
    """
    looks = []
    for layer in ray.layers:
        part = ray.onto(layer, field.name)
        mine_T = torch.isin(layer.query_T, field.row_N)
        if part is not None and part.shape[1] == len(mine_T) and int(mine_T.sum()) == len(field) > 1:
            looks.append((layer, part[:, mine_T]))
    return looks


def _written_panels(ray: "XRay", field: "XRayField", heads: Heads) -> list[Panel]:
    """Attention of each written token on one field that was read."""
    looks = [(layer, part) for layer, part in written_looks(ray, field) if heads[layer.name]]
    if not looks:
        return []
    if field.flat:
        return [_word_by_word(ray, field, *looks[-1])]
    return [_alignment(ray, field, looks, heads, ray.written_labels)]


def _word_by_word(ray: "XRay", field: "XRayField", layer: LayerXRay, part_HTN: Tensor, most: int = 14) -> Panel:
    """The picture once for each token that was written: Xu et al. 2015, figure 3."""
    picture_YXC = field.picture_YXC
    assert picture_YXC is not None
    ((_, part_HTN),), note = without_sink(ray, field, [(layer, part_HTN)])
    part_HTN = part_HTN[..., field.learned :]
    labels, across = ray.written_labels[:most], 7
    size, gap = (WIDTH - 0.7) / across - 0.08, 0.08
    high, wide = picture_YXC.shape[:2]
    tall = size * min(high / wide, 1.5)
    lines = -(-len(labels) // across)

    def pictures(figure: "Figure", box: tuple[float, float, float, float]) -> None:
        left, bottom, _, height = box
        for i, label in enumerate(labels):
            place = (left + i % across * (size + gap), bottom + height - (i // across + 1) * (tall + 0.25), size, tall)
            axes = _photograph(figure, place, overlay(picture_YXC, part_HTN[:, i].mean(0), field.grid))
            axes.set_title(f"{plain(shown(label))}  {percent(float(part_HTN[:, i].mean(0).sum()))}", fontsize=8, pad=2)

    more = len(ray.written_labels) - len(labels)
    title = f"{field.name}: where {layer.name} looked for each token written, and the share that fell on it; one patch "
    return Panel(
        title + scale(ray, [(layer, part_HTN)], mean=True) + (f"; {more} more" if more else "") + note,
        lines * (tall + 0.25),
        pictures,
    )


def _alignment(
    ray: "XRay", field: "XRayField", looks: Looks, chosen: Heads, written: Sequence[str] | None = None
) -> Panel:
    """Rows: tokens written, or the field's own; columns: tokens read. Large the mean over the heads of the last layer, small every
    head."""
    field, looks, tail = without_tail(field, looks)
    looks, note = without_sink(ray, field, looks)
    sink, read = ray.sunk(field.name), field.labels
    heading = f"what is written (rows) against {field.name} (columns)"
    if written is None:
        written, looks = read, [(layer, part[:, : len(read)]) for layer, part in looks]
        heading = f"{field.name}: which token (row) looks at which (column)"
    names = len(read) <= 80 and len(written) <= 80 and field.second_N is None
    above = 0.0 if field.picture_YXC is None else 0.8
    large = (WIDTH - 0.7 - MARGIN) * min(1.0, max(0.35, len(read) / 45))
    cell = large / len(read)
    tall = min(4.5, max(0.8, len(written) * (min(cell, 0.22) if names else cell)))
    below = min(1.1, 0.12 + 0.065 * max(map(len, read))) if names else 0.2
    tiles = [(i, h) for i, (layer, _) in enumerate(looks) for h in chosen[layer.name]]
    if looks[-1][0].heads == 1:  # the mean of one head is that head
        tiles = tiles[:-1]
    counts = [sum(i == j for j, _ in tiles) for i in range(len(looks))]
    across = max(4, min(max(counts), 8))
    small = (WIDTH - 0.7 - MARGIN) / across - 0.1
    small_tall = min(small * max(len(written) / len(read), 0.2), 1.6)
    lines = sum(-(-count // across) for count in counts)

    def alignment(figure: "Figure", box: tuple[float, float, float, float]) -> None:
        left, bottom, _, height = box
        _spectrogram(figure, (left + MARGIN, bottom + height - above, large, above - 0.05), field)
        axes = _shaded(figure, (left + MARGIN, bottom + height - above - tall, large, tall), looks[-1][1].mean(0))
        _name_columns(axes, field, names)
        if len(written) <= 80 and (names or written is not read):
            axes.set_yticks(range(len(written)), [plain(shown(x)) for x in written], fontsize=6.5, family="monospace")
        if sink is not None:
            axes.axvspan(sink - 0.5, sink + 0.5, color=GREY)
        under, column, before = bottom + height - above - tall - below - 0.2, across, None
        for i, h in tiles:
            layer, part_HTN = looks[i]
            if column == across or i != before:
                column, under = 0, under - (small_tall + 0.2)
                if i != before:
                    _name_layer(figure, left, under + small_tall / 2, layer)
            box = (left + MARGIN + column * (small + 0.1), under, small, small_tall)
            # a head that reads none of these tokens is not shaded by what little it gives them
            axes = _shaded(figure, box, part_HTN[h], max(float(part_HTN[h].max()), ray.even(layer)))
            axes.set_title(f"head {h}, up to {percent(float(part_HTN[h].max()))}", fontsize=6.5, pad=2, color="0.3")
            if sink is not None:
                axes.axvspan(sink - 0.5, sink + 0.5, color=GREY)
            column, before = column + 1, i

    which = "its one head" if looks[-1][0].heads == 1 else "mean of the heads"
    title = f"{heading}: {looks[-1][0].name}, {which}, "
    title += scale(ray, looks[-1:], mean=True) + ("; below, each head" if tiles else "")
    return Panel(
        title + note + tail, above + tall + below + (0.2 + lines * (small_tall + 0.2) if tiles else 0), alignment
    )


def _slots(layer: LayerXRay, heads: Sequence[int]) -> Panel:
    """The usage of each slot of a memory, by head."""
    usage_HM = layer.usage_HM[list(heads)]

    def slots(figure: "Figure", box: tuple[float, float, float, float]) -> None:
        left, bottom, width, height = box
        axes = _axes(figure, (left + MARGIN, bottom + 0.2, width - MARGIN, height - 0.2))
        axes.imshow(usage_HM.numpy(), aspect="auto", cmap=_shades(), vmin=0, interpolation="nearest")
        axes.set(yticks=range(len(heads)), yticklabels=[f"head {h}" for h in heads])
        for side in axes.spines.values():
            side.set(visible=True, color="0.8")

    even = usage_HM.sum(-1).mean() / usage_HM.shape[-1]
    title = f"{layer.name}, slots: how many queries' worth of reading each got; up to {float(usage_HM.max()):.3g}, even would be "
    return Panel(f"{title}{float(even):.3g}", 0.25 + 0.18 * len(heads), slots)


def _readouts(ray: "XRay", chosen: Heads) -> Panel:
    """The table of heads as small tables of numbers: layers down, heads across, one for each read-out."""
    drawn = [layer for layer in ray.layers if chosen[layer.name]]
    summaries = [layer.summary() for layer in drawn]
    heads, layers = max(map(len, summaries)), len(summaries)
    row = 0.2
    columns = 4 if heads <= 5 else 2 if heads <= 10 else 1
    width = (WIDTH - 0.7 - MARGIN) / columns - 0.12
    # without a prior but the mask, the variance of the prior is 0 everywhere
    named = {name: title for name, title in READOUTS.items() if any(row[name] for rows in summaries for row in rows)}
    lines = -(-len(named) // columns)

    def tables(figure: "Figure", box: tuple[float, float, float, float]) -> None:
        left, bottom, _, height = box
        for i, (name, title) in enumerate(named.items()):
            under = bottom + height - (i // columns + 1) * (layers * row + 0.35) + 0.15
            numbers = np.full((layers, heads), np.nan)
            for j, summary in enumerate(summaries):
                for h in chosen[drawn[j].name]:
                    numbers[j, h] = summary[h][name]
            axes = _axes(figure, (left + MARGIN + i % columns * (width + 0.12), under, width, layers * row))
            low, top = np.nanmin(numbers), np.nanmax(numbers)
            scale = (numbers - min(low, 0.0)) / max(top - min(low, 0.0), 1e-12)
            axes.imshow(0.6 * scale, aspect="auto", cmap=_shades(), vmin=0, vmax=1)
            for (y, x), number in np.ndenumerate(numbers):
                if not np.isnan(number):
                    axes.text(x, y, f"{number:.3g}", ha="center", va="center", fontsize=7)
            axes.set(xticks=[], yticks=[])
            axes.set_title(title, fontsize=8, pad=3)
            if i % columns == 0:
                for j, layer in enumerate(drawn):
                    _name_layer(figure, left, under + (layers - j - 0.5) * row, layer)

    title = "the heads (across) of each layer: means over all its queries"
    return Panel(title, lines * (layers * row + 0.35), tables)
