"""What `look` shows: the X-ray's picture and page as files, and its table of heads."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.cli.arguments import value_from
from multimodal.cli.showing import harmless, print_json, saved

MOST_ROWS = 24  # of the table of heads

if TYPE_CHECKING:
    from multimodal.model import Model


def look_at(
    model: "Model", task: str, sample: Mapping[str, Any], answer: str | None, as_json: bool, folder: Path
) -> None:
    """Write xray.png and xray.html into a folder, and print the answer, the table of heads and where the files are."""
    from multimodal.look import xray
    from multimodal.look.answers import answer_line
    from multimodal.look.drawing import draw
    from multimodal.look.page import page

    kind = model.packer.patterns[task].writes.kind
    writes = model.packer.head(task).writes
    given = value_from(model.packer.tokenizers[kind], answer, "--answer") if answer is not None and writes else answer
    ray = xray(model, task, sample, answer=given)
    picture = io.BytesIO()
    draw(ray, picture)
    files = [
        saved(".png", picture.getvalue(), "xray", folder),
        saved(".html", page(ray).encode("utf-8", "replace"), "xray", folder),
    ]
    if as_json:
        print_json({"task": task, "heads": ray.table(), "files": list(map(str, files))})
        return
    rows = ray.table()
    if len(rows) > MOST_ROWS:
        heads = ray.chosen_heads(MOST_ROWS)
        rows = [row for row in rows if row["head"] in heads[row["layer"]]][-MOST_ROWS:]
    heads_table = ray.lines(rows)
    if more := len(ray.table()) - len(rows):
        heads_table += f"\n{more} more heads are on the page"
    print(f"{task}  {harmless(answer_line(ray))}\n\n{heads_table}\n\npicture  {files[0]}\npage     {files[1]}")
