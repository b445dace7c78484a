"""Photographs and recordings of the folder MULTIMODAL_DATA (default: shared/data beside the project), or a skipped test."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(os.environ.get("MULTIMODAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def _members(archive: str, ending: str, count: int) -> list[bytes]:
    path = ROOT / archive
    if not path.is_file():
        pytest.skip(f"no {archive} in the folder of MULTIMODAL_DATA")
    with zipfile.ZipFile(path) as opened:
        names = [name for name in opened.namelist() if name.endswith(ending)]
        return [opened.read(name) for name in names[:: max(len(names) // count, 1)][:count]]


def photographs(archive: str, count: int) -> list[Image.Image]:
    """Pictures out of the whole archive, decoded."""
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in _members(archive, ".jpg", count)]


def recordings(archive: str, count: int, rate_hz: int = 16000) -> list[np.ndarray]:
    """Waves (S,) float32 out of the whole archive, at `rate_hz`."""
    from multimodal.media import read_sound

    return [read_sound(data, rate_hz=rate_hz, who="tests").numpy() for data in _members(archive, ".ogg", count)]
