"""Writing token by token: one packed prefill, then one cached step a token for all samples at once."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multimodal.attention import Cache, Layout, Span
from multimodal.heads import Prediction
from multimodal.masks import Places
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokens

if TYPE_CHECKING:
    from multimodal.model import Model


def write(
    model: "Model",
    task: str,
    samples: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    first: int = 0,
) -> list[Prediction]:
    """Answers in the order of the samples; call in inference mode. Prompts may differ in length and kinds.

    Raises:
        ConfigError: max_tokens below 1 or a negative temperature.
    """
    if max_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"generate: max_tokens={max_tokens} must be at least 1 and temperature={temperature} at least 0"
        )
    tokenizer = model.packer.tokenizers[model.packer.patterns[task].writes.kind]
    kind, head, readout = model.packer.patterns[task].writes.kind, model.packer.head(task), model.readout(task)
    stream = model.pack(task, samples, answers=False, first=first)
    reading = stream.readings[task]
    totals = [span.total for span in stream.layout.spans]
    core = model.core.core
    cache = Cache(
        layers=core.depth,
        batch=len(samples),
        capacity=max(totals) + max_tokens,
        kv_heads=core.groups,
        head_width=core.head_width,
        device=model.device,
        dtype=readout.linear.weight.dtype,
    )
    random = torch.Generator().manual_seed(seed)
    last = reading.row_N[torch.tensor(reading.lengths).cumsum(0) - 1]  # each sample's newest row
    position_BA = stream.position_TA[last]
    segment_B = stream.layout.places.segment[last] + 1
    place_NA = (tokenizer.places(max_tokens) / torch.tensor(tokenizer.step)).to(model.device)
    after = position_BA * position_BA.new_tensor([1, 0, 0]) + position_BA.new_tensor([1, 0, 0])
    states = model(stream, cache=cache)[last]

    written: list[list[int]] = [[] for _ in samples]
    log_p = [0.0] * len(samples)
    stopped = [False] * len(samples)
    for count in range(max_tokens + 1):
        logits_BV = head.logits(readout, states, [1] * len(samples)).float().cpu()
        chosen_B, log_p_B = _choose(logits_BV, temperature, random)
        stop = logits_BV.shape[-1] - 1
        for i, (token, nats) in enumerate(zip(chosen_B.tolist(), log_p_B.tolist(), strict=True)):
            if not stopped[i] and (token == stop or count < max_tokens):
                log_p[i] += nats
                stopped[i] = token == stop
                if token != stop:
                    written[i].append(token)
        if all(stopped) or count == max_tokens:
            break
        ids_B = torch.where(chosen_B == stop, 0, chosen_B).to(model.device)  # a stopped sample idles on any token
        order_B = torch.tensor(cache.length, dtype=torch.int32, device=model.device)
        sample_B = torch.arange(len(samples), dtype=torch.int32, device=model.device)
        places = Places(sample=sample_B, order=order_B, free=torch.zeros_like(order_B), segment=segment_B)
        layout = Layout(tuple(Span(0, 1) for _ in samples), places)
        states = model.core(model.embed(kind, ids_B), after + place_NA[count], layout, cache=cache)

    answers: list[Prediction | None] = [None] * len(samples)
    for i, sample in enumerate(reading.samples):
        value = tokenizer.decode(Tokens(torch.tensor(written[i], dtype=torch.long), tokenizer.places(len(written[i]))))
        answers[sample] = Prediction(value, float(torch.tensor(log_p[i]).exp()), complete=stopped[i])
    return [a for a in answers if a is not None]


def _choose(logits_BV: Tensor, temperature: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token a row, and its log-probability under the model."""
    log_p_BV = logits_BV.log_softmax(-1)
    if temperature == 0:
        chosen_B = logits_BV.argmax(-1)
    else:
        chosen_B = torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=random)[:, 0]
    return chosen_B, log_p_BV.gather(1, chosen_B[:, None])[:, 0]
