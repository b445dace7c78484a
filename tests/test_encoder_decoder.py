"""Two cores: cross-attention against PyTorch's own and against loops, packing, caches, and all tasks in one pack."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multimodal as mm
from multimodal.attention import (
    Cosine,
    Layout,
    Mechanism,
    ScaledDotProduct,
    Soft,
    Span,
    plan_cross_attention,
)
from multimodal.core import Block
from multimodal.encoder_decoder import TwoCores
from multimodal.layers import Attention, Context, Sublayer
from multimodal.masks import PREFIX_LM, MaskInfo
from multimodal.positions import rotary_frequencies, rotations
from multimodal.shapes import ConfigError, StreamError
from multimodal.tokenizer import Tokens
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

WRITE, CLASS, ALIGN, NOTHING = "image text -> story", "text -> label", "image text -> digits", "-> story"
BACKENDS = pytest.mark.parametrize("backend", ["dense", "runs"])


@dataclass(frozen=True)
class Digits(mm.Tokenizer):
    causal: bool = True
    vocab_size = 4

    def encode(self, value: Sequence[int]) -> Tokens:
        return Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens: Tokens) -> list[int]:
        return tokens.content.tolist()


@dataclass(frozen=True)
class Story(Digits):
    """Of three words, so that an untrained model stops now and then."""

    vocab_size = 3


CORES = {
    "alike": mm.EncoderDecoder(reader=mm.Core(width=32, depth=2, heads=4), writer=mm.Core(width=32, depth=2, heads=4)),
    "unlike": mm.EncoderDecoder(
        reader=mm.Core(width=32, depth=1, heads=2, mask=PREFIX_LM & mm.masks.Window(4)),
        writer=mm.Core(
            width=32, depth=2, heads=4, kv_heads=2, qk_norm=False, score=Cosine(), mask=PREFIX_LM & mm.masks.Window(3)
        ),
    ),
}


def core_of(model: mm.Model) -> TwoCores:
    assert isinstance(model.core, TwoCores)
    return model.core


@pytest.fixture
def make(lively) -> Callable[..., mm.Model]:
    def made(core: str = "alike", seed: int = 0) -> mm.Model:
        tokenizers = {
            "image": ImagePatches(patch=4, channels=1),
            "text": TextBytes(),
            "story": Story(),
            "label": Labels(("a", "b", "c")),
            "digits": Digits(),
        }
        tasks = [WRITE, CLASS, mm.Task(ALIGN, mm.CTC()), NOTHING]
        return lively(mm.Model(tokenizers, CORES[core], tasks, seed=seed))

    return made


def sample(i: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(i)
    return {
        "image": None if i % 5 == 3 else torch.rand(4, 4 * (1 + i % 3), generator=generator),
        "text": "abcdefghij"[: 5 + i % 4],
        "story": [(i * k) % 3 for k in range(1 + i % 4)],
        "label": "abc"[i % 3],
        "digits": [0, 1, 3][: 1 + i % 3],
    }


PACK = [((WRITE, CLASS, ALIGN, NOTHING, WRITE)[i % 5], {**sample(i)}) for i in range(10)]
PACK[4][1].update(image=None, text=None)  # writes, but reads nothing


def states_by_sample(model: mm.Model, batch: Sequence[tuple[str, dict]], backend: str = "auto") -> list[Tensor]:
    """States of each sample's rows that a head reads."""
    stream = model.packer(batch, answers=True)
    state_TD = model(stream, backend=backend)
    found: dict[int, Tensor] = {}
    for reading in stream.readings.values():
        parts = state_TD[reading.row_N].split(list(reading.lengths))
        found |= dict(zip(reading.samples, parts, strict=True))
    return [found[i] for i in range(len(batch))]


@BACKENDS
@pytest.mark.parametrize("core", CORES)
def test_packing_is_invisible(make, core, backend):
    """Tasks that only read and tasks that write, samples with an image and without, and some that read nothing, in one pack."""
    model = make(core)
    with torch.no_grad():
        together = states_by_sample(model, PACK, backend)
        for i, item in enumerate(PACK):
            (alone,) = states_by_sample(model, [item], backend)
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)
        losses = model.losses(model.packer(PACK), backend=backend)
        for task, total in losses.items():
            parts = [model.losses(model.packer([item]), backend=backend)[task] for item in PACK if item[0] == task]
            torch.testing.assert_close(total, torch.stack(parts).sum(), atol=1e-4, rtol=1e-5)
    assert set(losses) == {WRITE, CLASS, ALIGN, NOTHING}
    spans = model.packer(PACK).layout.spans
    assert {s.read == 0 for s in spans} == {True, False}
    assert {s.read == s.total for s in spans} == {True, False}


