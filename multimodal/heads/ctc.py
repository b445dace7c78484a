"""CTC: a head that transcribes, with a symbol or a blank for every row of the context."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal.heads.base import Head, Prediction, Readout, vocabulary
from multimodal.shapes import StreamError
from multimodal.tokenizer import Tokenizer, Tokens, written_tokens


def collapse(path_N: Tensor, blank: int, before: int | None = None) -> Tensor:
    """The symbols of a path of classes (N,): repeats are merged, then blanks removed (Graves et al. 2006, section 3.1).

    before: the class of the row before the path, if the path comes in pieces.
    """
    changed_N = torch.ones_like(path_N, dtype=torch.bool)
    changed_N[1:] = path_N[1:] != path_N[:-1]
    if before is not None:
        changed_N[:1] = path_N[:1] != before
    return path_N[changed_N & (path_N != blank)]


@dataclass(frozen=True)
class CTC(Head):
    """Connectionist temporal classification (Graves et al. 2006): a symbol or a blank (class V) for every row of the context.

    Examples:
        >>> task = mm.Task("audio -> text", mm.CTC())
        >>> model = mm.Model({"audio": AudioFrames(rate_hz=8000), "text": TextBytes()}, mm.Core.tiny(), [task])
        >>> run = mm.fit(model, {"audio -> text": [{"audio": (wave, 8000), "text": "la la"}]}, steps=2, batch=1, quiet=True)
    """

    def vocab(self, tokenizer: Tokenizer) -> int:
        return vocabulary(self, tokenizer) + 1

    def target(self, tokens: Tokens, rows: int, tokenizer: Tokenizer) -> Tensor:
        ids = tokens.content
        needed = len(ids) + int((ids[1:] == ids[:-1]).sum())  # equal neighbours need a blank between them
        if needed > rows:
            raise StreamError(
                f"CTC: {len(ids)} symbols need at least {needed} rows (one each, one more between equal neighbours), but the "
                f"context has {rows}; use shorter hops or stack fewer frames, or a tokenizer with longer symbols"
            )
        return ids

    def logits(self, readout: Readout, state_ND: Tensor, lengths: Sequence[int]) -> Tensor:
        return readout.linear(state_ND)

    def loss(self, logits: Tensor, lengths: Sequence[int], target: Tensor, target_lengths: Sequence[int]) -> Tensor:
        # PyTorch's CTC wants (time, batch, class), so here, and only here, samples are padded
        rows = nn.utils.rnn.pad_sequence(list(logits.float().log_softmax(-1).split(list(lengths))))
        return F.ctc_loss(
            rows,
            target,
            torch.tensor(lengths),
            torch.tensor(target_lengths),
            blank=logits.shape[-1] - 1,
            reduction="sum",
        )

    def answer(self, logits: Tensor, lengths: Sequence[int], tokenizer: Tokenizer) -> list[Prediction]:
        blank = logits.shape[-1] - 1
        answers = []
        for rows in logits.float().log_softmax(-1).split(list(lengths)):
            best, path = rows.max(-1)
            ids = collapse(path, blank).cpu()
            value = tokenizer.decode(written_tokens(tokenizer, ids))
            answers.append(Prediction(value, float(best.sum().exp())))
        return answers
