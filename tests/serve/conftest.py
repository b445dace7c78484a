"""A model with a task for every endpoint, and the application that serves it."""

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBytes

EXTRA = "the extra serve is missing: uv sync --extra serve"
RATE = 8000
TASKS = (
    *("image -> text", "image question -> text", "question -> text", "image -> label", "label -> drawing"),
    *("question -> speech", "audio -> words:text"),
)


def wave(seed: int = 0, seconds: float = 0.4) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.2 * np.sin(np.arange(int(RATE * seconds)) * random.uniform(0.2, 1.5))).astype(np.float32)


def wav(seed: int = 0, seconds: float = 0.4) -> bytes:
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, wave(seed, seconds), RATE, format="WAV", subtype="FLOAT")
    return data.getvalue()


def png(seed: int = 0, size: int = 8) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (size, size)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return data.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def make_model(seed: int = 1) -> mm.Model:
    """Its weights are so large that answers differ from one another."""
    pictures = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    frames = AudioFrames(rate_hz=RATE, mels=8, normalise="fixed", stack=2)
    model = mm.Model(
        {
            "image": ImagePatches(patch=4, channels=1),
            "text": TextBytes(),
            "question": TextBytes(causal=True),
            "audio": frames,
            "label": Labels(("cat", "dog", "bird")),
            "drawing": Codes.train(ImagePatches(patch=4, channels=1), pictures, size=8, quiet=True),
            "speech": Codes.train(frames, [(wave(i), RATE) for i in range(4)], size=8, quiet=True),
        },
        mm.Core(width=32, depth=1, heads=2),
        [*TASKS, mm.Task("audio -> text", mm.CTC()), mm.Task("image <-> text", mm.Contrast(width=8, form="sigmoid"))],
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> mm.Model:
    """The model by itself: the service has another with the same weights, since a model belongs to one thread."""
    return make_model()


@contextmanager
def serving(load: Callable[[], mm.Model] = make_model, name: str = "tiny", **limits: Any) -> Iterator[Any]:
    """A client of an application that serves a model."""
    pytest.importorskip("python_multipart", reason=EXTRA)
    pytest.importorskip("starlette", reason=EXTRA)
    pytest.importorskip("httpx", reason=EXTRA)
    from starlette.testclient import TestClient

    from multimodal.serve.app import make_app
    from multimodal.serve.checkpoints import Checkpoint
    from multimodal.serve.settings import Settings

    settings = Settings(**{"rows": 4, "capacity": 128, "max_tokens": 12, "timeout_s": 600.0, **limits})
    app = make_app([Checkpoint(name, load, settings)], settings)
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with serving() as made:
        yield made
