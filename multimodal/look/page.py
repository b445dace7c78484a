"""The X-ray as one HTML file: pictures inside as base64, hints as titles, no script, nothing loaded from elsewhere."""

import io
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from multimodal.look.answers import answer_line
from multimodal.look.drawing import (
    Looks,
    Panel,
    learned_names,
    overlay,
    own_looks,
    panel_image,
    scale,
    shown,
    shown_picture,
    visible,
    without_sink,
    without_tail,
    written_looks,
)
from multimodal.look.drawing import strips as strips_panel
from multimodal.look.embeddings import neighbours
from multimodal.look.layer_xray import NAMES, LayerXRay, counted, percent
from multimodal.look.layers import read_values
from multimodal.look.lens import lens
from multimodal.look.parameter_count import count_parameters
from multimodal.notebook import data_url, html_page
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer, written_tokens

if TYPE_CHECKING:
    from multimodal.look.attention_xray import XRay, XRayField

MOST_CELLS = 6000  # a larger table is drawn as a picture
MOST_FOLDED = 60_000  # likewise tables that have more cells together, which a browser opens slowly
MOST_ROWS = 120  # of a list; the number of the others is stated
SMALLEST_TABLE = 300  # entries of an embedding that has neighbours worth showing: bytes are no words

HINTS = {
    "effective": (
        NAMES["effective"],
        "effective number of keys, exp of the posterior's entropy: how many places a query really reads. 1 is hard.",
    ),
    "evidence": (
        NAMES["evidence"],
        "log of the sum over keys of prior times likelihood, in nats: low where the memory knows no such query.",
    ),
    "prior": (NAMES["prior"], "variance over the keys of the log-prior: large where place decides."),
    "score": (
        NAMES["score"],
        "variance over the keys of the score: large where content decides. Rotary places are part of the score.",
    ),
    "price": (
        NAMES["price"],
        "evidence less the best key's share of it, in nats: what is lost when only the likeliest key is read.",
    ),
    "spread": (NAMES["spread"], "variance of the values under the posterior: 0 where all that is read says the same."),
    "mass": (NAMES["mass"], "sum of the weights: 1, or less where a factor is multiplied on after the softmax."),
}


GUIDE = (
    "How to read this: a head gives each token a share of its attention; darker or brighter means more, and each picture is "
    "shaded up to its own largest share, which stands beside it.<br>Compare that with the even share, which every token would "
    "get if the head did not choose: near it, the head looks nowhere in particular. More at the end of the page."
)


def page(ray: "XRay") -> str:
    """The HTML of the whole page."""
    title = escape(ray.task)
    parts = [
        f"<h1>{title}</h1>",
        _answer(ray),
        *(_field(ray, field) for field in ray.reads),
        *(_written(ray, field) for field in ray.reads),
        _heads(ray),
        _influential(ray),
        _memories(ray),
        _lens(ray),
        _neighbours(ray),
        _parameters(ray),
        _glossary(),
    ]
    body = "\n".join(part for part in parts if part)
    return html_page(f"X-ray: {title}", body)


def _answer(ray: "XRay") -> str:
    said = f'<div class="answer">{escape(answer_line(ray, 400))}</div>'
    top = list(ray.prediction.probability.items())[:5]
    rows = "".join(
        f'<tr><td>{escape(str(name))}</td><td class="left"><span class="bar" style="width:{max(1, round(220 * p))}px">'
        f"</span></td><td>{p:.1%}</td></tr>"
        for name, p in top
    )
    tokens = ", ".join(
        f"{counted(len(f), 'token')} of {escape(f.name)}" for f in (*ray.reads, ray.written) if f is not None
    )
    heads = counted(sum(layer.heads for layer in ray.layers), "head")
    sizes = f"{tokens}; {counted(len(ray.layers), 'attention layer')}, {heads}."
    top_table = f'<table class="bars">{rows}</table>' if rows else ""
    return f'{said}{top_table}<p class="note">{sizes}</p><p class="note">{GUIDE}</p>'


