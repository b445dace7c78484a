"""Tokens of every kind in one packed stream, read by one transformer."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multimodal.attention import (
        Additive,
        ALiBi,
        Bernoulli,
        Cosine,
        DotProduct,
        Factored,
        Gaussian,
        General,
        Gumbel,
        Hard,
        LocationBased,
        MixingWeights,
        PredictedWindow,
        Read,
        RelativeBias,
        ScaledDotProduct,
        Score,
        Soft,
        Trace,
    )
    from multimodal.contrast import Contrast
    from multimodal.core import Core
    from multimodal.data import Blanked, Fields, Mixed, Shards, write_shards
    from multimodal.declare import alias, override
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
    from multimodal.layers import (
        MLP,
        Add,
        Concat,
        CrossAttention,
        Gated,
        Layer,
        Merge,
        PersistentMemory,
        Recurrent,
        Replace,
        SelfAttention,
        TemporalConv,
        TuringMachine,
    )
    from multimodal.masked import Masked
    from multimodal.masks import Causal, Chunked, Prefix, Prior, Rule, SameSample, SameSegment, Window
    from multimodal.model import Model
    from multimodal.packer import Packer
    from multimodal.pointer import Pointer
    from multimodal.pruning import pruned
    from multimodal.rows import EachRow
    from multimodal.shapes import CheckpointError, ConfigError, MediaError, ShapeError, StreamError, TaskError
    from multimodal.stream import Stream, Task
    from multimodal.tokenizer import Tokenizer, Tokens, at_times
    from multimodal.train import Recipe, Run, TrainingJob, evaluate, fit
    from multimodal.transcription import Listener, Transcript, transcribe

_NAMES = {
    "attention": (
        *(
            "ALiBi",
            "Additive",
            "Bernoulli",
            "Cosine",
            "DotProduct",
            "Factored",
            "Gaussian",
            "General",
            "Gumbel",
            "Hard",
        ),
        *("LocationBased", "MixingWeights", "PredictedWindow", "Read", "RelativeBias", "ScaledDotProduct", "Score"),
        *("Soft", "Trace"),
    ),
    "contrast": ("Contrast",),
    "core": ("Core",),
    "data": ("Blanked", "Fields", "Mixed", "Shards", "write_shards"),
    "declare": ("alias", "override"),
    "encoder_decoder": ("EncoderDecoder",),
    "flow": ("FlowMatching",),
    "generate": (
        *("AtLeast", "Engine", "Greedy", "MinP", "NoRepeat", "OneOf", "Only", "Piece", "Repetition", "Sampler"),
        *("Temperature", "TopK", "TopP"),
    ),
    "heads": ("CTC", "Classify", "Head", "NextToken", "Prediction"),
    "layers": (
        *("MLP", "Add", "Concat", "CrossAttention", "Gated", "Layer", "Merge", "PersistentMemory", "Recurrent"),
        *("Replace", "SelfAttention", "TemporalConv", "TuringMachine"),
    ),
    "masked": ("Masked",),
    "masks": ("Causal", "Chunked", "Prefix", "Prior", "Rule", "SameSample", "SameSegment", "Window"),
    "model": ("Model",),
    "pointer": ("Pointer",),
    "pruning": ("pruned",),
    "rows": ("EachRow",),
    "shapes": ("CheckpointError", "ConfigError", "MediaError", "ShapeError", "StreamError", "TaskError"),
    "packer": ("Packer",),
    "stream": ("Stream", "Task"),
    "tokenizer": ("Tokenizer", "Tokens", "at_times"),
    "train": ("Recipe", "Run", "TrainingJob", "evaluate", "fit"),
    "transcription": ("Listener", "Transcript", "transcribe"),
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "CTC",
    "MLP",
    "ALiBi",
    "Add",
    "Additive",
    "AtLeast",
    "Bernoulli",
    "Blanked",
    "Causal",
    "CheckpointError",
    "Chunked",
    "Classify",
    "Concat",
    "ConfigError",
    "Contrast",
    "Core",
    "Cosine",
    "CrossAttention",
    "DotProduct",
    "EachRow",
    "EncoderDecoder",
    "Engine",
    "Factored",
    "Fields",
    "FlowMatching",
    "Gated",
    "Gaussian",
    "General",
    "Greedy",
    "Gumbel",
    "Hard",
    "Head",
    "Layer",
    "Listener",
    "LocationBased",
    "Masked",
    "MediaError",
    "Merge",
    "MinP",
    "Mixed",
    "MixingWeights",
    "Model",
    "NextToken",
    "NoRepeat",
    "OneOf",
    "Only",
    "Packer",
    "PersistentMemory",
    "Piece",
    "Pointer",
    "PredictedWindow",
    "Prediction",
    "Prefix",
    "Prior",
    "Read",
    "Recipe",
    "Recurrent",
    "RelativeBias",
    "Repetition",
    "Replace",
    "Rule",
    "Run",
    "SameSample",
    "SameSegment",
    "Sampler",
    "ScaledDotProduct",
    "Score",
    "SelfAttention",
    "ShapeError",
    "Shards",
    "Soft",
    "Stream",
    "StreamError",
    "Task",
    "TaskError",
    "Temperature",
    "TemporalConv",
    "Tokenizer",
    "Tokens",
    "TopK",
    "TopP",
    "Trace",
    "TrainingJob",
    "Transcript",
    "TuringMachine",
    "Window",
    "alias",
    "at_times",
    "evaluate",
    "fit",
    "override",
    "pruned",
    "transcribe",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `multimodal --help` does not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'multimodal' has no attribute {name!r}")
    return getattr(importlib.import_module(f"multimodal.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
