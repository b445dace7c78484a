"""Cores made of every layer and merge: packing, caches, checkpoints; each layer against PyTorch's own or its formula."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import multimodal as mm
from multimodal.attention import Layout, Mechanism, Span, Trace, plan_attention
from multimodal.attention.plan import _RunsPlan
from multimodal.encoder_decoder import TwoCores
from multimodal.layers import Add, Concat, Context, Gated, Layer, LayerScale, PostNorm, Replace, SandwichNorm
from multimodal.layers.base import Sublayer
from multimodal.look import usage
from multimodal.masks import LAW, PREFIX_LM, MaskInfo, Rule
from multimodal.norm import Norm
from multimodal.positions import Rotary
from multimodal.shapes import ConfigError, StreamError
from multimodal.zoo import TuringMachine
from multimodal.zoo.pruning import pruned
from multimodal_tokenizers import Labels, TextBytes

L: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}


def core_of(*block: Layer, **settings: Any) -> mm.Core:
    return mm.Core(**{**L, "block": block or (mm.layers.SelfAttention(), mm.layers.MLP()), **settings})


SNAIL = (
    mm.layers.SelfAttention(heads=1, key_width=6, value_width=5, out=5, merge=Concat()),
    mm.zoo.TemporalConv(filters=4),
    mm.zoo.TemporalConv(filters=3, dilation=4),
)
LAYER_NORM: dict[str, Any] = {
    "norm": Norm(eps=1e-5, centred=True, bias=True),
    "qk_norm": False,
    "rotary_split": (0, 0, 0),
}
BOTH = (mm.layers.Recurrent(both_ways=True), mm.layers.SelfAttention(), mm.layers.MLP())
BAHDANAU = mm.EncoderDecoder(
    reader=core_of(mm.layers.Recurrent(both_ways=True), depth=1),
    writer=core_of(mm.layers.Recurrent(), mm.layers.CrossAttention(score=mm.attention.Additive(), heads=1), depth=1),
)
CORES: dict[str, mm.Core | mm.EncoderDecoder] = {
    "transformer": core_of(),
    "grouped": core_of(heads=4, kv_heads=2),
    "GRU": core_of(mm.layers.Recurrent(hidden=7, merge=Replace())),
    "GRU both ways": core_of(*BOTH),
    "LSTM": core_of(mm.layers.Recurrent(cell="lstm"), mm.layers.MLP()),
    "LSTM both ways": core_of(
        mm.layers.Recurrent(cell="lstm", hidden=5, both_ways=True, merge=Concat()), mm.layers.SelfAttention()
    ),
    "SNAIL": core_of(*SNAIL),
    "convolutions": core_of(*(mm.zoo.TemporalConv(filters=3, dilation=d) for d in (1, 2, 4)), rotary_split=(0, 0, 0)),
    "convolutions added": core_of(mm.zoo.TemporalConv(filters=16, dilation=3, merge=Add()), mm.layers.SelfAttention()),
    "gated": core_of(mm.layers.SelfAttention(merge=Gated()), mm.layers.MLP(merge=Gated())),
    "replaced": core_of(mm.layers.SelfAttention(out=10, merge=Replace()), mm.layers.MLP(out=12, merge=Replace())),
    "memory": core_of(
        mm.layers.SelfAttention(), mm.layers.PersistentMemory(slots=5, prior=mm.attention.MixingWeights(5))
    ),
    "memory by distance": core_of(
        mm.layers.PersistentMemory(slots=9, heads=1, prior=mm.attention.ALiBi(), merge=Concat())
    ),
    "additive": core_of(score=mm.attention.Additive()),
    "ALiBi and a table": core_of(prior=mm.attention.ALiBi() + mm.attention.RelativeBias(4), rotary_split=(0, 0, 0)),
    "one table of ranges": core_of(prior=mm.attention.BucketedBias(8, 6), score=mm.attention.DotProduct(0.5)),
    "local-p": core_of(prior=mm.attention.PredictedWindow(1.5)),
    "Luong's local-p": core_of(prior=mm.attention.PredictedWindow(1.5, renormalise=False)),
    "location": core_of(score=mm.attention.LocationBased(40), mask=PREFIX_LM & mm.masks.Window(30)),
    "hard": core_of(read=mm.attention.Hard()),
    "Gumbel": core_of(read=mm.attention.Gumbel(0.5)),
    "Gaussian": core_of(score=mm.attention.Gaussian(), heads=4, kv_heads=2),
    "Bernoulli": core_of(score=mm.attention.Bernoulli()),
    "general": core_of(score=mm.attention.General()),
    "cosine": core_of(score=mm.attention.Cosine(learned=True)),
    "window": core_of(mask=PREFIX_LM & mm.masks.Window(3), prior=mm.attention.ALiBi()),
    "rule as prior": core_of(
        mm.layers.SelfAttention(prior=mm.masks.Window(2) + mm.attention.RelativeBias(3)), mm.layers.SelfAttention()
    ),
    "Turing machine": core_of(TuringMachine(slots=6, slot_width=4, hidden=8), depth=1),
    "Bahdanau": BAHDANAU,
    "Luong": mm.EncoderDecoder(
        reader=core_of(mm.layers.Recurrent(cell="lstm")),
        writer=core_of(
            mm.layers.Recurrent(cell="lstm"),
            mm.layers.CrossAttention(
                score=mm.attention.General(), prior=mm.attention.PredictedWindow(1.0), heads=1, merge=Concat()
            ),
            mm.layers.MLP(out=16, merge=Replace()),
            depth=1,
        ),
    ),
    "local-m": mm.EncoderDecoder(
        reader=core_of(),
        writer=core_of(
            mm.layers.SelfAttention(), mm.layers.CrossAttention(prior=mm.masks.Window(3) + mm.attention.ALiBi())
        ),
    ),
    "fixed vector": mm.EncoderDecoder(
        reader=core_of(mm.layers.Recurrent()),
        writer=core_of(mm.layers.CrossAttention(heads=1), mm.layers.Recurrent()),
        last=1,
    ),
    "GPT": core_of(
        mm.layers.SelfAttention(bias=("query", "key", "value", "out")),
        mm.layers.MLP(activation="gelu_tanh", gated=False, bias=True),
        **LAYER_NORM,
        learned_times=90,
    ),
    "BERT": core_of(
        mm.layers.SelfAttention(bias=("query", "key", "value", "out"), merge=PostNorm()),
        mm.layers.MLP(activation="gelu", gated=False, bias=True, merge=PostNorm()),
        **LAYER_NORM,
        first_norm=True,
        last_norm=False,
        learned_times=90,
        learned_fields=2,
    ),
    "layer scale": core_of(
        mm.layers.SelfAttention(bias=("query", "value"), merge=LayerScale(0.3)),
        mm.layers.MLP(activation="quick_gelu", merge=LayerScale(0.4)),
        norm=Norm(centred=True),
    ),
    "Gemma": mm.Core(
        width=16,
        depth=5,
        heads=2,
        norm=Norm(eps=1e-5, around_one=True),
        block=tuple(
            (
                mm.layers.SelfAttention(
                    mask=mm.masks.Window(3) if depth % 3 else None,
                    rotary=None if depth % 3 else Rotary(base=(1e6, 1.0, 1.0), factor=8.0),
                    key_width=6,
                    merge=SandwichNorm(),
                ),
                mm.layers.MLP(activation="gelu_tanh", merge=SandwichNorm()),
            )
            for depth in range(5)
        ),
    ),
    "blocks in turns": mm.Core(
        width=16,
        depth=3,
        heads=2,
        block=(
            (mm.layers.SelfAttention(mask=mm.masks.Window(2), merge=Add(normed=False)), mm.layers.MLP()),
            (mm.layers.SelfAttention(rotary=Rotary(split=(0, 0, 0))), mm.layers.MLP(activation="relu")),
        ),
    ),
    "Whisper": mm.EncoderDecoder(
        reader=core_of(mm.layers.SelfAttention(bias=("query", "value", "out")), **LAYER_NORM, learned_times=90),
        writer=core_of(
            mm.layers.SelfAttention(bias=("query", "value", "out")),
            mm.layers.CrossAttention(bias=("query", "value", "out")),
            **LAYER_NORM,
            learned_times=90,
        ),
    ),
    "last three": mm.EncoderDecoder(reader=core_of(), writer=core_of(prior=mm.attention.ALiBi()), last=3),
}
WRITE, CLASS, APPEND = "text -> out:story", "story -> label", "-> out:story"
TOKENIZERS = {"text": TextBytes(), "story": TextBytes(causal=True), "label": Labels(("a", "b", "c"))}
SAMPLES = [
    {"text": t, "out": t[::-1] + "!", "story": t, "label": "abc"[i % 3]}
    for i, t in enumerate(("abc", "hey you there", "x", "abd", "of seven"))
]
every_core = pytest.mark.parametrize("name", CORES)


def lively(model: mm.Model) -> mm.Model:
    """Weights so large that every layer matters, gates and tables too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.3 * noise if weight.dim() < 2 else 1.2 * weight.shape[-1] ** -0.5 * noise)
    return model.eval()