def _field(ray: "XRay", field: "XRayField") -> str:
    """Attention of the asked queries on one field."""
    looks = list(ray.looking_at(field.name))
    if not looks:
        return ""
    name, sink = field.name, ray.sunk(field.name)
    shaded, note = without_sink(ray, field, looks)
    note = escape(note)
    out = [f"<h2>{escape(field.name)}: where the answer looked</h2>"]
    if field.flat:
        if field.learned:
            note += f"; bars: {escape(learned_names(field))}"
        patches = [(layer, heat[:, field.learned :]) for layer, heat in shaded]
        out.append(
            '<p class="note">Bright where a head looked most; the percentage is the share of its attention that fell here. '
            f"Point at a patch for its share: {scale(ray, patches)}{note}.</p>"
        )
        for i, (layer, heat_HN) in enumerate(shaded):
            out.append(f"<h3>{escape(layer.name)}</h3>")
            out.append(f'<div class="row">{"".join(_tiles(field, layer, heat_HN, first=i == 0))}</div>')
    elif field.text:
        most = scale(ray, shaded, mean=True)
        cut, looks, tail = without_tail(field, looks)
        out.append(
            f'<p class="note">Darker: read more, mean of the heads. Point at a token for its share: {most}{note}{escape(tail)}.</p>'
        )
        for layer, heat_HN in looks:
            out.append(_shaded(cut, heat_HN.mean(0), layer.name, sink))
        heads = [
            _shaded(cut, heat_N, f"{layer.name}, head {h}", sink)
            for layer, heat_HN in looks
            for h, heat_N in enumerate(heat_HN)
        ]
        if len(heads) > len(looks):
            out.append(f"<details><summary>each of the {len(heads)} heads</summary>{''.join(heads)}</details>")
    own = own_looks(ray, field)
    mapped = {layer.name for layer, _ in own}
    others = [(layer, heat) for layer, heat in looks if layer.name not in mapped]
    if others and not field.flat and not field.text:
        panel = strips_panel(ray, field, others)
        out.append(f'<p class="note">{escape(panel.title)}</p>{_panel(panel)}')
    if own and not field.flat:
        cut, own, tail = without_tail(field, own)
        own = [(layer, part[:, : len(cut)]) for layer, part in own]
        out.append(f"<h2>{escape(name)}, token by token</h2>")
        out.append(f'<p class="note">Rows look at columns. Darker: looked at more{note}{escape(tail)}.</p>')
        out += _tables(ray, cut, own, list(map(shown, cut.labels)))
    return "\n".join(out)


def _tiles(field: "XRayField", layer: LayerXRay, heat_HN: Tensor, *, first: bool) -> Iterator[str]:
    assert field.picture_YXC is not None
    if first:
        image = _image(shown_picture(field.picture_YXC, longer=168), 168, field.name)
        yield f"<figure>{image}<figcaption>as it is</figcaption></figure>"
    mean_N = heat_HN.mean(0)
    first_N, mean_N = mean_N[: field.learned], mean_N[field.learned :]
    cells = "".join(
        f'<span title="{escape(label)}: {share:.1%}"></span>'
        for label, share in zip(field.labels[field.learned :], mean_N.tolist(), strict=True)
    )
    rows, columns = field.grid
    yield (
        f'<figure><div class="grid">'
        f"{_image(overlay(field.picture_YXC, mean_N, field.grid, longer=168), 168, f'{layer.name} on {field.name}')}"
        f'<div style="grid-template:repeat({rows},1fr)/repeat({columns},1fr)">{cells}</div></div>'
        f"{_bars(field, first_N)}"
        f"<figcaption>{'mean of heads' if layer.heads > 1 else 'head 0'} {_shares(mean_N)}</figcaption></figure>"
    )
    if layer.heads == 1:
        return
    numbers = layer.summary()
    for h, heat_N in enumerate(heat_HN):
        first_N, heat_N = heat_N[: field.learned], heat_N[field.learned :]
        pixels = overlay(field.picture_YXC, heat_N, field.grid, longer=84)
        hint = f"{layer.name}, head {h}: reads {numbers[h]['effective']:.1f} keys, evidence {numbers[h]['evidence']:.2f} nats"
        yield (
            f'<figure title="{escape(hint)}">{_image(pixels, 112, f"{layer.name}, head {h} on {field.name}")}'
            f"{_bars(field, first_N)}<figcaption>head {h} {_shares(heat_N)}</figcaption></figure>"
        )


def _bars(field: "XRayField", share_N: Tensor) -> str:
    """A bar as long as the whole attention of a head, filled by the shares of its learned tokens."""
    parts = "".join(
        f'<i style="width:{100 * share:.1f}%" title="{escape(label)}: {share:.1%}"></i>'
        for label, share in zip(field.labels, share_N.tolist(), strict=False)
    )
    return f'<div class="learned">{parts}</div>' if parts else ""


