"""The Turing machine layer against a plain loop over one sample, written from the equations of Graves et al. 2014."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.attention import Layout, Span
from multimodal.core import Core
from multimodal.heads.each_row import EachRow
from multimodal.layers import Context, Replace, SelfAttention
from multimodal.masks import MaskInfo
from multimodal.shapes import ConfigError
from multimodal.task import Task
from multimodal.zoo import TuringMachine
from multimodal_tokenizers import TextBytes

SMALL = TuringMachine(slots=7, slot_width=4, hidden=6, shifts=3, out=5, merge=Replace())


def core_of(layer: TuringMachine) -> Core:
    return Core(width=4, depth=1, heads=1, rotary_split=(0, 0, 0), block=(layer,))


def body_of(layer: TuringMachine):
    """The layer's module alone in float64, its weights moved away from their first values."""
    torch.manual_seed(3)
    body = layer.build(core_of(layer), 4).double()
    with torch.no_grad():
        for weight in body.parameters():
            weight += 0.5 * torch.randn_like(weight)
    return body


def layout_of(lengths: list[int], first: list[int] | None = None) -> Layout:
    """Samples of these lengths that are read in order; first: tokens of each that were read before."""
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    order = torch.cat(
        [torch.arange(start, start + n) for start, n in zip(first or [0] * len(lengths), lengths, strict=True)]
    )
    return Layout(
        tuple(Span(0, n, n) for n in lengths), MaskInfo(sample, order, torch.zeros_like(order), torch.zeros_like(order))
    )


def context_of(lengths: list[int]) -> Context:
    return Context(layout_of(lengths), None, lambda width: None)  # type: ignore[arg-type]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def by_the_book(body, rows, slots: int) -> np.ndarray:
    """The updates of one sample, head by head and slot by slot."""
    w = {name: p.detach().numpy() for name, p in body.named_parameters()}
    width, shifts = len(w["slot_K"]), 3
    memory = np.tile(w["slot_K"], (slots, 1))
    weight = {head: np.eye(slots)[0] for head in ("read", "write")}
    read, out = w["slot_K"], []
    for x in rows:
        h = np.tanh(w["seen.weight"] @ x + w["seen.bias"] + w["recalled.weight"] @ read)
        raw = w["heads.weight"] @ h + w["heads.bias"]
        size = width + 3 + shifts
        for i, head in enumerate(("read", "write")):
            part = raw[i * size : (i + 1) * size]
            key, beta, gate = np.tanh(part[:width]), softplus(part[width]), sigmoid(part[width + 1])
            shift = np.exp(part[width + 2 : width + 2 + shifts]) / np.exp(part[width + 2 : width + 2 + shifts]).sum()
            gamma = 1 + softplus(part[-1])
            similar = [key @ row / (np.linalg.norm(key) * np.linalg.norm(row)) for row in memory]  # equation 6
            content = np.array([math.exp(beta * s) for s in similar])
            content /= content.sum()  # equation 5
            gated = gate * content + (1 - gate) * weight[head]  # equation 7
            moved = np.zeros(slots)
            for place in range(slots):  # equation 8
                for other in range(slots):
                    by = (place - other + slots // 2) % slots - slots // 2
                    if abs(by) <= 1:
                        moved[place] += gated[other] * shift[by + 1]
            weight[head] = moved**gamma / (moved**gamma).sum()  # equation 9
        erase, add = sigmoid(raw[2 * size : 2 * size + width]), np.tanh(raw[2 * size + width :])
        memory = memory.copy()
        for place in range(slots):  # equations 3 and 4
            memory[place] = memory[place] * (1 - weight["write"][place] * erase) + weight["write"][place] * add
        read = weight["read"] @ memory  # equation 2
        out.append(w["update.weight"] @ np.concatenate([h, read]) + w["update.bias"])
    return np.array(out)


@pytest.mark.parametrize("slots", [7, 11])
def test_it_does_what_the_equations_say_in_packs_of_unequal_samples(slots: int):
    layer = TuringMachine(slots=slots, slot_width=4, hidden=6, out=5)
    body, lengths = body_of(layer), [3, 6, 1, 6]
    rows_TD = torch.randn(sum(lengths), 4, dtype=torch.float64)
    got = body(rows_TD, context_of(lengths)).detach()
    assert got.dtype == torch.float64
    for mine, rows in zip(got.split(lengths), rows_TD.split(lengths), strict=True):
        np.testing.assert_allclose(mine.numpy(), by_the_book(body, rows.numpy(), slots), rtol=0, atol=1e-9)


def test_gradients_reach_every_weight_and_are_those_of_differences():
    body, lengths = body_of(TuringMachine(slots=4, slot_width=2, hidden=3, out=2)), [2, 3]
    rows_TD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in body.named_parameters()]

    def run(rows, *weights):
        return torch.func.functional_call(body, dict(zip(names, weights, strict=True)), (rows, context_of(lengths)))

    assert torch.autograd.gradcheck(run, (rows_TD, *body.parameters()), atol=1e-6)