_made: dict[str, mm.Model] = {}


def model_of(name: str) -> mm.Model:
    if name not in _made:
        _made[name] = lively(mm.Model(TOKENIZERS, CORES[name], [WRITE, CLASS, APPEND]))
    return _made[name]


def batch_of(samples: Sequence[int] = (0, 1, 2, 3, 4)) -> list[tuple[str, dict]]:
    return [((WRITE, WRITE, CLASS, WRITE, CLASS)[i], SAMPLES[i]) for i in samples]


@every_core
def test_the_plain_version_is_the_oracle_of_the_fast_one(name):
    model = model_of(name)
    stream = model.packer(batch_of())
    with torch.no_grad():
        fast, plain = model(stream), model(stream, backend="dense")
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=0)
    assert plain.std() > 0.1
    traced = Trace()
    with torch.no_grad():
        torch.testing.assert_close(model(stream, trace=traced), plain, atol=2e-5, rtol=0)


@every_core
def test_packing_is_invisible(name):
    """Every sample alone has the states it has among others, and no gradient crosses, not even a small one."""
    model = model_of(name)
    stream = model.packer(batch_of())
    rows = model.rows(stream).detach().requires_grad_()
    states = model.core(rows, stream.position_TA, stream.layout)
    sample_T = stream.layout.info.sample
    laid = {}  # samples of equal shape are laid side by side
    for r in stream.readings.values():
        first = [int(rows[0]) for rows in r.row_N.split(list(r.lengths))]
        laid |= dict(zip(r.samples, sample_T[first].tolist(), strict=True))
    for i in range(len(SAMPLES)):
        mine = sample_T == laid[i]
        with torch.no_grad():
            alone = model(model.packer(batch_of([i])))
        torch.testing.assert_close(states[mine].detach(), alone, atol=3e-5, rtol=0)
        (grad,) = torch.autograd.grad(states[mine].square().sum(), rows, retain_graph=True)
        assert torch.count_nonzero(grad[~mine]) == 0
        assert torch.count_nonzero(grad[mine]) > 0


@every_core
def test_permuting_samples_permutes_answers(name):
    model = model_of(name)
    order = [3, 0, 4, 1, 2]
    with torch.no_grad():
        one, other = (model.losses(model.packer(batch_of(which))) for which in ([0, 1, 2, 3, 4], order))
    for task in one:
        torch.testing.assert_close(one[task], other[task], atol=1e-4, rtol=1e-5)