def _shares(heat_N: Tensor) -> str:
    return f"{percent(float(heat_N.sum()))}, up to {percent(float(heat_N.max()))}"


def _shaded(field: "XRayField", share_N: Tensor, name: str, sink: int | None) -> str:
    colours = _colours(share_N, sink)
    spans = "".join(
        f'<span style="background:{colour}" title="{label}: {share:.1%}">{label}</span>'
        for label, share, colour in zip(
            (escape(visible(label)) for label in field.labels), share_N.tolist(), colours, strict=True
        )
    )
    return f'<div class="text"><b>{escape(name)}</b><p>{spans}</p></div>'


def _colours(share_N: Tensor, sink: int | None, most: float | None = None) -> list[str]:
    """The shades of tokens, darkest at `most` (the largest unless given), and grey for the sink."""
    others = [share for n, share in enumerate(share_N.tolist()) if n != sink]
    top = max(max(others, default=0.0) if most is None else most, 1e-12)
    return ["#ddd" if n == sink else _colour(share / top) for n, share in enumerate(share_N.tolist())]


def _colour(strength: float) -> str:
    return f"rgba(217,95,2,{0.75 * strength:.2f})"


def _written(ray: "XRay", field: "XRayField") -> str:
    """Attention of each written token on one field that was read."""
    looks = written_looks(ray, field)
    if ray.written is None or not looks:
        return ""
    out = [f"<h2>{escape(ray.written.name)}, token by token, against {escape(field.name)}</h2>"]
    if field.flat:
        assert field.picture_YXC is not None
        (layer, part_HTN), note = looks[-1], without_sink(ray, field, looks[-1:])[1]
        part_HTN = without_sink(ray, field, looks[-1:])[0][0][1][..., field.learned :]
        out.append(
            f'<p class="note">{escape(layer.name)}, mean of the heads, when each token was about to be written, and the share '
            f"that fell on {escape(field.name)}; one patch {scale(ray, [(layer, part_HTN)], mean=True)}{escape(note)}.</p>"
        )
        labels = ray.written_labels[:MOST_ROWS]
        figures = [
            f"<figure>{_image(overlay(field.picture_YXC, part_HTN[:, i].mean(0), field.grid, longer=112), 112, shown(label))}"
            f"<figcaption>{escape(shown(label))} {_shares(part_HTN[:, i].mean(0))}</figcaption></figure>"
            for i, label in enumerate(labels)
        ]
        out.append(f'<div class="row">{"".join(figures)}</div>' + _more(len(ray.written_labels) - len(labels)))
        return "\n".join(out)
    cut, looks, tail = without_tail(field, looks)
    note = without_sink(ray, cut, looks)[1]
    out.append(
        '<p class="note">Rows: what is written; columns: what is read. Darker: looked at more when the row was about to '
        f"be written. Point at a cell for its share{escape(note + tail)}.</p>"
    )
    out += _tables(ray, cut, looks, [shown(label) for label in ray.written_labels])
    return "\n".join(out)


def _tables(ray: "XRay", field: "XRayField", looks: Looks, rows: Sequence[str]) -> Iterator[str]:
    """The shares (H, T, N) of each layer and head; the last layer comes first and open, the others are folded."""
    most = MOST_CELLS if sum(part.numel() for _, part in looks) <= MOST_FOLDED else 0
    for i, (layer, part_HTN) in enumerate(reversed(looks)):
        names = [f"{layer.name}, head {h}" for h in range(len(part_HTN))]
        tables = [
            _matrix(ray, field, part_TN, name, layer, rows, most) for part_TN, name in zip(part_HTN, names, strict=True)
        ]
        if len(part_HTN) > 1:
            name = f"{layer.name}, mean of the heads"
            cells = MOST_CELLS if i == 0 else most
            tables.insert(0, _matrix(ray, field, part_HTN.mean(0), name, layer, rows, cells))
        if i == 0:
            yield tables.pop(0)
        if tables:
            yield f"<details><summary>{escape(layer.name)}, by head</summary>{''.join(tables)}</details>"


