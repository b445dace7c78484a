"""What heads share that answer once for a sample, from a learned token or from a pool of what was read."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from multimodal.declare import check_part
from multimodal.heads.base import EncodedSample, Head, LaidOut, Readout
from multimodal.heads.pool import Pool
from multimodal.tokenizer import Tokenizer


class Pooled(Head):
    """A head with a field `pool`: how the states of the context become one vector; None: a learned token reads them."""

    pool: Pool | None

    def check_pool(self) -> None:
        """Raise a ConfigError for a pool that is none."""
        if self.pool is not None:
            check_part(f"{type(self).__name__}: pool", self.pool, Pool, "First()")

    @property
    def queries(self) -> int:
        """Number of learned tokens."""
        return 1 if self.pool is None else 0

    def lay_out(self, sample: EncodedSample) -> list[LaidOut]:
        (part,) = super().lay_out(sample)
        if self.pool is None:
            return [part]
        first, last = self.pool.rows(part.read)
        return [dataclasses.replace(part, first=first, last=last)]

    def readout(self, width: int, tokenizer: Tokenizer) -> Readout:
        if self.pool is None:
            return super().readout(width, tokenizer)
        readout = Readout(self.pool.width(width), self.vocab(tokenizer), 0)
        readout.pool = self.pool.weights(width)
        return readout

    def _pooled(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        """The vector (B, D) of each sample that is answered."""
        return state_ND if self.pool is None else self.pool.pool(state_ND, lengths, readout.pool)