def model_of(slots: int) -> mm.Model:
    layer = TuringMachine(slots=slots, slot_width=6, hidden=16, merge=Replace())
    core = Core(width=16, depth=2, heads=2, block=(SelfAttention(), layer, TuringMachine(slots=5, slot_width=3)))
    return mm.Model({"text": TextBytes(), "copy": TextBytes()}, core, ["text -> copy", Task("text -> text", EachRow())])


def stirred(model: mm.Model) -> mm.Model:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    return model.eval()


def test_a_sample_in_a_pack_is_the_sample_alone():
    model = stirred(model_of(8))
    samples = [{"text": "abc", "copy": "ab"}, {"text": "a", "copy": "b"}, {"text": "bcbcbcb", "copy": "cccc"}]
    stream = model.pack("text -> copy", samples)
    reading = stream.readings["text -> copy"]
    together = model.logits(stream)["text -> copy"].split(list(reading.lengths))
    for index, logits in zip(reading.samples, together, strict=True):
        alone = model.logits(model.pack("text -> copy", [samples[index]]))["text -> copy"]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)


def test_decoding_with_a_cached_state_equals_a_full_pass():
    model = stirred(model_of(8))
    samples = [{"text": "abcabc"}, {"text": "b"}, {"text": "aab"}]
    written = model.generate("text -> copy", samples, max_tokens=6)
    assert all(len(answer.tokens) >= 2 for answer in written)
    for sample, answer in zip(samples, written, strict=True):
        stream = model.pack("text -> copy", [{**sample, "copy": answer.tokens}])
        again = model.logits(stream)["text -> copy"].log_softmax(-1)
        ids = answer.tokens.content
        assert again[: len(ids)].argmax(-1).tolist() == ids.tolist()


def test_pieces_through_a_cache_give_the_states_of_one_pass():
    core = Core(width=16, depth=2, heads=2, block=(TuringMachine(slots=8, slot_width=6, hidden=16), SelfAttention()))
    torch.manual_seed(0)
    module = core.build().eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.1 * torch.randn_like(weight)
    lengths = [7, 5, 9]
    rows = [torch.randn(n, 16) for n in lengths]

    def states(pieces: list[tuple[int, int]], cache=None) -> list[torch.Tensor]:
        layout = layout_of([stop - start for start, stop in pieces], [start for start, _ in pieces])
        position_TA = torch.zeros(len(layout.info.order), 3)
        position_TA[:, 0] = layout.info.order
        stream_TD = torch.cat([x[start:stop] for x, (start, stop) in zip(rows, pieces, strict=True)])
        return list(module(stream_TD, position_TA, layout, cache=cache).split([stop - start for start, stop in pieces]))

    with torch.no_grad():
        at_once = states([(0, 7), (0, 5), (0, 9)])
        cache = core.cache(rows=3, capacity=9)
        parts = [
            states(pieces, cache)
            for pieces in ([(0, 4), (0, 2), (0, 3)], [(4, 5), (2, 3), (3, 8)], [(5, 7), (3, 5), (8, 9)])
        ]
    for i, whole in enumerate(at_once):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole, rtol=0, atol=1e-5)
    assert all(state[:, 0].tolist() == [1, 1, 1] for state in cache.state)
    cache.clear(1)
    assert all(state[:, 0].tolist() == [1, 0, 1] for state in cache.state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shifts": 2}, "TuringMachine: shifts=2 has no middle; use 1, 3, 5, .."),
        ({"slots": 2}, "TuringMachine: slots=2 are fewer than shifts=3; use more slots"),
        ({"hidden": 0}, "TuringMachine: hidden=0 must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError) as error:
        TuringMachine(**settings)
    assert str(error.value) == message


def test_a_model_can_be_given_more_slots_than_it_was_trained_with():
    few, many = stirred(model_of(8)), model_of(20).eval()
    many.load_state_dict(few.state_dict())
    assert len(many.predict("text -> text", text="abcab").value) == 5
    assert core_of(SMALL).parameters == core_of(dataclasses.replace(SMALL, slots=100)).parameters
