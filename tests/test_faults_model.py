"""Faults of the model's own numerics, by their numbers in FAULTS.md: each of these tests failed before its fault was mended."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multimodal as mm
from multimodal.check import verify
from multimodal.layers import Add, Body, Concat, Context, Gated, Layer, Merge, Replace
from multimodal.masks import PREFIX_LM, InTurn, MaskInfo, Prior, Rule
from multimodal_tokenizers import AudioFrames, Features, ImagePatches, Labels, TextBytes


@dataclass(frozen=True)
class FirstSample(Rule):
    """A rule of one's own that asks which sample of the pack a token is of."""

    def allows(self, q: MaskInfo, k: MaskInfo) -> Tensor:
        return (q.sample == 0) & (k.order <= q.order + 2)


@dataclass(frozen=True)
class Numbered(Prior):
    """A prior of one's own that grows with the number of the sample."""

    def log_prior(self, pairs: Any, q_BTHK: Tensor, weights: Any) -> Tensor:
        return (-0.3 * (pairs.q.sample - pairs.k.sample).abs() - 0.1 * pairs.k.order.float() * pairs.q.sample)[:, None]


RULES = [
    mm.masks.SameSample(),
    mm.masks.SameSegment(),
    mm.masks.Causal(),
    mm.masks.Prefix(),
    InTurn(),
    mm.masks.Window(2),
    mm.masks.Chunked(2),
    ~mm.masks.SameSample(),
    FirstSample(),
]
SLOTS = 4


def _rule(draw: random.Random) -> Rule:
    a, b = draw.choice(RULES), draw.choice(RULES)
    return draw.choice([a, a & b, a | b, ~a, ~(a & b) | b])


def _prior(draw: random.Random, *more: Prior) -> Prior | None:
    """One prior or the sum of two, or none."""
    parts = [mm.attention.ALiBi(), mm.attention.RelativeBias(2), mm.attention.PredictedWindow(1.5), Numbered(), *more]
    one, two = (draw.choice([*parts, _rule(draw), _rule(draw)]) for _ in range(2))
    return draw.choice([None, one, one + two, _rule(draw)])


def _core(draw: random.Random, *cross: mm.layers.CrossAttention) -> mm.Core:
    memory = mm.layers.PersistentMemory(slots=SLOTS, prior=_prior(draw, mm.attention.MixingWeights(SLOTS)))
    block = (mm.layers.SelfAttention(prior=_prior(draw)), *cross, memory)
    return mm.Core(width=16, depth=1, heads=2, block=block, mask=draw.choice([_rule(draw), PREFIX_LM]))


