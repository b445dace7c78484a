"""Heads: each says what it reads of the stream, how it is learned, and what it answers; one file a head."""

from multimodal.heads.base import Head, Prediction, Reading, Readout
from multimodal.heads.classify import Classify, one_class
from multimodal.heads.contrast import Contrast
from multimodal.heads.ctc import CTC
from multimodal.heads.each_row import EachRow
from multimodal.heads.flow import FlowMatching
from multimodal.heads.masked import Masked
from multimodal.heads.next_token import NextToken
from multimodal.heads.pointer import Memory, Pointer
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer

__all__ = [
    "CTC",
    "Classify",
    "Contrast",
    "EachRow",
    "FlowMatching",
    "Head",
    "Masked",
    "Memory",
    "NextToken",
    "Pointer",
    "Prediction",
    "Reading",
    "Readout",
    "default_head",
    "one_class",
]


def default_head(tokenizer: Tokenizer) -> Head:
    """What a kind is written with unless its task says otherwise: classes by `Classify`, other discrete kinds by `NextToken`."""
    if tokenizer.classes:
        return Classify()
    if tokenizer.vocab_size is not None:
        return NextToken()
    raise ConfigError(
        f"{type(tokenizer).__name__} is continuous and declares no classes, so no head writes it by default; give its task one"
    )
