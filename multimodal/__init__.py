"""Tokens of every kind in one packed stream, read by one transformer."""

from multimodal.core import Core
from multimodal.declare import override
from multimodal.heads import CTC, Classify, Head, NextToken, Prediction
from multimodal.masks import Causal, Prefix, Rule, SameSample, SameSegment, Window
from multimodal.model import Model
from multimodal.shapes import CheckpointError, ConfigError, MediaError, ShapeError, StreamError, TaskError
from multimodal.stream import Packer, Stream, Task
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal.train import Recipe, Run, evaluate, fit

__all__ = [
    "CTC",
    "Causal",
    "CheckpointError",
    "Classify",
    "ConfigError",
    "Core",
    "Head",
    "MediaError",
    "Model",
    "NextToken",
    "Packer",
    "Prediction",
    "Prefix",
    "Recipe",
    "Rule",
    "Run",
    "SameSample",
    "SameSegment",
    "ShapeError",
    "Stream",
    "StreamError",
    "Task",
    "TaskError",
    "Tokenizer",
    "Tokens",
    "Window",
    "at_times",
    "evaluate",
    "fit",
    "override",
]
