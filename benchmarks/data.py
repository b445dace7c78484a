"""The data that the programs of this folder read, from the folder MULTIMODAL_DATA (default: shared/data beside the project)."""

import gzip
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("MULTIMODAL_DATA") or ROOT.parent / "shared" / "data").resolve()
Rows = list[dict[str, Any]]

# the examples lie in no package, and measurements use their data sets and programs
EXAMPLES = (ROOT / "examples" / "attention", ROOT / "examples")
sys.path += [str(folder) for folder in EXAMPLES if str(folder) not in sys.path]


def example(name: str) -> Any:
    """A module of the examples; by name, since type checkers do not find it."""
    return import_module(name)


def text_of(name: str) -> str:
    """The text of a gzip file, with its line ends as they are."""
    with gzip.open(DATA / name, "rt", encoding="utf-8", newline="") as file:
        return file.read()


def lines_of(name: str) -> list[str]:
    """The lines of a gzip file that ends with a line end."""
    return text_of(name).split("\n")[:-1]


def manifest(archive: zipfile.ZipFile) -> Rows:
    """One row for each file of the archive, by its "file"."""
    return [json.loads(line) for line in archive.read("manifest.jsonl").decode("utf-8").split("\n") if line]


def records(name: str, choose: Callable[[Rows], Rows] = list) -> Iterator[tuple[dict[str, Any], io.BytesIO]]:
    """The rows of a zip's manifest that are chosen, each with its file."""
    with zipfile.ZipFile(DATA / name) as archive:
        for row in choose(manifest(archive)):
            yield row, io.BytesIO(archive.read(row["file"]))


def recordings(name: str, choose: Callable[[Rows], Rows] = list) -> Iterator[tuple[dict[str, Any], Any, int]]:
    """Row, samples (float32, -1..1) and rate in Hz of each sound of a zip that is chosen."""
    import soundfile

    for row, file in records(name, choose):
        wave_S, rate_hz = soundfile.read(file, dtype="float32")
        yield row, wave_S, rate_hz


def spoken(quick: bool) -> tuple[Rows, Rows]:
    """FSDD's takes 5 to 49 and 0 to 4 as samples {"audio", "label", "speaker"}; quickly, one of 40."""
    parts: dict[bool, Rows] = {True: [], False: []}
    for row, wave_S, rate_hz in recordings("fsdd.zip", lambda rows: rows[:: 40 if quick else 1]):
        sample = {"audio": (wave_S, rate_hz), "label": str(row["digit"]), "speaker": row["speaker"]}
        parts[row["take"] < 5].append(sample)
    return parts[False], parts[True] or parts[False]


def mnist(quick: bool) -> tuple[Rows, Rows]:
    """8,000 and 2,000 samples {"image", "label"}; quickly, 60 and 20."""
    images, labels, test_images, test_labels = example("sets").mnist()
    train, test = (
        [{"image": x, "label": str(y)} for x, y in zip(xs[:most], ys[:most], strict=True)]
        for xs, ys, most in ((images, labels, 60 if quick else None), (test_images, test_labels, 20 if quick else None))
    )
    return train, test


def digits_8x8(seed: int) -> tuple[Rows, Rows]:
    """scikit-learn's 1,797 scanned digits as samples {"image", "label"}; a stratified fifth is held out."""
    import numpy as np

    pictures = example("image_sets").digits(seed)
    train, test = (
        [{"image": np.asarray(x), "label": y} for x, y in zip(part.images, part.labels, strict=True)]
        for part in (pictures.train, pictures.test)
    )
    return train, test
