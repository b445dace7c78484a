"""Shared fixtures: one thread, a fixed seed, small layouts, models and samples."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.attention import Layout, Span
from multimodal.masks import Places
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped, with the reason shown, where there is no such device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def lay() -> Callable[..., Layout]:
    """lay([[(3, True), (2, False)], [(4, True)]]): two samples, of two fields and of one; (tokens, read freely)."""

    def make(samples: Sequence[Sequence[tuple[int, bool]]], device: str = "cpu") -> Layout:
        spans, rows = [], []
        for sample, fields in enumerate(samples):
            flags = [free for count, free in fields for _ in range(count)]
            segments = [i for i, (count, _) in enumerate(fields) for _ in range(count)]
            free = flags.index(False) if False in flags else len(flags)
            spans.append(Span(-1 if any(flags[free:]) else free, len(flags)))
            rows += [
                (sample, order, int(flag), segment)
                for order, (flag, segment) in enumerate(zip(flags, segments, strict=True))
            ]
        columns = torch.tensor(rows, dtype=torch.int32, device=device).T
        return Layout(tuple(spans), Places(*columns))

    return make


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, mm.Tokenizer]:
    """One of every kind; `text` is read freely, `story` causally."""
    return {
        "image": ImagePatches(patch=4, channels=1),
        "text": TextBytes(),
        "story": TextBytes(causal=True),
        "sound": AudioFrames(rate_hz=8000, mels=8, stack=2),
        "label": Labels(("circle", "square", "star")),
    }


@pytest.fixture(scope="session")
def core() -> mm.Core:
    return mm.Core(width=32, depth=2, heads=4, kv_heads=2)


@pytest.fixture(scope="session")
def values() -> Callable[[int], dict[str, object]]:
    """A sample with every field, other in content and in length for every number."""

    def make(number: int) -> dict[str, object]:
        random = np.random.default_rng(number)
        rows, columns = random.integers(4, 13, size=2)
        words = "".join(random.choice(list("abcdefgh "), size=random.integers(1, 12)))
        return {
            "image": random.random((rows, columns)).astype(np.float32),
            "text": words,
            "story": words[::-1] + "!",
            "sound": (random.standard_normal(random.integers(200, 1500)).astype(np.float32) * 0.1, 8000),
            "label": ("circle", "square", "star")[number % 3],
        }

    return make


@pytest.fixture
def lively() -> Callable[[mm.Model], mm.Model]:
    """Fresh weights are so small that most outputs agree by chance; this makes them large enough to tell apart."""

    def enlarge(model: mm.Model) -> mm.Model:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(std=0.2, generator=generator)
        return model.eval()

    return enlarge
