"""Heads: each says which states it reads, how it is trained, and what it answers; one file for each head."""

from multimodal.composite import Composite
from multimodal.heads.base import Head, Prediction, Reading, Readout
from multimodal.heads.classify import Classify, one_class
from multimodal.heads.contrast import Contrast
from multimodal.heads.ctc import CTC
from multimodal.heads.each_row import EachRow
from multimodal.heads.flow import FlowMatching
from multimodal.heads.masked import Masked
from multimodal.heads.next_token import NextToken
from multimodal.heads.next_turn import NextTurn
from multimodal.heads.pointer import Memory, Pointer
from multimodal.heads.pool import Attended, First, FirstAndMean, Last, Mean, Parts, Pool, Transformed
from multimodal.heads.regress import Regress
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer

__all__ = [
    "CTC",
    "Attended",
    "Classify",
    "Contrast",
    "EachRow",
    "First",
    "FirstAndMean",
    "FlowMatching",
    "Head",
    "Last",
    "Masked",
    "Mean",
    "Memory",
    "NextToken",
    "NextTurn",
    "Parts",
    "Pointer",
    "Pool",
    "Prediction",
    "Reading",
    "Readout",
    "Regress",
    "Transformed",
    "default_head",
    "one_class",
]


def default_head(tokenizer: Tokenizer) -> Head:
    """The head of a task that names none: `Classify` if the written kind is classes, `NextToken` if it has another vocabulary.

    Raises:
        ConfigError: the written kind is continuous, for which there is no default.
    """
    if tokenizer.classes:
        return Classify()
    if isinstance(tokenizer, Composite):
        return default_head(tokenizer.written)
    if tokenizer.vocab_size is not None:
        return NextToken()
    raise ConfigError(
        f"{type(tokenizer).__name__} is continuous and declares no classes, so no head writes it by default; give its task one"
    )