def _matrix(
    ray: "XRay", field: "XRayField", part_TN: Tensor, name: str, layer: LayerXRay, rows: Sequence[str], most: int
) -> str:
    """Shares as a table, or as a picture where it has more than `most` cells; its heading states the largest share."""
    sink = ray.sunk(field.name)
    ((_, other_1TN),), _ = without_sink(ray, field, [(layer, part_TN[None])])
    caption = f"<h3>{escape(name)}: {scale(ray, [(layer, other_1TN)])}</h3>"
    columns = [shown(label) for label in field.labels]
    top = max(float(other_1TN.max()), 1e-12)
    if part_TN.numel() > most:
        shade = (1 - other_1TN[0] / top).numpy()
        pixels = np.rint(255 * np.stack([shade**0.3, shade**0.8, shade], 2)).astype(np.uint8)
        if sink is not None:
            pixels[:, sink] = 221
        return caption + _image(pixels, min(1000, max(4, 160 // len(columns)) * len(columns)), name)
    head = "".join(f"<th><span>{escape(label)}</span></th>" for label in columns)
    lines = []
    for label, line in zip(rows, part_TN, strict=True):
        cells = "".join(
            f'<td style="background:{colour}" title="{escape(label)} ← {escape(read)}: {share:.1%}"></td>'
            for read, share, colour in zip(columns, line.tolist(), _colours(line, sink, top), strict=True)
        )
        lines.append(f"<tr><th>{escape(label)}</th>{cells}</tr>")
    table = f'<table class="matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'{caption}<div class="scroll" title="{escape(name)}">{table}</div>'


def _heads(ray: "XRay") -> str:
    rows = ray.table()
    names = [name for name in HINTS if name != "mass" or any(abs(row["mass"] - 1) > 1e-6 for row in rows)]
    # each column is shaded from its smallest number, or from 0 if none is negative
    low = {name: min(0.0, min(row[name] for row in rows)) for name in names}
    top = {name: max(max(row[name] for row in rows), 1e-12) for name in names}
    head = "".join(f'<th title="{escape(HINTS[name][1])}">{HINTS[name][0]}</th>' for name in names)
    lines, last = [], None
    for row in rows:
        cells = "".join(
            f'<td style="background:{_colour(0.6 * (row[name] - low[name]) / (top[name] - low[name]))}">{row[name]:.3g}</td>'
            for name in names
        )
        first = ' class="first"' if row["layer"] != last else ""
        lines.append(f"<tr{first}><td>{escape(row['layer'])}</td><td>{row['head']}</td>{cells}</tr>")
        last = row["layer"]
    return (
        '<h2>The heads</h2><p class="note">Means over all queries of the layer. Point at a heading for what it says; '
        "each column is shaded by itself.</p>"
        f'<div class="scroll"><table><thead><tr><th>layer</th><th>head</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _influential(ray: "XRay") -> str:
    lines = []
    for layer in ray.layers:
        best = ray.influential_keys(layer)
        if best:
            said = "".join(_numbered(name, f"{change:.3g}") for name, change in best)
            lines.append(f'<tr><td>{escape(layer.name)}</td><td class="left">{said}</td></tr>')
    return (
        '<h2>What if a token were absent</h2><p class="note">The keys without which the heads of a layer would have read '
        "most differently, and by how much: |o<sub>-j</sub> - o| over all heads, mean of the rows that the answer is read "
        "from. Places are counted from 0. Exact for the layer alone: later layers are not run again.</p>"
        f"<table>{''.join(lines)}</table>"
        if lines
        else ""
    )


def _memories(ray: "XRay") -> str:
    out = []
    for layer in ray.layers:
        if layer.key_M is None:
            usage_M = layer.usage_HM.sum(0)
            idle = int((usage_M < 0.01 * usage_M.mean()).sum())
            part_HM = layer.usage_HM / layer.usage_HM.max().clamp(min=1e-12)
            rows = "".join(
                f"<tr><th>head {h}</th>"
                + "".join(
                    f'<td style="background:{_colour(s)}" title="slot {j}: {n:.2f} queries"></td>'
                    for j, (s, n) in enumerate(zip(part_HM[h].tolist(), layer.usage_HM[h].tolist(), strict=True))
                )
                + "</tr>"
                for h in range(layer.heads)
            )
            out.append(
                f"<h3>{escape(layer.name)}: {counted(len(usage_M), 'slot')}, {idle} of which this input hardly reads; "
                f"up to {float(layer.usage_HM.max()):.3g} queries, even would be "
                f"{float(layer.usage_HM.sum(-1).mean()) / len(usage_M):.3g}</h3>"
                f'<div class="scroll"><table class="matrix">{rows}</table></div>'
            )
    return "<h2>Slots of the memory</h2>" + "".join(out) if out else ""


def _lens(ray: "XRay") -> str:
    """The logit lens as a table."""
    try:
        seen = lens(ray.model, ray.task, ray.sample)
    except ConfigError:  # features have no classes
        return ""
    best, p_LN = seen.best(), seen.probability_LNV.amax(-1)
    stop = f"[{len(seen.classes) - 1}]" if ray.model.packer.head(ray.task).autoregressive else ""
    count = min(p_LN.shape[1], 40)
    labels = ray.written_labels if len(ray.written_labels) == p_LN.shape[1] else [str(i) for i in range(p_LN.shape[1])]
    head = "".join(f"<th>{escape(shown(label))}</th>" for label in labels[:count])
    lines = []
    for name, words, chances in reversed(list(zip(seen.layers, best, p_LN.tolist(), strict=True))):
        cells = "".join(
            f'<td style="background:{_colour(0.7 * p)}" title="{p:.1%}">{escape(ray.STOP if word == stop else shown(word))}</td>'
            for word, p in list(zip(words, chances, strict=True))[:count]
        )
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return (
        '<h2>Logit lens</h2><p class="note">What the head would say if the core ended after each layer; darker: surer '
        f"(the last layer is at the top).</p><div class='scroll'><table><thead><tr><th>after</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>{_more(p_LN.shape[1] - count)}"
    )


def _neighbours(ray: "XRay") -> str:
    """The nearest neighbours of a text's tokens in its embedding table."""
    out = []
    values = {name: tokens for name, _, tokens in read_values(ray.model.packer, ray.task, ray.sample)}
    for field in ray.reads:
        embed = ray.model.embeds[field.kind]
        if not field.text or not isinstance(embed, nn.Embedding) or embed.num_embeddings < SMALLEST_TABLE:
            continue
        tokenizer = ray.model.packer.tokenizers[field.kind]
        ids = list(dict.fromkeys(values[field.name].content.tolist()))[:12]
        table_VD = embed.weight.detach().cpu()
        found_NK, cosine_NK = neighbours(table_VD, ids, 5)
        names = _token_texts(tokenizer, [*ids, *found_NK.flatten().tolist()])
        for i, (near, cosines) in enumerate(zip(found_NK.tolist(), cosine_NK.tolist(), strict=True)):
            said = "".join(_numbered(names[j], f"{c:.2f}") for j, c in zip(near, cosines, strict=True))
            out.append(f'<tr><td>{escape(names[ids[i]])}</td><td class="left">{said}</td></tr>')
    return (
        '<h2>Neighbours in the embedding</h2><p class="note">The tokens whose embeddings point most nearly the same way, with the '
        f"cosine.</p><table>{''.join(out)}</table>"
        if out
        else ""
    )


def _token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, str]:
    """Each id with its text."""
    return {i: visible(tokenizer.decode(written_tokens(tokenizer, torch.tensor([i])))) for i in ids}


def _parameters(ray: "XRay") -> str:
    counted = count_parameters(ray.model)
    rows = "".join(
        f'<tr><td>{escape(part)}</td><td>{count:,}</td><td>{count / max(counted.total, 1):.1%}</td><td class="left">'
        f'<span class="bar" style="width:{round(220 * count / max(counted.total, 1))}px"></span></td></tr>'
        for part, count in counted.counts.items()
    )
    return f"<h2>Where the parameters are</h2><table>{rows}<tr class='first'><td>all</td><td>{counted.total:,}</td></tr></table>"


def _glossary() -> str:
    entries = "".join(f"<dt>{name}</dt><dd>{escape(hint)}</dd>" for name, hint in HINTS.values())
    return (
        "<h2>How to read this</h2><p>A head compares a query with keys. A key's share is the posterior of a mixture: its "
        "prior (what its place says; a mask is a prior probability of 0) times its likelihood (the score), over the sum of these, "
        f"the evidence. What is read is the mean of the keys' values under it.</p><dl>{entries}</dl>"
    )


def _numbered(name: str, number: str) -> str:
    return f"<i>{escape(visible(name))} <span class='note'>{number}</span></i> "


def _more(count: int) -> str:
    return f'<p class="note">and {count} more</p>' if count > 0 else ""


def _image(pixels: np.ndarray, width: int, alt: str) -> str:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return f'<img width="{width}" alt="{escape(alt)}" src="{data_url("image/png", data.getvalue())}">'


def _panel(panel: Panel) -> str:
    url = data_url("image/png", panel_image(panel))
    return f'<img class="wide" title="{escape(panel.title)}" alt="{escape(panel.title)}" src="{url}">'
