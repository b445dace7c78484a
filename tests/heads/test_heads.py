"""Heads: losses and answers against PyTorch's own, against enumeration, and against the sum over real targets."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import multimodal as mm
from multimodal.heads import Head, default_head
from multimodal.shapes import ConfigError, StreamError
from multimodal.tokenizer import Tokens, at_times
from multimodal_tokenizers import ImagePatches, Labels, TextBytes


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("head", [mm.Classify, mm.NextToken])
def test_class_losses_are_cross_entropy(head, smoothing):
    logits, target = torch.randn(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    mine = head(label_smoothing=smoothing).loss(logits, [1] * 6, target, [1] * 6)
    log_p = logits.double().log_softmax(-1)
    expected = 0.0
    for row, right in zip(log_p, target.tolist(), strict=True):
        for c in range(5):
            wanted = smoothing / 5 + (1 - smoothing) * (c == right)
            expected -= wanted * float(row[c])
    assert float(mine) == pytest.approx(expected, rel=1e-5)
    assert float(mine) == pytest.approx(6 * float(F.cross_entropy(logits, target, label_smoothing=smoothing)), rel=1e-5)


def test_several_labels_are_binary_decisions_averaged_over_classes():
    tokenizer = Labels(("a", "b", "c"), several=True)
    target = torch.cat([tokenizer.encode(v).content for v in (["a", "c"], [], ["b"])])
    logits = torch.randn(3, 3)
    mine = mm.Classify().loss(logits, [1] * 3, target, [1] * 3)
    p = logits.double().sigmoid()
    expected = (
        -sum(math.log(float(p[i, c]) if target[i, c] else 1 - float(p[i, c])) for i in range(3) for c in range(3)) / 3
    )
    assert float(mine) == pytest.approx(expected, rel=1e-5)


def test_one_answer_has_every_class_with_its_probability():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    first, second = mm.Classify().answer(logits, [1, 1], Labels(("a", "b", "c")))
    e = [math.exp(x) for x in (0, 2, 1)]
    assert first.value == "b"
    assert first.confidence == pytest.approx(e[1] / sum(e))
    assert first.probability == pytest.approx({"b": e[1] / sum(e), "c": e[2] / sum(e), "a": e[0] / sum(e)})
    assert list(first.probability) == ["b", "c", "a"]  # the likeliest first
    assert (second.value, str(second)) == ("a", "a")


def test_several_answers_are_those_above_one_half_in_the_order_of_the_labels():
    tokenizer = Labels(("a", "b", "c"), several=True)
    one, none = mm.Classify().answer(torch.tensor([[0.5, -3.0, 4.0], [-1.0, -2.0, -3.0]]), [1, 1], tokenizer)
    assert one.value == tokenizer.decode(tokenizer.encode(["c", "a"])) == ["a", "c"]  # so that `==` compares the sets
    assert none.value == []
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5, -3.0, 4.0)]
    assert one.probability == pytest.approx(dict(zip("abc", sigmoid, strict=True)))
    assert one.confidence == pytest.approx(sigmoid[0])  # the least sure decision
    assert none.confidence == pytest.approx(1 - 1 / (1 + math.exp(1)))


def test_next_token_targets_end_with_stop():
    tokenizer = TextBytes()
    target = mm.NextToken().target(tokenizer("hey"), 1, tokenizer)
    assert target.tolist() == [*b"hey", 256]
    assert mm.NextToken().vocab(tokenizer) == 257


def ctc_targets(lengths: list[int], classes: int) -> list[torch.Tensor]:
    return [torch.randint(0, classes, (n,)) for n in lengths]


def test_ctc_loss_is_pytorch_own_sample_by_sample():
    lengths, target_lengths, blank = [9, 4, 12, 5], [3, 4, 1, 2], 6
    targets = ctc_targets(target_lengths, blank)
    targets[1] = torch.tensor([0, 1, 2, 3])  # fills its four rows
    targets[3] = torch.tensor([5, 5])  # needs a blank between
    logits = torch.randn(sum(lengths), blank + 1, requires_grad=True)
    mine = mm.CTC().loss(logits, lengths, torch.cat(targets), target_lengths)
    mine.backward()
    other = logits.detach().clone().requires_grad_()
    total = torch.zeros(())
    for rows, target in zip(other.log_softmax(-1).split(lengths), targets, strict=True):
        total = total + F.ctc_loss(rows, target, (len(rows),), (len(target),), blank=blank, reduction="sum")
    total.backward()
    torch.testing.assert_close(mine, total)
    torch.testing.assert_close(logits.grad, other.grad, atol=1e-6, rtol=1e-5)


def collapsed(path: tuple[int, ...], blank: int) -> list[int]:
    return [s for s, _ in itertools.groupby(path) if s != blank]


@pytest.mark.parametrize("target", [[0], [0, 1], [1, 1], [0, 1, 0]])
def test_ctc_loss_is_the_sum_over_all_alignments(target):
    logits = torch.randn(4, 3)  # 4 rows, two symbols and the blank: 81 paths
    log_p = logits.double().log_softmax(-1)
    paths = [p for p in itertools.product(range(3), repeat=4) if collapsed(p, 2) == target]
    assert paths
    p = sum(math.exp(sum(float(log_p[t, c]) for t, c in enumerate(path))) for path in paths)
    mine = mm.CTC().loss(logits, [4], torch.tensor(target), [len(target)])
    assert float(mine) == pytest.approx(-math.log(p), rel=1e-5)


def test_ctc_reads_the_likeliest_path_and_collapses_it():
    tokenizer = TextBytes()
    a, b, blank = ord("a"), ord("b"), 256
    paths = [[a, a, blank, a, b, b, blank], [blank, blank], [b, a]]
    lengths = [len(p) for p in paths]
    logits = torch.cat([F.one_hot(torch.tensor(p), 257) * 20.0 for p in paths])
    answers = mm.CTC().answer(logits, lengths, tokenizer)
    assert [x.value for x in answers] == ["aab", "", "ba"]
    assert [x.value for x in answers] == [bytes(collapsed(tuple(p), blank)).decode() for p in paths]
    best = float(logits.double().softmax(-1).max())
    assert [x.confidence for x in answers] == pytest.approx([best**n for n in lengths], rel=1e-5)


@pytest.mark.parametrize(("text", "needed"), [("abc", 3), ("aab", 4), ("aaa", 5), ("a", 1)])
def test_ctc_knows_how_many_rows_a_target_needs(text, needed):
    tokenizer = TextBytes()
    assert mm.CTC().target(tokenizer(text), needed, tokenizer).tolist() == list(text.encode())
    with pytest.raises(
        StreamError, match=rf"{len(text)} symbols need at least {needed} rows .*context has {needed - 1}"
    ):
        mm.CTC().target(tokenizer(text), needed - 1, tokenizer)
    ids = torch.tensor(list(text.encode()))
    lost = F.ctc_loss(torch.zeros(needed, 257).log_softmax(-1), ids, (needed,), (len(ids),), blank=256, reduction="sum")
    assert math.isfinite(lost)
    if needed > 1:
        lost = F.ctc_loss(torch.zeros(needed - 1, 257), ids, (needed - 1,), (len(ids),), blank=256, reduction="sum")
        assert math.isinf(lost)


def test_default_heads():
    assert default_head(Labels(("a",))) == mm.Classify()
    assert default_head(Labels(("a",), several=True)) == mm.Classify()
    assert default_head(TextBytes()) == mm.NextToken()
    with pytest.raises(ConfigError, match="ImagePatches is continuous and declares no classes"):
        default_head(ImagePatches())


@pytest.mark.parametrize("head", [mm.NextToken(), mm.CTC()])
def test_writing_heads_refuse_what_has_no_vocabulary(head: Head):
    with pytest.raises(
        ConfigError,
        match=rf"{type(head).__name__} writes symbol after symbol, which ImagePatches is not: it has no vocabulary",
    ):
        head.vocab(ImagePatches())


def test_classify_refuses_what_has_no_classes():
    class Nothing(mm.Tokenizer):
        def encode(self, value: object) -> Tokens:
            return Tokens(torch.zeros(1), at_times(torch.zeros(1)))

    with pytest.raises(ConfigError, match="Classify: Nothing declares no vocab_size or feature_size"):
        mm.Classify().vocab(Nothing())


def test_next_token_does_not_answer_in_one_go():
    with pytest.raises(ConfigError, match=r"use Model\.generate"):
        mm.NextToken().answer(torch.zeros(1, 3), [1], TextBytes())


MANY = ["image -> label", mm.Task("text -> text", weight=0.3), mm.Task("sound -> story", mm.CTC(), weight=2.0)]


def batch_of_many(values) -> list[tuple[str, dict]]:
    tasks = ("image -> label", "text -> text", "sound -> story")
    samples = [values(i) for i in range(12)]
    return [(tasks[i % 3], {**s, "answer": s["story"], "story": "ab"}) for i, s in enumerate(samples)]


def gradients(model: mm.Model, batches: list) -> dict[str, torch.Tensor]:
    """As `fit` accumulates them: all micro-batches are divided by the targets of the whole step."""
    model.zero_grad()
    streams = [model.packer(batch) for batch in batches]
    counts: dict[str, int] = {}
    for stream in streams:
        for pattern, r in stream.readings.items():
            counts[pattern] = counts.get(pattern, 0) + r.count
    for stream in streams:
        model.loss(stream, counts=counts).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_one_batch_and_four_micro_batches_have_the_same_gradient(values, tokenizers, core, lively):
    model = lively(mm.Model(tokenizers, core, MANY))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    batch = batch_of_many(values)
    micro = [batch[:5], batch[5:6], batch[6:8], batch[8:]]  # unequal, and not every task in each
    whole, parts = gradients(model, [batch]), gradients(model, micro)
    assert whole.keys() == parts.keys()
    largest = max(float(g.abs().max()) for g in whole.values())
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6 * largest, rtol=1e-4, msg=name)
    wrong: dict[str, torch.Tensor] = {}  # a mean of means would be another gradient
    for part in micro:
        for name, grad in gradients(model, [part]).items():
            wrong[name] = wrong.get(name, torch.zeros_like(grad)) + grad / len(micro)
    assert max(float((wrong[n] - whole[n]).abs().max()) for n in whole) > 0.01 * largest


def test_the_loss_is_the_weighted_sum_of_means_over_real_targets(values, tokenizers, core, lively):
    model = lively(mm.Model(tokenizers, core, MANY))
    batch = batch_of_many(values)
    stream = model.packer(batch)
    with torch.no_grad():
        mine = float(model.loss(stream))
        by_task: dict[str, list[float]] = {}
        count: dict[str, int] = {}
        for task, sample in batch:  # alone, one by one
            one = model.packer([(task, sample)])
            by_task.setdefault(task, []).append(float(model.losses(one)[task]))
            count[task] = count.get(task, 0) + one.readings[task].count
    weight = {"image -> label": 1.0, "text -> text": 0.3, "sound -> story": 2.0}
    assert mine == pytest.approx(sum(weight[t] * sum(x) / count[t] for t, x in by_task.items()), rel=1e-5)
    assert count["image -> label"] == 4


def test_a_stream_without_answers_has_no_loss(values, tokenizers, core):
    model = mm.Model(tokenizers, core, ["text -> label"])
    stream = model.pack("text -> label", [values(0)], answers=False)
    with pytest.raises(StreamError, match="packed without answers; pack it with answers=True"):
        model.loss(stream)


@pytest.mark.parametrize("chunk", [2**20, 600], ids=["at once", "in chunks"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scale": 0.3},
        {"cap": 2.0},
        {"scale": 3.0, "cap": 2.0},
        {"start_ids": ()},
        {"start_ids": (7, 9)},
        {"bias": False},
    ],
    ids=str,
)
def test_the_loss_of_a_tied_head_is_cross_entropy_of_products_with_the_table(settings, smoothing, chunk, monkeypatch):
    """Losses and gradients, the table's twice: as what is read and as what is written."""
    monkeypatch.setattr("multimodal.heads.cross_entropy.CHUNK", chunk)
    head = mm.NextToken(tied=True, stop_id=0, label_smoothing=smoothing, **settings)
    core = mm.Core(width=16, depth=1, heads=2, norm=mm.core.Norm(eps=1e-5))
    model = mm.Model({"text": TextBytes(causal=True)}, core, [mm.Task("text -> text", head)])
    table, readout = model.embeds["text"].weight, model.readout("text -> text")
    with torch.no_grad():
        table.mul_(20)
        if head.bias:
            readout.linear.bias.normal_()
    stream = model.pack("text -> text", [{"text": "ab", "answer": "cde"}, {"text": "x", "answer": "longer"}])
    reading = stream.readings["text -> text"]
    weights = list(model.parameters())
    mine = torch.autograd.grad(model.losses(stream)["text -> text"], weights)
    logits = model(stream)[reading.row_N] @ table.T * head.scale
    # the bias is not scaled
    logits = logits if readout.linear.bias is None else logits + readout.linear.bias
    logits = logits if head.cap is None else head.cap * (logits / head.cap).tanh()
    target = torch.tensor([*b"cde", 0, *b"longer", 0])
    by_sample = dict(zip(reading.samples, reading.target.split(list(reading.target_lengths)), strict=True))
    assert torch.cat([by_sample[0], by_sample[1]]).tolist() == target.tolist()
    wanted = F.cross_entropy(logits, reading.target, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(model.losses(stream)["text -> text"], wanted, atol=1e-4, rtol=1e-5)
    for got, expected in zip(mine, torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