def _varied(model: mm.Model) -> mm.Model:
    """In float64, with weights so large that every difference shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.double().parameters():
            if weight.dim():
                weight.normal_(std=0.4, generator=generator)
    return model.eval()


TEXTS = ["ab", "b", "cdefg", "bcd"]


def _apart(model: mm.Model, backend: str = "auto") -> float:
    """The largest difference of a logit between a sample alone and the same sample in a pack."""
    task = "story note -> out:text"
    samples = [
        {"story": t, "note": None if i % 2 else t[::-1] + "xy", "out": t[: 1 + i % 2]} for i, t in enumerate(TEXTS)
    ]
    with torch.no_grad():
        packed = model.pack(task, samples)
        together = model.logits(packed, backend=backend)[task].split(packed.readings[task].lengths)
        alone = [model.logits(model.pack(task, [samples[i]]), backend=backend)[task] for i in range(len(samples))]
    assert len({float(x.abs().sum()) for x in alone}) == len(alone)
    order = packed.readings[task].samples
    return max(float((alone[i] - part).abs().max()) for i, part in zip(order, together, strict=True))


KINDS = {"story": TextBytes(), "note": TextBytes(causal=True), "text": TextBytes()}


def test_fault_66_a_memory_under_any_rule_answers_packed_samples_as_it_answers_them_alone() -> None:
    """Of 12 random models, plain and of two cores, each with rules that ask of samples, fields, order and what is free."""
    for number in range(12):
        draw = random.Random(number)
        core: mm.Core | mm.EncoderDecoder = _core(draw)
        if number % 2:
            core = mm.EncoderDecoder(
                reader=_core(draw), writer=_core(draw, mm.layers.CrossAttention(prior=_prior(draw)))
            )
        model = _varied(mm.Model(KINDS, core, ["story note -> out:text"]))
        assert _apart(model) < 1e-9, core
        assert _apart(model, "dense") < 1e-9, core


def test_fault_66a_slots_are_of_every_sample_under_same_sample() -> None:
    """A memory under SameSample is a memory without a rule, in the first sample of a pack and in the last."""
    blocks = [
        (mm.layers.PersistentMemory(slots=SLOTS, prior=prior),)
        for prior in (None, mm.masks.SameSample(), ~mm.masks.SameSample())
    ]
    found = []
    for block in blocks:
        model = _varied(mm.Model(KINDS, mm.Core(width=16, depth=1, heads=2, block=block), ["story -> text"]))
        stream = model.pack("story -> text", [{"story": t, "text": t} for t in TEXTS])
        with torch.no_grad():
            found.append(model.logits(stream)["story -> text"])
    torch.testing.assert_close(found[1], found[0])
    assert all((found[2] - found[0]).abs().amax(1) > 1e-3)  # and nobody sees them where no sample is one's own


@dataclass(frozen=True)
class Shut(Layer):
    """A layer of one's own whose update is 0 at first; its weights carry names like those of shipped layers."""

    merge: Merge = field(default_factory=Add)

    def build(self, core: Any, width: int) -> Body:
        return _Shut(width)


class _Shut(Body):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.fanout, self.down, self.query = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.inner_qkv, self.my_gate_up = nn.Linear(width, width), nn.Linear(width, width)
        for part in self.children():
            nn.init.constant_(part.weight, 0.5 if part is self.query else 0.0)  # type: ignore[arg-type]

    def forward(self, stream_TD: Tensor, context: Context) -> Tensor:
        return self.fanout(stream_TD)


def test_fault_23_weights_of_a_layer_of_ones_own_stay_as_it_made_them() -> None:
    core = mm.Core(
        width=16,
        depth=2,
        heads=2,
        block=(mm.layers.SelfAttention(), Shut(), mm.layers.MLP(), mm.layers.PersistentMemory(slots=3)),
    )
    model = mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, core, ["text -> label"])
    for block in model.core.blocks:  # type: ignore[union-attr]
        attention, shut, mlp, memory = (layer.body for layer in block.layers)  # type: ignore[union-attr]
        assert all(not part.weight.any() for name, part in shut.named_children() if name != "query")
        assert (shut.query.weight == 0.5).all()
        begins = attention.attention.qkv, mlp.gate_up, memory.query  # those that we ship are drawn as before
        assert all(float(part.weight.detach().std()) == pytest.approx(0.02, rel=0.2) for part in begins)
        ends = attention.attention.out, mlp.down, memory.out
        assert all(float(part.weight.detach().std()) == pytest.approx(0.01, rel=0.2) for part in ends)


PRECISIONS = [torch.bfloat16, torch.float16, "autocast"]


def _rows(tokenizer: ImagePatches, picture: Tensor, precision: torch.dtype | str) -> Tensor:
    model = mm.Model({"image": tokenizer, "label": Labels(("a", "b"))}, mm.Core.tiny(), ["image -> label"])
    with torch.no_grad():
        if tokenizer.position == "learned":
            model.embeds["image"].learned.grid_DYX.normal_(generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr]
    model = model if precision == "autocast" else model.to(precision)  # type: ignore[arg-type]
    stream = model.pack("image -> label", [{"image": picture, "label": "a"}])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        return model.embed("image", stream.content["image"]).float()


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_fault_21_neighbouring_patches_stay_apart_in_half_precision(precision: torch.dtype | str) -> None:
    """700 equal patches side by side: no two neighbours are embedded alike, and all nearly as in float32."""
    strip = torch.full((1, 4, 4 * 700), 0.5)
    for position, apart in (("sincos", 0.5), ("learned", 0.0)):
        tokenizer = ImagePatches(patch=4, channels=1, position=position)  # type: ignore[arg-type]
        rows = _rows(tokenizer, strip, precision)
        assert len(rows) == 700
        assert (rows.diff(dim=0).norm(dim=1) >= apart).all()
        torch.testing.assert_close(rows, _rows(tokenizer, strip, torch.float32), atol=0.02, rtol=0.01)