def cut(layout: Layout, rows: Tensor, spans: Sequence[Span]) -> Layout:
    return Layout(tuple(spans), layout.info[rows])


@every_core
def test_a_cache_gives_the_states_of_the_whole_pass_at_every_length(name):
    """Prompts of unequal length at once, then token by token."""
    model = model_of(name)
    samples = [{"text": text, "out": "12345678"} for text in ("abc", "hey you there", "x")]
    stream = model.pack(WRITE, samples)
    spans, count = stream.layout.spans, 9
    assert {span.total - span.read for span in spans} == {count}
    starts = torch.tensor([0, *(s.total for s in spans)]).cumsum(0)[:-1]
    with torch.no_grad():
        rows, position = model.rows(stream), stream.position_TA
        whole = model.core(rows, position, stream.layout, backend="dense")
        cache = model.core.core.cache(rows=3, capacity=40)
        prompt = torch.cat([torch.arange(s, s + span.read + 1) for s, span in zip(starts.tolist(), spans, strict=True)])
        layout = cut(stream.layout, prompt, [Span(s.bidirectional, s.read + 1, s.read) for s in spans])
        found = model.core(rows[prompt], position[prompt], layout, cache=cache)
        torch.testing.assert_close(found, whole[prompt], atol=2e-5, rtol=0)
        for step in range(1, count):
            new = starts + torch.tensor([s.read for s in spans]) + step
            layout = cut(stream.layout, new, [Span(0, 1)] * 3)
            if isinstance(model.core, TwoCores):  # it counts what is written from its own start
                layout = Layout(layout.spans, replace(layout.info, order=torch.full((3,), step, dtype=torch.int32)))
            found = model.core(rows[new], position[new], layout, cache=cache)
            torch.testing.assert_close(found, whole[new], atol=2e-5, rtol=0)
    last = starts + torch.tensor([s.total for s in spans]) - 1
    assert (whole[last] - whole[last - 1]).abs().max() > 0.05


@every_core
def test_greedy_answers_are_those_of_whole_passes_and_a_batch_those_of_one(name):
    model = model_of(name)
    asked = [{"text": s["text"]} for s in SAMPLES]
    together = model.generate(WRITE, asked, max_tokens=7)
    first = []
    for one, answer in zip(asked, together, strict=True):
        ids = answer.tokens.content
        with torch.no_grad():
            stream = model.packer([(WRITE, {**one, "out": answer.tokens})], answers=True)
            logits = model.logits(stream, backend="dense")[WRITE]
        assert logits[: len(ids)].argmax(-1).tolist() == ids.tolist()
        first.append(logits[0])
        assert model.generate(WRITE, [one], max_tokens=7)[0].tokens.content.tolist() == ids.tolist()
    assert torch.stack(first).std(0).max() > 1e-2  # what was read matters


APPENDED = [name for name, core in CORES.items() if isinstance(core, mm.Core)]


@pytest.mark.parametrize("name", APPENDED)
def test_what_is_read_in_order_can_be_read_piece_by_piece(name):
    """Unequal pieces, one of a sample that has nothing new; layers that read from the end too find nothing to read there."""
    model = model_of(name)
    stream = model.pack(APPEND, [{"out": "0123456789"}, {"out": "abcdefg"}])
    totals = [span.total for span in stream.layout.spans]
    assert all(span.bidirectional == 0 for span in stream.layout.spans)
    with torch.no_grad():
        rows, position = model.rows(stream), stream.position_TA
        whole = model.core(rows, position, stream.layout, backend="dense")
        cache = model.core.core.cache(rows=2, capacity=20)
        done = [0, 0]
        for pieces in ([3, 1], [1, 4], [0, 5], [1, 1], [3, 0]):
            new = torch.cat(
                [torch.arange(s + d, s + d + n) for s, d, n in zip((0, totals[0]), done, pieces, strict=True)]
            )
            layout = cut(stream.layout, new, [Span(0, n) for n in pieces])
            found = model.core(rows[new], position[new], layout, cache=cache)
            torch.testing.assert_close(found, whole[new], atol=2e-5, rtol=0)
            done = [d + n for d, n in zip(done, pieces, strict=True)]
    assert done == totals


@every_core
def test_declarations_and_weights_survive_a_checkpoint(name, tmp_path):
    model, core = model_of(name), CORES[name]
    assert type(core).from_config(core.config()) == core
    again = mm.Model.load(model.save(tmp_path / "model"))
    assert again.core.core == core
    stream = model.packer(batch_of())
    with torch.no_grad():
        assert torch.equal(again(stream), model(stream))


@every_core
def test_every_weight_is_counted_and_learns(name):
    core = CORES[name]
    torch.manual_seed(3)
    model = lively(mm.Model(TOKENIZERS, core, [WRITE])).train()
    assert core.parameters == sum(p.numel() for p in model.core.parameters())
    loss = sum(model.losses(model.pack(WRITE, SAMPLES, answers=True))[WRITE] for _ in range(4 if name == "hard" else 1))
    assert isinstance(loss, Tensor)
    loss.backward()
    # norms of keys and queries that are not compared
    still = {n for n, w in model.core.named_parameters() if w.grad is None or torch.count_nonzero(w.grad) == 0}
    if name in ("fixed vector", "location"):
        still = {n for n in still if "norm_" not in n}
    assert not still
    assert all(w.grad.isfinite().all() for w in model.core.parameters() if w.grad is not None)


@pytest.mark.parametrize("name", [name for name in CORES if name != "hard"])  # which may choose another key
def test_half_precision_is_near_and_learns(name):
    model = lively(mm.Model(TOKENIZERS, CORES[name], [WRITE]))
    stream = model.pack(WRITE, SAMPLES)
    with torch.no_grad():
        whole = model(stream)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(stream)
        loss = model.losses(stream)[WRITE]
    assert (half - whole).abs().mean() < 0.05
    loss.backward()
    assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())


