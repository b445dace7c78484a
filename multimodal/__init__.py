"""Tokens of every kind in one packed stream, read by one transformer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal.core import Core
    from multimodal.data import Blanked
    from multimodal.declare import override
    from multimodal.encoder_decoder import EncoderDecoder
    from multimodal.flow import FlowMatching
    from multimodal.generate import (
        AtLeast,
        Engine,
        Greedy,
        MinP,
        NoRepeat,
        OneOf,
        Only,
        Piece,
        Repetition,
        Sampler,
        Temperature,
        TopK,
        TopP,
    )
    from multimodal.heads import CTC, Classify, Head, NextToken, Prediction
    from multimodal.masks import Causal, Chunked, Prefix, Rule, SameSample, SameSegment, Window
    from multimodal.model import Model
    from multimodal.shapes import CheckpointError, ConfigError, MediaError, ShapeError, StreamError, TaskError
    from multimodal.stream import Packer, Stream, Task
    from multimodal.tokenizer import Tokenizer, Tokens, at_times
    from multimodal.train import Recipe, Run, TrainingJob, evaluate, fit
    from multimodal.transcription import Listener, Transcript, transcribe

_NAMES = {
    "core": ("Core",),
    "data": ("Blanked",),
    "declare": ("override",),
    "encoder_decoder": ("EncoderDecoder",),
    "flow": ("FlowMatching",),
    "generate": (
        *("AtLeast", "Engine", "Greedy", "MinP", "NoRepeat", "OneOf", "Only", "Piece", "Repetition", "Sampler"),
        *("Temperature", "TopK", "TopP"),
    ),
    "heads": ("CTC", "Classify", "Head", "NextToken", "Prediction"),
    "masks": ("Causal", "Chunked", "Prefix", "Rule", "SameSample", "SameSegment", "Window"),
    "model": ("Model",),
    "shapes": ("CheckpointError", "ConfigError", "MediaError", "ShapeError", "StreamError", "TaskError"),
    "stream": ("Packer", "Stream", "Task"),
    "tokenizer": ("Tokenizer", "Tokens", "at_times"),
    "train": ("Recipe", "Run", "TrainingJob", "evaluate", "fit"),
    "transcription": ("Listener", "Transcript", "transcribe"),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "CTC",
    "AtLeast",
    "Blanked",
    "Causal",
    "CheckpointError",
    "Chunked",
    "Classify",
    "ConfigError",
    "Core",
    "EncoderDecoder",
    "Engine",
    "FlowMatching",
    "Greedy",
    "Head",
    "Listener",
    "MediaError",
    "MinP",
    "Model",
    "NextToken",
    "NoRepeat",
    "OneOf",
    "Only",
    "Packer",
    "Piece",
    "Prediction",
    "Prefix",
    "Recipe",
    "Repetition",
    "Rule",
    "Run",
    "SameSample",
    "SameSegment",
    "Sampler",
    "ShapeError",
    "Stream",
    "StreamError",
    "Task",
    "TaskError",
    "Temperature",
    "Tokenizer",
    "Tokens",
    "TopK",
    "TopP",
    "TrainingJob",
    "Transcript",
    "Window",
    "at_times",
    "evaluate",
    "fit",
    "override",
    "transcribe",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `multimodal --help` does not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'multimodal' has no attribute {name!r}")
    return getattr(importlib.import_module(f"multimodal.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
