"""The next token of answers that are features: drawn by their head from noise, not chosen among what there is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from multimodal.heads import Head, Readout
from multimodal.shapes import StreamError

if TYPE_CHECKING:
    from multimodal.generate.request import Answer


def draw_features(answers: Sequence["Answer"], states: Mapping["Answer", Tensor], head: Head, readout: Readout) -> None:
    """The next token's features of each answer, from its own noise; answers that are drawn alike in one call."""
    alike: dict[tuple[float, float | None], list[Answer]] = {}
    for answer in answers:
        alike.setdefault((answer.options.guidance, answer.options.temperature), []).append(answer)
    for (guidance, temperature), group in alike.items():
        state_BD = torch.stack([states[answer][0] for answer in group])
        noise = [torch.randn(1, a.tokenizer.written_features or 0, generator=a.random) for a in group]
        features_BF, stop_B = head.draw(
            readout,
            state_BD,
            torch.cat(noise).to(state_BD.device),
            guide_ND=None if guidance == 1.0 else torch.stack([states[answer][1] for answer in group]),
            guidance=guidance,
            temperature=1.0 if temperature is None else temperature,
        )
        for answer, wrong in zip(group, features_BF.isnan().any(-1).tolist(), strict=True):
            if wrong:
                answer.error = StreamError(f"{answer.name} of task {answer.task!r}: the features drawn are not numbers")
        for answer, features_NF, stop in zip(group, features_BF.float().cpu().split(1), stop_B.tolist(), strict=True):
            _take_features(answer, features_NF, stop)


def _take_features(answer: "Answer", features_NF: Tensor, stop: float) -> None:
    """Add what was drawn, unless the answer ends here."""
    if answer.fixed is None and answer.count:
        answer.log_p += float(F.logsigmoid(torch.tensor(abs(stop))))
        if stop > 0:
            answer.ended = "stop"
            return
    if answer.count == answer.limit:
        answer.ended = "max_tokens"
        return
    at = (0 if answer.begin is None else len(answer.begin)) + answer.count
    answer.features.append(answer.tokenizer.fed_back(features_NF, answer.placed(at + 1)[at:]))
    if answer.count == answer.fixed:
        answer.ended = "length"