@BACKENDS
@pytest.mark.parametrize("core", CORES)
def test_no_gradient_crosses_from_sample_to_sample(make, core, backend):
    model = make(core)
    stream = model.packer(PACK)
    rows_TD = model.rows(stream).detach().requires_grad_()
    state_TD = model.core(rows_TD, stream.position_TA, stream.layout, backend=backend)
    sample_T, order_T = stream.layout.info.sample, stream.layout.info.order
    for number, span in enumerate(stream.layout.spans):
        mine = sample_T == number
        (grad,) = torch.autograd.grad(state_TD[mine].square().sum(), rows_TD, retain_graph=True)
        assert torch.isfinite(grad).all()
        assert torch.count_nonzero(grad[~mine]) == 0
        assert (grad[mine].abs().sum(-1) > 0).all()
        if span.read < span.total:  # what is written is made of what was read; and what is read sees nothing written
            (grad,) = torch.autograd.grad(
                state_TD[mine & (order_T >= span.read)].square().sum(), rows_TD, retain_graph=True
            )
            assert (grad[mine & (order_T < span.read)].abs().sum(-1) > 0).all()
        if span.read:
            (grad,) = torch.autograd.grad(
                state_TD[mine & (order_T < span.read)].square().sum(), rows_TD, retain_graph=True
            )
            assert torch.count_nonzero(grad[order_T >= stream_read(stream)]) == 0


def stream_read(stream: mm.stream.Stream) -> Tensor:
    """For each token how many its sample reads."""
    return torch.tensor([s.read for s in stream.layout.spans])[stream.layout.info.sample.long()]


