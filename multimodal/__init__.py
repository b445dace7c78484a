"""Tokens of every kind in one packed stream, read by one transformer.

What most programs need is here. Everything else is in its room: `mm.attention.ALiBi`, `mm.masks.Window`, `mm.layers.Gated`.
"""

import importlib
from typing import Any

from multimodal import old_names

# __init__.pyi names the same for type checkers
_FROM = {
    "composite": "Composite",
    "core": "Core",
    "data": "Blanked Fields Mixed Shards write_shards",
    "declare": "alias override",
    "encoder_decoder": "EncoderDecoder",
    "generate": "Engine NoRepeat Temperature TopK TopP",
    "heads": "CTC Classify Contrast EachRow FlowMatching Head Masked NextToken NextTurn Pointer Prediction Regress",
    "model": "Model",
    "quantization": "quantize",
    "shapes": "CheckpointError ConfigError MediaError ShapeError StreamError TaskError",
    "start": "quick",
    "task": "Task",
    "tokenizer": "Tokenizer Tokens at_times",
    "tower": "Tower",
    "train": "Recipe Run TrainingJob calibrate evaluate fit",
    "transcription": "Listener Transcript transcribe",
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names.split()}
_ROOM_NAMES = """
attention augment check count data generate heads layers look lora masks measures media packer pretrained sklearn start
stream tower train transcription zoo
"""
_ROOMS = tuple(_ROOM_NAMES.split())
__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name or a room when it is first asked for, so that `multimodal --help` does not wait for torch."""
    if name in _ROOMS:
        return importlib.import_module(f"multimodal.{name}")
    if name == "__version__":
        return importlib.import_module("multimodal.versions").package_version()
    module = _MODULE_OF.get(name) or old_names.module_of(name)
    if module is None:
        raise AttributeError(f"module 'multimodal' has no attribute {name!r}")
    return getattr(importlib.import_module(f"multimodal.{module}"), name)


def __dir__() -> list[str]:
    dunder = {name for name in globals() if name.startswith("__") and name.endswith("__")}
    return sorted({*dunder, "__version__", *__all__, *_ROOMS})