def layout_of(samples: Sequence[tuple[int, int]]) -> Layout:
    """(read freely, read in order) of each sample."""
    rows = [(i, t, int(t < free), int(t >= free)) for i, (free, rest) in enumerate(samples) for t in range(free + rest)]
    return Layout(tuple(Span(free, free + rest) for free, rest in samples), MaskInfo(*torch.tensor(rows).T))


def context_of(layout: Layout) -> Context:
    return Context(layout, plan_attention(PREFIX_LM, layout), lambda width: None)


def split(x_TD: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    return x_TD.split([span.total for span in layout.spans])


LENGTHS = [(2, 3), (0, 4), (5, 0), (1, 0), (3, 3), (0, 1)]


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_layers_are_those_of_torch_sample_by_sample(cell, both_ways):
    """From its end only what is bidirectional is read; the rest gets zeros there."""
    layout = layout_of(LENGTHS)
    body: Any = mm.layers.Recurrent(cell=cell, hidden=5, both_ways=both_ways).build(core_of(), 8)
    x_TD = torch.randn(len(layout.info.sample), 8, requires_grad=True)
    kind = nn.GRU if cell == "gru" else nn.LSTM
    one = kind(8, 5, batch_first=True, bidirectional=both_ways)
    one.load_state_dict(
        dict(body.forwards.state_dict())
        | ({f"{n}_reverse": w for n, w in body.backwards.state_dict().items()} if both_ways else {})
    )
    wanted = []
    for span, x in zip(layout.spans, split(x_TD, layout), strict=True):
        out = one(x[None])[0][0]
        if both_ways:
            back = x.new_zeros(span.total, 5)
            if span.bidirectional:
                back = torch.cat([one(x[None, : span.bidirectional])[0][0][:, 5:], back[span.bidirectional :]])
            out = torch.cat([out[:, :5], back], 1)
        wanted.append(out)
    found = body(x_TD, context_of(layout))
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-6, rtol=0)
    push = torch.randn_like(found)
    grads = [torch.autograd.grad((out * push).sum(), x_TD)[0] for out in (found, torch.cat(wanted))]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=0)


def test_the_share_of_each_direction_is_half_the_stream():
    assert mm.layers.Recurrent(both_ways=True).build(core_of(), 16).out_width == 16
    assert mm.layers.Recurrent().build(core_of(), 16).out_width == 16
    assert mm.layers.Recurrent(cell="lstm").state(core_of(), 16) == 32


@pytest.mark.parametrize("dilation", [1, 2, 3, 8])
def test_temporal_convolutions_are_torchs_and_see_no_future(dilation):
    """Mishra et al. 2018, dense block: causal convolutions of kernel size 2 with gates, each sample padded for itself."""
    layout = layout_of(LENGTHS)
    body: Any = mm.zoo.TemporalConv(filters=4, dilation=dilation).build(core_of(), 6)
    x_TD = torch.randn(len(layout.info.sample), 6, requires_grad=True)
    kernel = torch.stack([body.before.weight, body.now.weight], -1)
    wanted = []
    for x in split(x_TD, layout):
        signal, gate = F.conv1d(F.pad(x.T, (dilation, 0)), kernel, body.now.bias, dilation=dilation).chunk(2)
        wanted.append((signal.tanh() * gate.sigmoid()).T)
    found = body(x_TD, context_of(layout))
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-6, rtol=0)
    for t in range(len(x_TD)):
        (grad,) = torch.autograd.grad(found[t].sum(), x_TD, retain_graph=True)
        sees = {t, t - dilation} if layout.info.order[t] >= dilation else {t}
        assert set(grad.abs().sum(1).nonzero()[:, 0].tolist()) == sees