@pytest.mark.parametrize("core", CORES)
def test_the_two_backends_agree_in_states_and_gradients(make, core):
    model = make(core).double()
    stream = model.packer(PACK)
    rows_TD = double_rows(model, stream)
    found = {}
    push = torch.randn(len(stream), 32, dtype=torch.float64)
    for backend in ("dense", "runs"):
        model.zero_grad()
        leaf = rows_TD.clone().requires_grad_()
        state_TD = model.core(leaf, stream.position_TA, stream.layout, backend=backend)
        state_TD.backward(push)
        grads = {name: p.grad for name, p in model.core.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads.values())
        found[backend] = {"states": state_TD.detach(), "rows": leaf.grad, **grads}
    for name, value in found["dense"].items():
        torch.testing.assert_close(found["runs"][name], value, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def double_rows(model: mm.Model, stream: mm.stream.Stream) -> Tensor:
    content = {k: c.double() if c.is_floating_point() else c for k, c in stream.content.items()}
    rows = torch.cat([model.embed(kind, c) for kind, c in content.items()]).detach()
    assert stream.order_T is not None
    return rows[stream.order_T]


CASES = {
    "one sample": [(3, 5)],
    "equal": [(3, 5), (3, 5), (2, 4)],
    "unequal": [(1, 7), (4, 2), (6, 1)],
    "some read or write nothing": [(2, 0), (0, 3), (3, 4), (3, 0), (1, 1)],
}


def halves(case: Sequence[tuple[int, int]]) -> tuple[Layout, Layout]:
    """The written and the read half of samples of (written, read) tokens."""

    def layout(sizes: Sequence[int], free: int) -> Layout:
        rows = [(s, i, free, 0) for s, n in enumerate(sizes) for i in range(n)]
        return Layout(
            tuple(Span(n if free else 0, n, n if free else 0) for n in sizes),
            MaskInfo(*torch.tensor(rows, dtype=torch.int32).T),
        )

    return layout([q for q, _ in case], 0), layout([k for _, k in case], 1)


@BACKENDS
@pytest.mark.parametrize("case", CASES)
def test_cross_attention_is_pytorch_multihead_attention(case, backend):
    width, heads = 24, 4
    written, read = halves(CASES[case])
    mechanism = Mechanism(ScaledDotProduct(), None, Soft(), heads, width // heads)
    ours = Attention(width, heads, heads, mechanism, norm=None)
    theirs = nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    with torch.no_grad():
        ours.qkv.weight.copy_(theirs.in_proj_weight)
        ours.out.weight.copy_(theirs.out_proj.weight)
    sample_T, sample_M = written.info.sample, read.info.sample
    q_TD, k_MD = torch.randn(len(sample_T), width), torch.randn(len(sample_M), width)
    lone_T = ~(sample_T[:, None] == sample_M).any(1)

    def turns(count: int) -> Tensor:
        return rotations(torch.zeros(count, 3), *rotary_frequencies(width // heads, (2, 1, 1), (1e4, 1e2, 1e2)))

    inputs = [x.clone().requires_grad_() for x in (q_TD, k_MD)]
    plan = plan_cross_attention(written, read, backend=backend, cache=None)
    qkv = ours(inputs[0], turns(len(q_TD)), (inputs[1], turns(len(k_MD))))
    mine = ours.out(plan.attend(*qkv, ours.mechanism, 0).flatten(1))
    others = [x.clone().requires_grad_() for x in (q_TD, k_MD)]
    hidden = (sample_T[:, None] != sample_M)[~lone_T]
    other, _ = theirs(others[0][None, ~lone_T], others[1][None], others[1][None], attn_mask=hidden, need_weights=False)
    assert torch.count_nonzero(mine[lone_T]) == 0  # a sample that reads nothing adds nothing
    torch.testing.assert_close(mine[~lone_T], other[0], atol=1e-6, rtol=1e-5)
    push = torch.randn_like(mine)
    mine.backward(push)
    other[0].backward(push[~lone_T])
    for a, b in zip(inputs, others, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-6, rtol=1e-4)
    assert lone_T.any() == (case == "some read or write nothing")


def turned(x_THK: Tensor, position_TA: Tensor, core: mm.Core) -> Tensor:
    """Pairs turned by place / base ** (i / n), an axis after the other, with sines and cosines."""
    pairs = core.head_width // 2
    shares = [pairs * s // sum(core.rotary_split) for s in core.rotary_split]
    shares[0] += pairs - sum(shares)
    x_THK, pair = x_THK.clone(), 0
    for axis, share in enumerate(shares):
        for i in range(share):
            angle = position_TA[:, axis, None] * core.rotary_base[axis] ** (-i / share)
            a, b = x_THK[:, :, 2 * pair].clone(), x_THK[:, :, 2 * pair + 1].clone()
            x_THK[:, :, 2 * pair] = a * angle.cos() - b * angle.sin()
            x_THK[:, :, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
            pair += 1
    return x_THK


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attended(
    layer: Attention, core: mm.Core, q_TD: Tensor, k_MD: Tensor, q_place: Tensor, k_place: Tensor, causal: int | None
) -> Tensor:
    """One head and one query after the other; causal: how many tokens back a query sees, itself counted (None: all keys)."""
    rows, width = core.heads * core.head_width, core.head_width
    w_q, w_kv = layer.qkv.weight.double().split([rows, 2 * core.groups * width])
    q = (q_TD @ w_q.T).unflatten(1, (core.heads, width))
    k, v = (k_MD @ w_kv.T).unflatten(1, (2, core.groups, width)).unbind(1)
    if core.qk_norm:
        q, k = rms(q, layer.norm_q.weight.double()), rms(k, layer.norm_k.weight.double())
    q, k = turned(q, q_place, core), turned(k, k_place, core)
    out = torch.zeros_like(q)
    for t in range(len(q)):
        keys = range(len(k)) if causal is None else range(max(0, t - causal + 1), t + 1)
        for h in range(core.heads):
            g = h // (core.heads // core.groups)
            score = []
            for m in keys:
                dot = q[t, h] @ k[m, g]
                if isinstance(core.score, Cosine):
                    score.append(core.score.sharpness * dot / (q[t, h].norm() * k[m, g].norm()))
                else:
                    score.append(dot / math.sqrt(width))
            if score:
                share = torch.stack(score).softmax(0)
                out[t, h] = sum(share[i] * v[m, g] for i, m in enumerate(keys))
    return out.flatten(1) @ layer.out.weight.double().T


def writer_by_hand(
    two: TwoCores, memory: Tensor, read_at: Tensor, x: Tensor, written_at: Tensor, window: int
) -> Tensor:
    """The writer's blocks in float64 by the formulas; its places count from its own first token."""
    core = two.core.writer
    written_at = written_at - written_at[0] * torch.tensor([1.0, 0.0, 0.0])
    for block in two.writer.blocks:
        assert isinstance(block, Block)
        itself, across, mlp = block.layers
        h = rms(x, itself.norm.weight.double())
        x = x + attended(itself.body.attention, core, h, h, written_at, written_at, window)
        h = rms(x, across.norm.weight.double())
        x = x + attended(across.body.attention, core, h, memory, written_at, read_at, None)
        gate, up = (rms(x, mlp.norm.weight.double()) @ mlp.body.gate_up.weight.double().T).chunk(2, -1)
        x = x + (gate * gate.sigmoid() * up) @ mlp.body.down.weight.double().T
    return rms(x, two.writer.norm.weight.double())


@BACKENDS
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("reads", [True, False])
def test_the_whole_is_reader_then_writer_by_hand(make, lay, core, reads, backend):
    model = make(core)
    with torch.no_grad():
        for name, weight in model.core.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
        values = sample(2) if reads else {**sample(2), "image": None, "text": None}
        stream = model.packer([(WRITE, values)])
        rows_TD, read = model.rows(stream), stream.layout.spans[0].read
        position_TA = stream.position_TA
        state_TD = model.core(rows_TD, position_TA, stream.layout, backend=backend)
        two = core_of(model)
        memory = rows_TD[:0]
        if reads:  # the reader is a core like any other
            single = model.core.reader(rows_TD[:read], position_TA[:read], lay([[(read, True)]]), backend="dense")
            torch.testing.assert_close(state_TD[:read], single, atol=1e-5, rtol=0)
            memory = single
        places = position_TA.double()
        by_hand = writer_by_hand(
            two, memory.double(), places[:read], rows_TD[read:].double(), places[read:], 3 if core == "unlike" else 99
        )
    assert len(state_TD) - read == 4
    torch.testing.assert_close(state_TD[read:].double(), by_hand, atol=2e-5, rtol=0)


def uncached(model: mm.Model, task: str, values: dict, written: Sequence[int]) -> Tensor:
    given = {**values, "story": list(written)}
    with torch.no_grad():
        return model.logits(model.packer([(task, given)], answers=bool(written)), backend="dense")[task]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("task", [WRITE, NOTHING])
def test_the_cached_batch_writes_what_whole_passes_write(make, core, task):
    model = make(core)
    samples = [sample(i) for i in range(6)] + [{"image": None, "text": None}]
    logits: list[Tensor] = []
    answers = model.generate(task, samples, max_tokens=7)
    model.readout(task).linear.register_forward_hook(lambda module, args, out: logits.append(out.detach().clone()))
    ends = set()
    for values, answer in zip(samples, answers, strict=True):
        written: list[int] = []
        log_p = 0.0
        while True:
            row = uncached(model, task, values, written)[-1].double().log_softmax(-1)
            token = int(row.argmax())
            if token != 3 and len(written) == 7:
                ended = "max_tokens"
                break
            log_p += float(row[token])
            if token == 3:
                ended = "stop"
                break
            written.append(token)
        assert (answer.value, answer.ended) == (written, ended)
        assert math.log(answer.confidence) == pytest.approx(log_p, abs=1e-4)
        logits.clear()
        model.generate(task, [values], max_tokens=7)
        torch.testing.assert_close(torch.cat(logits), uncached(model, task, values, written), atol=1e-5, rtol=0)
        ends.add((len(written), ended))
    assert len(ends) > 1 or task == NOTHING


@pytest.mark.parametrize("core", CORES)
def test_what_is_read_matters_to_what_is_written_and_its_order_too(make, core):
    model = make(core)
    values, other = sample(2), {**sample(2), "text": sample(2)["text"][::-1]}
    a, b = (uncached(model, WRITE, v, [0, 1]) for v in (values, other))
    assert float((a - b).abs().max()) > 1e-3


def test_tasks_that_only_read_answer_at_once(make):
    model = make()
    samples = [sample(i) for i in range(5)]
    for task in (CLASS, ALIGN):
        together = model.predict(task, samples)
        for one, values in zip(together, samples, strict=True):
            alone = model.predict(task, [values])[0]
            assert one.value == alone.value
            assert one.confidence == pytest.approx(alone.confidence, rel=1e-4)
    assert len({a.confidence for a in model.predict(CLASS, samples)}) > 2


@pytest.mark.parametrize("core", CORES)
def test_save_and_load(make, core, tmp_path):
    model = make(core)
    model.save(tmp_path / "model")
    back = mm.Model.load(tmp_path / "model")
    assert back.core.core == CORES[core]
    stream = model.packer(PACK)
    with torch.no_grad():
        assert torch.equal(back(stream), model(stream))
    samples = [sample(i) for i in range(3)]
    assert [a.value for a in back.generate(WRITE, samples, max_tokens=5)] == [
        a.value for a in model.generate(WRITE, samples, max_tokens=5)
    ]
    more = model.extended(tasks=["text -> story"])
    assert more.core.core == CORES[core]
    with torch.no_grad():
        assert torch.equal(more(stream), model(stream))


@pytest.mark.parametrize(
    ("reader", "writer"),
    [
        ({"depth": 2, "heads": 4}, {"depth": 1, "heads": 2}),
        ({"depth": 1, "heads": 2, "qk_norm": False}, {"depth": 3, "heads": 4, "kv_heads": 2, "mlp_width": 48}),
        ({"depth": 1, "heads": 4}, {"depth": 2, "heads": 4, "kv_heads": 1, "qk_norm": False}),
    ],
)
def test_parameters_are_counted(reader, writer):
    core = mm.EncoderDecoder(reader=mm.Core(width=32, **reader), writer=mm.Core(width=32, **writer))
    assert core.parameters == sum(p.numel() for p in core.build().parameters())
    assert (core.width, core.depth) == (32, writer["depth"])


def test_cores_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"reader has width=32 and writer width=64; .* make them equal"):
        mm.EncoderDecoder(reader=mm.Core(width=32, depth=1, heads=2), writer=mm.Core(width=64, depth=1, heads=2))
    with pytest.raises(ConfigError, match="reader has width=64 and writer width=32"):
        CORES["alike"].replace(reader=mm.Core.tiny())
    with pytest.raises(ConfigError, match="EncoderDecoder has no setting 'width'"):
        CORES["alike"].replace(width=64)


def test_reading_on_after_the_prompt_is_refused(make):
    model = make()
    stream = model.packer([(WRITE, sample(0))], answers=False)
    cache = model.core.core.cache(rows=1, capacity=40)
    with torch.no_grad():
        model(stream, cache=cache)
        with pytest.raises(StreamError, match="EncoderDecoder: more to read came after the prompt"):
            model(stream, cache=cache)


def test_every_weight_learns(make):
    model = make().train()
    model.loss(model.packer(PACK)).backward()
    silent = [n for n, p in model.core.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert silent == []


@pytest.mark.parametrize("part", ["reader", "writer"])
def test_drop_path_leaves_out_whole_samples_where_some_lack_a_half(make, part, monkeypatch):
    model = make().train()
    for sublayer in getattr(model.core, part).sublayers():
        sublayer.drop_path = 0.5
    stream = model.packer(PACK)
    sizes = [s.read if part == "reader" else s.total - s.read for s in stream.layout.spans]
    assert 0 in sizes
    factors: list[Tensor] = []
    drop = Sublayer._drop

    def told(self: Sublayer, update_TD: Tensor, context: Context) -> Tensor:
        if self.drop_path:
            factors.append(drop(self, torch.ones_like(update_TD), context)[:, 0])
        return drop(self, update_TD, context)

    monkeypatch.setattr(Sublayer, "_drop", told)
    torch.manual_seed(0)
    for _ in range(8):
        model.loss(stream).backward()
    for factor_T in factors:
        assert all(len(set(mine.tolist())) <= 1 for mine in factor_T.split(sizes))
    lying = [start for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False) if size]
    drawn = torch.stack(factors)[:, lying]  # one column a sample that has this half
    assert set(drawn.flatten().tolist()) == {0.0, 2.0}
    assert len({tuple(column.tolist()) for column in drawn.T}) == len(lying)  # each sample has a draw of its own
