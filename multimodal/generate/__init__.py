"""Writing answers: rules of choice, beams, and the engine that decodes many requests at once."""

from multimodal.generate.engine import Engine, Piece, Prefix, read_prefix, request
from multimodal.generate.samplers import (
    AtLeast,
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

__all__ = [
    "AtLeast",
    "Engine",
    "Greedy",
    "MinP",
    "NoRepeat",
    "OneOf",
    "Only",
    "Piece",
    "Prefix",
    "Repetition",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
    "read_prefix",
    "request",
]