@pytest.mark.parametrize("prior", [None, mm.attention.MixingWeights(5)], ids=["bare", "mixing"])
def test_a_persistent_memory_is_its_formula(prior):
    layer = mm.layers.PersistentMemory(slots=5, prior=prior, heads=4, kv_heads=2, key_width=6, value_width=3, out=7)
    body: Any = layer.build(core_of(), 16)
    layout = layout_of(LENGTHS)
    x_TD = torch.randn(len(layout.info.sample), 16)
    with torch.no_grad():
        for weight in body.parameters():
            weight += torch.randn_like(weight)
        q = (x_TD @ body.query.weight.T).view(-1, 4, 6)
        reads = []
        for h in range(4):
            joint = q[:, h] @ body.key_MGK[:, h // 2].T / math.sqrt(6)
            if prior:
                joint = joint + body.mechanism.prior_weights[0].table[h].log_softmax(-1)
            reads.append(joint.softmax(-1) @ body.value_MGK[:, h // 2])
        wanted = torch.cat(reads, -1) @ body.out.weight.T
        torch.testing.assert_close(body(x_TD, context_of(layout)), wanted, atol=1e-5, rtol=1e-5)


def test_what_is_pruned_is_as_if_its_prior_were_nothing():
    """Usage is the sum of responsibilities; a pruned model is the old one with log pi = -infinity for what is gone."""
    model = lively(mm.Model(TOKENIZERS, CORES["memory"], [WRITE]))
    with torch.no_grad():  # of both layers two components are hardly ever used
        for table in (w for n, w in model.named_parameters() if "prior_weights" in n):
            table[:, :2] -= 12.0
    used = usage(model, WRITE, SAMPLES, quiet=True)
    counts = [layer.usage_HM.mean(0).float() for layer in used.values()]
    tokens = sum(layer.queries for layer in used.values()) / len(counts)
    assert tokens >= sum(len(model.pack(WRITE, [{**s, "out": None}], answers=False)) for s in SAMPLES)
    for N_k in counts:
        torch.testing.assert_close(N_k.sum(), torch.tensor(float(tokens)), atol=1e-3, rtol=0)
    smaller = pruned(model, used, below=0.5)
    (layer,) = (x for x in smaller.core.core.block if isinstance(x, mm.layers.PersistentMemory))  # type: ignore[union-attr]
    keep = [torch.argsort(N_k, descending=True)[: layer.slots] for N_k in counts]
    assert 1 <= layer.slots < 5
    with torch.no_grad():
        for table, kept in zip((w for n, w in model.named_parameters() if "prior_weights" in n), keep, strict=True):
            gone = torch.ones(5, dtype=torch.bool)
            gone[kept] = False
            table[:, gone] = -1e9
        stream = model.pack(WRITE, SAMPLES)
        torch.testing.assert_close(smaller(stream), model(stream), atol=1e-5, rtol=0)


def test_gates_start_closed():
    core = core_of(
        mm.layers.SelfAttention(merge=Gated()), mm.layers.MLP(merge=Gated()), mm.layers.Recurrent(merge=Gated())
    )
    built, layout = core.build(), layout_of(LENGTHS)
    x_TD = torch.randn(len(layout.info.sample), 16)
    out = built(x_TD, torch.zeros(len(x_TD), 3), layout)
    torch.testing.assert_close(out, built.norm(x_TD))
    out.square().sum().backward()
    gates = [p for name, p in built.named_parameters() if name.endswith("gamma")]
    assert len(gates) == 6
    assert all(gate.grad is not None for gate in gates)
    with torch.no_grad():
        gates[0].fill_(0.5)
    assert (built(x_TD, torch.zeros(len(x_TD), 3), layout) - out).abs().max() > 1e-3


def test_merges_are_their_formulas():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    gate = Gated().weights(4, Norm())
    nn.init.constant_(gate.gamma, 0.3)  # type: ignore[arg-type]
    assert torch.equal(Add().merge(x, y, None), x + y)
    assert torch.equal(Replace().merge(x, y, None), y)
    assert torch.equal(Concat().merge(x, y, None), torch.cat([x, y], -1))
    torch.testing.assert_close(Gated().merge(x, y, gate), x + 0.3 * y)
    scale = LayerScale(0.25).weights(4, Norm())
    torch.testing.assert_close(LayerScale(0.25).merge(x, y, scale), x + 0.25 * y)
    norm = Norm(eps=1e-3, centred=True, bias=True)
    weight, bias = torch.randn(4), torch.randn(4)
    for merge, wanted in (
        (PostNorm(), F.layer_norm(x + y, (4,), weight, bias, 1e-3)),
        (SandwichNorm(), x + F.layer_norm(y, (4,), weight, bias, 1e-3)),
    ):
        made = merge.weights(4, norm)
        made.load_state_dict({"weight": weight, "bias": bias})
        torch.testing.assert_close(merge.merge(x, y, made), wanted)
    assert (PostNorm().normed, SandwichNorm().normed, Add().normed, Add(normed=False).normed) == (
        False,
        True,
        True,
        False,
    )
    assert [merge.width(4, 6) for merge in (Concat(), Replace())] == [10, 6]


def test_concatenation_widens_the_stream_and_a_last_linear_narrows_it():
    built = core_of(*SNAIL).build()
    assert [layer.width for layer in built.sublayers()] == [21, 25, 28, 33, 37, 40]
    assert built.narrow is not None
    assert built.narrow.weight.shape == (16, 40)
    layout = layout_of([(0, 6)])
    x_TD = torch.randn(6, 16)
    seen: list[Any] = []
    built.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    out = built(x_TD, torch.zeros(6, 3), layout)
    assert torch.equal(seen[0][:, :16], x_TD)  # what came in is still there
    torch.testing.assert_close(out, built.norm(seen[0] @ built.narrow.weight.T))
    assert core_of().build().narrow is None


def test_a_fixed_vector_is_the_last_state_of_what_was_read():
    """Sutskever et al. 2014: with one state to look at, every written token gets its value, whatever it asks."""
    model = model_of("fixed vector")
    assert isinstance(model.core, TwoCores)
    stream = model.pack(WRITE, SAMPLES)
    memory: list[Any] = []
    hook = model.core.reader.register_forward_hook(lambda module, args, out: memory.append(out))
    trace = Trace()
    with torch.no_grad():
        model(stream, trace=trace)
    hook.remove()
    reads = torch.tensor([span.read for span in stream.layout.spans])
    last = memory[0][reads.cumsum(0) - 1]
    cross: list[Any] = [m for m in model.core.writer.modules() if isinstance(m, mm.layers.Attention)]
    for depth, attention in enumerate(cross):
        seen = [s for s in trace.seen if s.name == f"block {depth + 1} cross"]
        value = torch.cat([s.value_BMHK for s in seen])
        assert value.shape[1] == 1
        torch.testing.assert_close(value.flatten(1), F.linear(last, attention.qkv.weight[-8:]))
        for s in seen:
            assert torch.equal(s.read_BTHK, s.value_BMHK.expand_as(s.read_BTHK))


def test_of_the_last_states_all_earlier_ones_are_unseen():
    model = model_of("last three")
    assert isinstance(model.core, TwoCores)
    stream = model.pack(WRITE, [{"text": "abcdefg", "out": "xy"}, {"text": "ab", "out": "z"}])
    held: list[Any] = []
    hook = model.core.reader.register_forward_hook(lambda m, args, out: held.append(out))
    states = model(stream)
    hook.remove()
    held[0].retain_grad()
    reads = [span.read for span in stream.layout.spans]
    written = torch.cat([torch.arange(s.total) >= s.read for s in stream.layout.spans])
    states[written].square().sum().backward()
    assert held[0].grad is not None
    used = held[0].grad.abs().sum(1) > 0
    assert used.tolist() == [t >= n - 3 for n in reads for t in range(n)]


WINDOWS: dict[str, tuple[Rule, bool]] = {
    "1": (PREFIX_LM & mm.masks.Window(1), True),
    "2": (PREFIX_LM & mm.masks.Window(2), True),
    "5": (PREFIX_LM & mm.masks.Window(5), True),
    "19": (PREFIX_LM & mm.masks.Window(19), True),
    "in both directions": (mm.masks.SameSample() & mm.masks.Window(4), True),
    "of two": (LAW & (mm.masks.Window(3) | mm.masks.Window(6)), True),
    "with a hole": (LAW & mm.masks.Window(5) & ~mm.masks.Window(2) | LAW & mm.masks.Window(1), True),
    "no bound": (LAW & ~mm.masks.Window(3), False),
}


@pytest.mark.parametrize(
    "score", [mm.attention.ScaledDotProduct(), mm.attention.Additive()], ids=["fused", "written out"]
)
@pytest.mark.parametrize("prior", [None, mm.attention.ALiBi() + mm.attention.RelativeBias(3)], ids=["bare", "prior"])
@pytest.mark.parametrize("window", WINDOWS)
def test_long_samples_in_blocks_are_the_dense_oracle(window, prior, score):
    """Lengths around the blocks' bounds, two samples of each, one of them read freely; forward and backward."""
    rule, bounded = WINDOWS[window]
    totals = [n for n in (16, 17, 31, 47, 48, 49, 80, 97) if score == mm.attention.ScaledDotProduct() or n in (17, 80)]
    samples = [s for n in totals for s in ((0, n), (0, n))] + [(48, 0), (20, 60)]
    layout = layout_of(samples)
    count = len(layout.info.sample)
    found = Mechanism(score, prior, mm.attention.Soft(), 4, 6)
    for weight in found.parameters():
        nn.init.normal_(weight)
    qkv = [torch.randn(count, heads, 6, requires_grad=True) for heads in (4, 2, 2)]
    fast = plan_attention(rule, layout, backend="runs")
    assert isinstance(fast, _RunsPlan)
    blocks = [b for _, _, b in fast.runs if b is not None]
    assert bool(blocks) == bounded
    if bounded:
        assert any(b.blocks > 2 for b in blocks)
    q_THK, k_TGK, v_TGK = qkv
    one = fast.attend(q_THK, k_TGK, v_TGK, found, 0)
    other = plan_attention(rule, layout, backend="dense").attend(q_THK, k_TGK, v_TGK, found, 0)
    torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
    push = torch.randn_like(one)
    inputs = [*qkv, *found.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad((x * push).sum(), inputs) for x in (one, other)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_dropout_thins_each_update_and_drop_path_leaves_out_samples():
    layout = layout_of([(0, 7)] * 400)
    x_TD = torch.randn(2800, 16)
    layer = Sublayer(mm.layers.MLP(), core_of(), 16, 0.0, 0.25)
    nn.init.normal_(layer.body.down.weight)  # type: ignore[union-attr, arg-type]
    context = context_of(layout)
    with torch.no_grad():
        rest = layer.eval()(x_TD, context) - x_TD
        kept = ((layer.train()(x_TD, context) - x_TD) / rest).view(400, -1)
        assert sorted(set((kept[:, 0] * 75).round().tolist())) == [0.0, 100.0]
        assert (kept - kept[:, :1]).abs().max() < 1e-2  # a sample's rows share one fate
        assert 60 < int((kept[:, 0] == 0).sum()) < 140
        layer.dropout, layer.drop_path = 0.25, 0.0
        thinned = (layer(x_TD, context) - x_TD) / rest
    assert sorted(set((thinned.flatten() * 75).round().tolist())) == [0.0, 100.0]
    assert 0.23 < float((thinned == 0).float().mean()) < 0.27


def test_drop_path_rises_to_the_last_block_in_every_layer_of_it():
    built = core_of(*SNAIL, depth=3, drop_path=0.4, dropout=0.1).build()
    assert [layer.drop_path for layer in built.sublayers()] == [0.0] * 3 + [0.2] * 3 + [0.4] * 3
    assert {layer.dropout for layer in built.sublayers()} == {0.1}


FLOPS = {
    "SNAIL": core_of(*SNAIL),
    "widths of its own": core_of(
        mm.layers.SelfAttention(heads=3, kv_heads=1, key_width=6, value_width=4), mm.layers.MLP(hidden=20)
    ),
    "convolutions": core_of(mm.zoo.TemporalConv(filters=5, dilation=2), mm.zoo.TemporalConv(filters=5)),
    "general": core_of(score=mm.attention.General()),
    "memory": core_of(mm.layers.PersistentMemory(slots=5), mm.layers.MLP()),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops_of_unusual_cores_are_those_that_pytorch_counts(name):
    tokens, core = 24, FLOPS[name]
    counter = FlopCounterMode(display=False)
    with counter:
        core.build()(
            torch.randn(tokens, 16), torch.zeros(tokens, 3), layout_of([(tokens, 0)]), backend="dense", trace=Trace()
        )
    assert core.flops(tokens, context=tokens) == counter.get_total_flops()


def test_a_turned_core_without_places_does_not_turn():
    """rotary_split of zeros: shifting every place changes nothing, and with places it does where they are not shifted alike."""
    layout = layout_of([(4, 4)])
    x_TD, place_TA = torch.randn(8, 16), torch.arange(24.0).view(8, 3)
    for split_of, moves in (((0, 0, 0), False), ((2, 1, 1), True)):
        torch.manual_seed(0)
        built = core_of(rotary_split=split_of, depth=1).build()
        for weight in built.parameters():
            nn.init.normal_(weight, std=0.5)
        one, other = built(x_TD, place_TA, layout), built(x_TD, place_TA * 2, layout)
        assert ((one - other).abs().max() > 1e-3) == moves


ELMAN: Any = "rnn"
TURNED = {
    mm.attention.ScaledDotProduct(): True,
    mm.attention.Gaussian(): True,
    mm.attention.Cosine(): True,
    mm.attention.General(): True,
    mm.attention.Additive(): False,
    mm.attention.Bernoulli(): False,
    mm.attention.LocationBased(8): False,
}


@pytest.mark.parametrize("score", TURNED, ids=str)
def test_places_turn_what_is_compared_by_direction_and_nothing_else(score):
    layout, place_TA = layout_of([(4, 4)]), torch.arange(24.0).view(8, 3)
    built = core_of(mm.layers.SelfAttention(), score=score, depth=1).build()
    for weight in built.parameters():
        nn.init.normal_(weight, std=0.5)
    x_TD = torch.randn(8, 16)
    one, shifted, stretched = (built(x_TD, place, layout) for place in (place_TA, place_TA + 5, place_TA * 2))
    assert ((one - stretched).abs().max() > 1e-3) == TURNED[score]
    if score != mm.attention.General():  # whose matrix mixes the pairs that are turned
        torch.testing.assert_close(one, shifted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: core_of(mm.layers.CrossAttention()).build(),
            ConfigError,
            r"CrossAttention needs another core to attend to",
        ),
        (
            lambda: mm.layers.Recurrent(cell=ELMAN),
            ConfigError,
            r"Recurrent: cell='rnn' is unknown; there are 'gru' and 'lstm'",
        ),  # type: ignore[arg-type]
        (lambda: mm.zoo.TemporalConv(filters=0), ConfigError, r"filters=0 must be a whole number of at least 1"),
        (
            lambda: mm.zoo.TemporalConv(filters=2, dilation=0),
            ConfigError,
            r"dilation=0 must be a whole number of at least 1",
        ),
        (
            lambda: core_of(mm.layers.PersistentMemory(slots=0)).build(),
            ConfigError,
            r"slots=0 must be a whole number of at least 1",
        ),
        (
            lambda: core_of(mm.layers.SelfAttention(heads=3, kv_heads=2)).build(),
            ConfigError,
            r"SelfAttention: heads=3 is not a multiple of kv_heads=2",
        ),
        (
            lambda: core_of(mm.layers.SelfAttention(out=7)).build(),
            ConfigError,
            r"Add: a stream of width 16 and an update of 7 do not add up",
        ),
        (
            lambda: core_of(mm.layers.Recurrent(hidden=7, merge=Gated())).build(),
            ConfigError,
            r"Gated: a stream of width 16 and an update of 7 do not add up",
        ),
        (lambda: core_of(mm.layers.MLP(), "attention"), ConfigError, r"is no Layer"),  # type: ignore[arg-type]
        (lambda: replace(BAHDANAU, last=0), ConfigError, r"last=0 leaves nothing to attend to"),
        (
            lambda: mm.EncoderDecoder(reader=core_of(), writer=core_of(mm.layers.Recurrent())),
            ConfigError,
            r"the writer's block has no attention; put a CrossAttention\(\)",
        ),
        (
            lambda: mm.EncoderDecoder(
                reader=core_of(), writer=core_of(mm.zoo.TemporalConv(filters=2), mm.layers.CrossAttention())
            ).build(),
            ConfigError,
            r"CrossAttention: the stream is 18 wide here and the reader.s states 16; merge by Add",
        ),
        (
            lambda: mm.EncoderDecoder(reader=BAHDANAU.writer, writer=core_of()),
            ConfigError,
            r"CrossAttention needs another core",
        ),
    ],
)
def test_what_cannot_be_built_says_why(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_reading_from_the_end_needs_what_is_read_freely_first():
    model = mm.Model(TOKENIZERS, core_of(*BOTH), ["story text -> label"])
    with pytest.raises(StreamError, match=r"both_ways=True.*name the bidirectional fields first in the task"):
        model(model.pack("story text -> label", [{"story": "ab", "text": "cd", "label": "a"}]))


def test_reading_from_the_end_needs_all_at_once():
    layout = layout_of([(4, 0)])
    built = core_of(*BOTH, mask=LAW).build()
    cache = built.core.cache(rows=1, capacity=9)
    first = cut(layout, torch.arange(2), [Span(2, 2)])
    built(torch.randn(2, 16), torch.zeros(2, 3), first, cache=cache)
    later = cut(layout, torch.arange(2, 4), [Span(2, 2)])
    with pytest.raises(StreamError, match=r"all must be read together, not piece by piece|would have had to attend to"):
        built(torch.randn(2, 16), torch.zeros(2, 3), later, cache=cache)


def test_a_cross_attention_without_its_core_says_so():
    body: Any = mm.layers.CrossAttention().build(core_of(), 16)
    with pytest.raises(ConfigError, match=r"there is no other core to attend to; it belongs in the writer"):
        body(torch.randn(3, 16), context_of(layout_of([(3, 0)])))


def test_layers_name_what_they_do_for_the_trace():
    built = core_of(*SNAIL, mm.layers.PersistentMemory(slots=2, merge=Concat())).build()
    names = [m.name for m in built.modules() if isinstance(m, Mechanism)]
    assert names == ["block 1 self", "block 1 memory", "block 2 self", "block 2 memory"]


def test_the_cores_here_are_made_of_every_layer_and_merge_there_is():
    layers = [layer for core in CORES.values() for part in _parts(core) for block in part.blocks for layer in block]
    declared, merges = {type(layer) for layer in layers}, {type(layer.merge) for layer in layers}
    exported = {getattr(mm, name) for name in mm.__all__ if isinstance(getattr(mm, name), type)}
    assert {x for x in exported if issubclass(x, Layer) and x is not Layer} <= declared
    assert merges == {Add, Replace, Concat, Gated, LayerScale, PostNorm, SandwichNorm}
    assert len(list(itertools.chain.from_iterable(_parts(core) for core in CORES.values()))) > len(CORES)


def _parts(core: mm.Core | mm.EncoderDecoder) -> tuple[mm.Core, ...]:
    return (core,) if isinstance(core, mm.Core) else (core.reader, core.writer)


def test_an_engine_goes_on_when_one_request_outgrows_what_a_layer_knows():
    core = mm.Core(width=16, depth=1, heads=2, score=mm.attention.LocationBased(10))
    model = lively(mm.Model(TOKENIZERS, core, [WRITE]))
    engine = mm.Engine(model, rows=3, capacity=40)
    with pytest.raises(
        StreamError, match=r"more than the 10 places that this model's attention knows; shorten the prompt"
    ):
        engine.submit(WRITE, {"text": "abcdefgh"}, max_tokens=20)
    short = engine.submit(WRITE, {"text": "abc"}, max_tokens=2)
    pieces = list(engine.run())
    assert [piece.ticket for piece in pieces if piece.prediction is not None] == [short]


def test_a_pass_that_fails_ends_those_who_run_and_not_the_engine(monkeypatch):
    model = lively(mm.Model(TOKENIZERS, mm.Core(width=16, depth=1, heads=2), [WRITE]))
    engine = mm.Engine(model, rows=1, capacity=40)
    tickets = [engine.submit(WRITE, {"text": "abc"}, max_tokens=3) for _ in range(2)]
    right, calls = engine._decode_step, []

    def once(batch):
        calls.append(1)
        if len(calls) == 1:
            raise StreamError("no")
        return right(batch)

    monkeypatch.setattr(engine, "_decode_step", once)
    pieces = list(engine.run())
    assert [piece.ticket for piece in pieces if piece.error] == tickets[:1]
    assert [piece.ticket for piece in pieces if piece.prediction] == tickets[1:]


@pytest.mark.parametrize(
    "layer",
    [
        mm.layers.PersistentMemory(slots=4, prior=mm.attention.ALiBi()),
        mm.layers.PersistentMemory(slots=4, prior=mm.attention.MixingWeights(4) + mm.masks.Window(2)),
        mm.layers.PersistentMemory(slots=4, score=mm.attention.LocationBased(4)),
    ],
)
def test_components_that_are_known_by_their_number_are_not_pruned(layer):
    model = mm.Model(TOKENIZERS, mm.Core(width=16, depth=1, heads=2, block=(layer,)), [WRITE])
    with pytest.raises(ConfigError, match="looks at its components by their number"):
        pruned(model, usage(model, WRITE, SAMPLES, quiet=True))


def test_counts_of_another_memory_are_refused_and_precision_is_kept():
    def of(slots):
        block = (mm.layers.PersistentMemory(slots=slots),)
        return mm.Model(TOKENIZERS, mm.Core(width=16, depth=1, heads=2, block=block), [WRITE])

    used = usage(of(4), WRITE, SAMPLES, quiet=True)
    with pytest.raises(ConfigError, match="counts are of memories of another size"):
        pruned(of(5), used)
    assert pruned(of(4).double(), used).core.norm.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mm.layers.MLP(hidden=0), "MLP: hidden=0 must be a whole number of at least 1"),
        (lambda: mm.layers.Recurrent(hidden=2.0), "Recurrent: hidden=2.0 must be a whole number"),
        (lambda: mm.zoo.TuringMachine(slots=3.5, slot_width=4), "TuringMachine: slots=3.5 must be a whole number"),
        (lambda: mm.layers.PersistentMemory(slots="3"), "PersistentMemory: slots='3' must be a whole number"),
        (
            lambda: mm.layers.PersistentMemory(slots=5, prior=mm.attention.MixingWeights(3)),
            "slots=5, but .* is defined for 3 only",
        ),
        (lambda: mm.attention.Additive(0), "Additive: hidden=0 must be above 0"),
        (lambda: mm.attention.Gumbel(temperature=float("inf")), "must be above 0 and finite"),
        (lambda: mm.attention.Hard(weight=-1.0), "Hard: weight=-1.0 must not be negative"),
        (lambda: mm.masks.Window(3) & mm.attention.ALiBi(), "Window & other: other=.* is no Rule"),
        (lambda: mm.attention.ALiBi() + mm.masks.Window, r"ALiBi \+ other: other=Window is no Prior; call it"),
        (lambda: mm.Core(width=16, depth=1, heads=2, score=None), "Core: score=None is no Score"),
        (lambda: mm.EncoderDecoder(reader=None, writer=mm.Core.tiny()), "EncoderDecoder: reader=None is no Core"),
        (
            lambda: mm.Core(width=16, depth=2, heads=2, drop_path=0.5, block=(mm.layers.MLP(merge=Replace()),)).build(),
            "with Replace in MLP nothing of the stream would be left",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_they_are_written(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(
    "score",
    [
        mm.attention.DotProduct(),
        mm.attention.General(),
        mm.attention.Cosine(learned=True),
        mm.attention.Gaussian(),
        mm.attention.Bernoulli(),
    ],
    ids=lambda score: type(score).__name__,
)
def test_every_score_that_factors_runs_on_the_block_sparse_kernel(score):
    """And beside a memory with a prior of its own, which no plan of the stream runs."""
    block = (
        mm.layers.SelfAttention(score=score),
        mm.layers.PersistentMemory(slots=3, prior=mm.attention.MixingWeights(3)),
    )
    model = lively(mm.Model(TOKENIZERS, core_of(*block), [WRITE])).eval()
    stream = model.pack(WRITE, SAMPLES)
    with torch.no_grad():
        torch.testing.assert_close(model(stream, backend="flex"), model(stream, backend="dense"), atol=1e-5, rtol=1e-4)
