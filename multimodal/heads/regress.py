"""A head that answers with numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from multimodal.heads.base import Prediction, Readout
from multimodal.heads.pool import Pool
from multimodal.heads.pooled import Pooled
from multimodal.shapes import ConfigError, StreamError
from multimodal.tokenizer import Tokenizer, Tokens


@dataclass(frozen=True)
class Regress(Pooled):
    """The numbers of one token, such as a `Number`, by least squares.

    The answer is computed from a learned token that attends to the whole context, or from a pool of the context's states. A number
    has no probability: the confidence of an answer is 1.

    pool: how the states of the context become one vector, such as `First()` or `Mean()`; None: a learned token reads them.

    Examples:
        >>> task = mm.Task("image -> number", mm.Regress())
    """

    pool: Pool | None = None

    def __post_init__(self) -> None:
        self.check_pool()

    def vocab(self, tokenizer: Tokenizer) -> int:
        name = type(tokenizer).__name__
        if tokenizer.feature_size is None or tokenizer.classes:
            what = "its values are classes; use Classify" if tokenizer.classes else "its values are ids; use NextToken"
            raise ConfigError(f"Regress writes numbers, which {name} has not: {what}")
        if not tokenizer.decodes:
            raise ConfigError(f"Regress: {name} has no decode, so what is answered could not be read")
        return tokenizer.feature_size

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        if len(tokens) != 1:
            raise StreamError(f"Regress: the answer has {len(tokens)} tokens, and it writes the numbers of one")
        return tokens.content

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        return readout.linear(self._pooled(readout, state_ND, lengths))

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        return (logits.float() - target).square().mean(-1).sum()

    def row_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits.float() - target).square().mean(-1)

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        places_NA = tokenizer.places(1)
        return [Prediction(tokenizer.decode(Tokens(row[None].cpu(), places_NA)), 1.0) for row in logits.float()]