def test_fault_21a_the_times_of_a_flow_stay_apart_in_bfloat16() -> None:
    head = mm.FlowMatching(width=16, depth=1)
    readout = head.readout(16, ImagePatches(patch=4, channels=1, size=(8, 8)))
    for weight in readout.parameters():
        nn.init.normal_(weight, std=0.5)
    readout = readout.bfloat16()
    x_NF, condition_NF = torch.zeros(1, 16), torch.zeros(1, 16, dtype=torch.bfloat16)
    moves = [readout.velocity(x_NF, torch.tensor([[t]]), condition_NF) for t in (0.75, 0.751, 0.752)]  # type: ignore[operator]
    assert len({tuple(move[0].tolist()) for move in moves}) == 3


NARROW = (
    mm.zoo.TemporalConv(filters=4),
    mm.layers.SelfAttention(heads=1, key_width=6, value_width=5, out=5, merge=Concat()),
)
HALF: dict[str, mm.Core | mm.EncoderDecoder] = {
    "plain": mm.Core(width=16, depth=2, heads=4, kv_heads=2, dropout=0.1, drop_path=0.1),
    "all layers": mm.Core(
        width=16,
        depth=1,
        heads=2,
        block=(
            mm.layers.Recurrent(cell="lstm", both_ways=True, merge=Gated()),
            mm.zoo.TuringMachine(slots=6, slot_width=4, hidden=8),
            mm.layers.PersistentMemory(slots=5, prior=mm.attention.MixingWeights(5)),
            mm.layers.Recurrent(hidden=7, merge=Replace()),
            *NARROW,
            mm.layers.MLP(),
        ),
    ),
    "convolutions": mm.Core(width=16, depth=2, heads=2, block=NARROW),
    "two cores": mm.EncoderDecoder(
        reader=mm.Core(width=16, depth=1, heads=2, block=(*NARROW, mm.layers.MLP())),
        writer=mm.Core(
            width=16,
            depth=1,
            heads=2,
            score=mm.attention.Additive(),
            prior=mm.attention.ALiBi() + mm.attention.RelativeBias(3),
        ),
        last=3,
    ),
    "scores": mm.Core(
        width=16,
        depth=1,
        heads=2,
        score=mm.attention.Gaussian(),
        prior=mm.attention.PredictedWindow(2.0, renormalise=False),
    ),
}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_fault_74_every_layer_takes_every_kind_in_half_precision(name: str, precision: torch.dtype | str) -> None:
    """A step and an answer: pictures with added, learned and no places, sound, features, text, labels, codes, flows, pointers."""
    patches = ImagePatches(patch=4, channels=1)
    pictures = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    kinds: dict[str, mm.Tokenizer] = {
        "image": patches,
        "grid": ImagePatches(patch=4, channels=1, position="learned", grid=4),
        "bare": ImagePatches(patch=4, channels=1, position="rotary"),
        "drawn": ImagePatches(patch=4, channels=1, size=(8, 8)),
        "sound": AudioFrames(rate_hz=8000, mels=8, stack=2),
        "rows": Features(3, stack=2, hidden=8),
        "text": TextBytes(),
        "label": Labels(("a", "b")),
        "tags": Labels(("a", "b"), several=True),
    }
    tasks = [
        "image text -> label",
        "grid rows -> text",
        "bare label -> tags",
        "image <-> text",
        mm.Task("sound -> words:text", mm.CTC()),
        mm.Task("label -> drawn", mm.FlowMatching(width=16, depth=1, steps=2)),
        mm.Task("text -> out:text", mm.Pointer()),
    ]
    model = mm.Model(kinds, HALF[name], tasks)
    model = model if precision == "autocast" else model.to(precision)  # type: ignore[arg-type]
    sound = torch.sin(torch.arange(1200.0)) * 0.1
    samples = [
        {"image": p, "grid": p, "bare": p, "drawn": p, "sound": (sound, 8000), "rows": torch.rand(6, 3), "text": "abc"}
        | {"label": "a", "tags": ["b"], "words": "hi", "out": "cb"}
        for p in pictures
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        model.train()
        loss = model.loss(model.packer([(task, sample) for task in model.tasks for sample in samples]))
        loss.backward()
        assert torch.isfinite(loss)
        model.eval()
        model.vectors("image <-> text", samples, side="left")
        for task in model.tasks:
            if "<->" not in task:
                assert len(model.generate(task, samples, max_tokens=3)) == 2


def test_fault_75_values_of_any_width_beside_any_number_of_heads() -> None:
    """Odd values beside odd numbers of heads: packed = alone, and cached = read in one pass."""
    for width, heads, qk_norm in ((1, 1, False), (5, 3, False), (5, 1, True)):
        block = (mm.layers.SelfAttention(value_width=width, heads=3, kv_heads=heads, key_width=6), mm.layers.MLP())
        core = mm.Core(width=12, depth=1, heads=1, qk_norm=qk_norm, block=block)
        result = verify(mm.Model({"text": TextBytes()}, core, ["text -> out:text"]))
        assert result.passed, str(result)


def test_fault_75a_an_odd_key_width_is_refused_where_places_turn_it() -> None:
    def core(**settings: Any) -> mm.Core:
        return mm.Core(width=16, depth=1, heads=2, block=(mm.layers.SelfAttention(key_width=5),), **settings)

    with pytest.raises(
        mm.ConfigError, match=r"SelfAttention: key_width=5 is odd, .*; try key_width=6, or a core with rot"
    ):
        core().build()
    kinds = {"text": TextBytes()}
    assert verify(mm.Model(kinds, core(rotary_split=(0, 0, 0)), ["text -> out:text"])).passed


@pytest.mark.parametrize("repeats", [False, True])
def test_fault_68_pointers_at_tokens_that_were_read_twice_pass(repeats: bool) -> None:
    """Twins within a field and across two fields of one kind."""
    for seed in (2, 4):
        model = mm.Model(
            {"text": TextBytes()},
            mm.Core(width=32, depth=1, heads=2),
            [mm.Task("text s:text -> o:text", mm.Pointer(repeats=repeats))],
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(std=0.3, generator=generator)
        samples = [{"text": t, "s": t[::-1]} for t in ("aabb", "abab", "aaaa", "bca")]
        result = verify(model, {"text s:text -> o:text": samples})
        assert result.passed, str(result)


def test_fault_49_what_is_allowed_stands_beside_what_was_found() -> None:
    model = mm.Model({"text": TextBytes(), "label": Labels(("a", "b"))}, mm.Core.tiny(), ["text -> label"])
    result = verify(model)
    found = next(row for row in result.rows if row.difference and row.check != "gradient")
    assert f"{found.difference:.1e} of {found.allowed:.1e}" in str(result)


@dataclass(frozen=True)
class Mixing(TextBytes):
    """Every row gets a share of the mean of all rows of the stream."""

    share: float = 0.0

    def embed(self, width: int) -> nn.Module:
        table = super().embed(width)
        table.register_forward_hook(lambda module, given, rows: rows + self.share * rows.mean(0))
        return table


def test_fault_86_rounding_of_large_weights_is_no_failure() -> None:
    """Models whose large weights make rounding grow pass; with a leak of a few times the rounding they do not."""

    def large(seed: int, std: float, text: TextBytes) -> mm.Model:
        core = mm.Core(width=32, depth=12, heads=4, qk_norm=False)
        model = mm.Model({"label": Labels(tuple("abcd")), "text": text}, core, ["text -> label"])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(std=std, generator=generator)
        return model

    for seed, std in ((0, 2.0), (11, 3.0)):
        result = verify(large(seed, std, TextBytes()))
        assert result.passed, str(result)
    leak = verify(large(0, 2.0, Mixing(share=1e-3)))
    assert "packed" in {row.check for row in leak.failures}
