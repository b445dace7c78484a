"""Draws docs/stream.svg, a packed stream and who attends to whom, from what a model packs: `uv run docs/drawings.py`."""

from pathlib import Path

import numpy as np
import torch

import multimodal as mm
from multimodal.masks import PREFIX_LM
from multimodal.stream import Stream
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

COLOURS = {"image": "#4c72b0", "audio": "#55a868", "text": "#dd8452", "head": "#8c8c8c"}
CELL, LEFT, TOP = 20, 20, 96  # pixels: of a token, and of the corner of the mask
TASKS = {0: "audio -> text", 1: "image -> text", 2: "image -> label"}


def stream() -> Stream:
    """A sound with its words, a picture with its caption, and a picture with its label, packed without padding."""
    kinds = {
        "image": ImagePatches(patch=4, channels=1),
        "audio": AudioFrames(),
        "text": TextBytes(),
        "label": Labels(("dark", "light")),
    }
    model = mm.Model(kinds, mm.Core.tiny(), list(TASKS.values()))
    sound = np.zeros(1600, np.float32), 16_000
    narrow, wide = np.zeros((4, 12), np.float32), np.zeros((8, 12), np.float32)
    return model.packer(
        [
            ("audio -> text", {"audio": sound, "text": "hi"}),
            ("image -> text", {"image": narrow, "text": "ok"}),
            ("image -> label", {"image": wide, "label": "dark"}),
        ]
    )


def drawing(packed: Stream) -> str:
    """The stream as a row of squares under its tasks, and the mask: a row for each query, coloured at the keys it attends to."""
    rows = [kind.partition(":")[0] for kind, content in packed.content.items() for _ in range(len(content))]
    kinds, info = [rows[i] for i in packed.order_T.tolist()], packed.layout.info
    allowed = torch.as_tensor(PREFIX_LM.allows(info[:, None], info[None, :])).tolist()
    side, sample = len(kinds) * CELL, info.sample.tolist()
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side + 260} {TOP + side + 20}"',
        f' font-family="sans-serif" font-size="13"><rect width="{side + 260}" height="{TOP + side + 20}" fill="#fff"/>',
    ]
    for number, task in TASKS.items():
        start, count = sample.index(number), sample.count(number)
        left, right = LEFT + start * CELL, LEFT + (start + count) * CELL
        found.append(f'<path d="M{left + 2} 34V28H{right - 2}V34" fill="none" stroke="#444"/>')
        found.append(f'<text x="{(left + right) / 2}" y="22" text-anchor="middle">{task.replace(">", "&gt;")}</text>')
    for i, kind in enumerate(kinds):
        found.append(_square(LEFT + i * CELL, 40, COLOURS[kind]))
        for j, sees in enumerate(allowed[i]):
            found.append(_square(LEFT + j * CELL, TOP + i * CELL, COLOURS[kinds[j]] if sees else "#f2f2f2"))
    notes = ["one row for each query;", "coloured: the keys it attends to"]
    for i, (kind, colour) in enumerate(COLOURS.items()):
        found.append(_square(LEFT + side + 20, 40 + 26 * i, colour))
        name = "learned token of a head" if kind == "head" else f"token of kind {kind}"
        found.append(f'<text x="{LEFT + side + 48}" y="{55 + 26 * i}">{name}</text>')
    found += [f'<text x="{LEFT + side + 20}" y="{180 + 18 * i}">{text}</text>' for i, text in enumerate(notes)]
    found.append(f'<text x="{LEFT}" y="{TOP - 10}">who attends to whom</text></svg>')
    return "\n".join(found) + "\n"


def _square(x: float, y: float, colour: str) -> str:
    return f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="2" fill="{colour}"/>'


if __name__ == "__main__":
    Path(__file__).with_name("stream.svg").write_text(drawing(stream()), encoding="utf-8")
