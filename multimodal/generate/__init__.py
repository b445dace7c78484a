"""Decoding: samplers, beam search, and the engine that decodes many requests at once."""

from multimodal.generate.engine import Engine, Piece
from multimodal.generate.prefix import CachedPrefix, read_prefix
from multimodal.generate.samplers import (
    AtLeast,
    Forbid,
    Greedy,
    MinP,
    NoRepeat,
    OneOf,
    Only,
    Repetition,
    Sampler,
    Temperature,
    TopK,
    TopP,
)
from multimodal.old_names import moved

__all__ = [
    "AtLeast",
    "CachedPrefix",
    "Engine",
    "Forbid",
    "Greedy",
    "MinP",
    "NoRepeat",
    "OneOf",
    "Only",
    "Piece",
    "Repetition",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
    "read_prefix",
]

__getattr__ = moved(__name__)  # goes with version 0.3
