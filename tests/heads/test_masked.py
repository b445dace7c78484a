"""The head that rebuilds what is hidden: its loss against formulas, what is hidden, and that nothing hidden is seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import head_checks, verify
from multimodal.data import Batches
from multimodal.heads import Readout
from multimodal.heads.masked import Masked
from multimodal.shapes import ConfigError, StreamError, TaskError
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal_tokenizers import AudioFrames, Features, ImagePatches, Labels, TextBytes

IMAGE, TEXT, SOUND, MIXED = "image -> image", "story -> story", "sound -> sound", "image sound text -> sound"
TASKS = [
    mm.Task(IMAGE, Masked(0.6, normalise="token")),
    mm.Task(TEXT, Masked(0.4)),
    mm.Task(SOUND, Masked(0.5, span=2)),
    mm.Task(MIXED, Masked(0.5, span=2)),
    "image sound text -> label",
]
PICTURES = ImagePatches(patch=4, channels=1)


def hiding() -> mm.packer.Packer:
    return mm.packer.Packer({"text": TextBytes()}, [mm.Task("text -> text", Masked(0.5))])


def sounds(*seconds: float) -> list[Any]:
    """Tones that go up."""
    times = [np.arange(int(8000 * s)) / 8000 for s in seconds]
    return [(np.float32(0.3 * np.sin(2 * np.pi * (300 + 900 * t) * t)), 8000) for t in times]


def target(stream: mm.stream.Stream, task: str) -> torch.Tensor:
    found = stream.readings[task].target
    assert found is not None
    return found


def values(number: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(number)
    image = random.random((8 + 4 * number, 16)).astype(np.float32)
    text = f"some words, and then {number}"
    return {"image": image, "text": text, "story": text[::-1], "sound": sounds(0.5 + 0.1 * number)[0], "label": "star"}


@pytest.fixture
def model(tokenizers, core, lively) -> mm.Model:
    return lively(mm.Model(tokenizers, core, TASKS))


def test_the_loss_is_the_formula():
    random = torch.Generator().manual_seed(0)
    content = torch.randint(256, (9,), generator=random)
    ids, places = Tokens(content, torch.zeros(9, 3)), torch.zeros(5, 3)
    logits = torch.randn(9, 256, generator=random)
    head, text = Masked(0.5), TextBytes()
    target = head.target(ids, 3, text)
    wanted = -sum(float(row[c] - row.exp().sum().log()) for row, c in zip(logits.double(), ids.content, strict=True))
    assert float(head.loss(logits, [9], target, [9])) == pytest.approx(wanted, rel=1e-5)
    features = torch.randn(5, PICTURES.feature_size, generator=random) * 3 + 1
    said = torch.randn(5, 16, generator=random)
    assert head.vocab(PICTURES) == 16  # the row and column behind the pixels are known
    for normalise in ("none", "token"):
        head = Masked(0.5, normalise=normalise)
        target = head.target(Tokens(features, places), 3, PICTURES)
        pixels = features[:, :16].double().numpy()
        if normalise == "token":
            pixels = (pixels - pixels.mean(1, keepdims=True)) / np.sqrt(pixels.var(1, keepdims=True) + 1e-6)
        wanted = sum(np.mean((a - b) ** 2) for a, b in zip(said.double().numpy(), pixels, strict=True))
        assert float(head.loss(said, [2, 3], target, [2, 3])) == pytest.approx(wanted, rel=1e-5)
        torch.testing.assert_close(head.row_losses(said, target).sum(), head.loss(said, [2, 3], target, [2, 3]))


@pytest.mark.parametrize("task", [IMAGE, TEXT, SOUND, MIXED])
def test_nothing_hidden_is_seen(task: str, model: mm.Model):
    """Changing what is hidden, and nothing else, changes no bit of any state; gradients by it are 0, by what is seen not."""
    field = model.packer.patterns[task].writes
    tokenizer = model.packer.tokenizers[field.kind]
    whole = tokenizer(values()[field.name])
    torch.manual_seed(3)
    hidden_N = model.packer.head(task).hidden(whole, tokenizer.step, random=True)
    assert 0 < int(hidden_N.sum()) < len(whole)

    def packed(content: torch.Tensor):
        torch.manual_seed(3)
        sample = {**values(), field.name: Tokens(content, whole.position_NA)}
        return model.packer([(task, sample), (task, values(1))], random=True)

    other = (whole.content + 1) % 256 if whole.content.dim() == 1 else whole.content * 0.5 + 0.25
    hidden_too = hidden_N.reshape(-1, *[1] * (other.dim() - 1))
    first = packed(whole.content)
    changed, seen_changed = (packed(torch.where(which, other, whole.content)) for which in (hidden_too, ~hidden_too))
    with torch.no_grad():
        assert torch.equal(model(first), model(changed))
        assert not torch.equal(model(first), model(seen_changed))
    assert not torch.equal(target(first, task), target(changed, task))
    assert first.readings[task].hidden == ()  # the loss gets a target, and nothing else
    if whole.content.is_floating_point():
        content = whole.content.clone().requires_grad_()
        (model(packed(content)).square().sum()).backward()
        assert content.grad is not None
        assert not content.grad[hidden_N].any()
        assert content.grad[~hidden_N].any(1).all()


def test_hidden_tokens_keep_their_places_and_later_fields_theirs(model: mm.Model):
    """Seen and hidden together have the places of the same fields when nothing is hidden."""
    plain = model.packer([("image sound text -> label", values())]).position_TA
    tokens = {name: model.packer.tokenizers[name](values()[name]) for name in ("image", "sound", "text")}
    counts = [len(t) for t in tokens.values()]
    for seed in range(4):  # the last token of the sound is hidden in some
        torch.manual_seed(seed)
        stream = model.packer([(MIXED, values())], random=True)
        torch.manual_seed(seed)
        hidden_N = TASKS[3].head.hidden(tokens["sound"], model.packer.tokenizers["sound"].step, random=True)
        n = len(hidden_N)
        found = torch.empty(n, 3)
        seen = int((~hidden_N).sum())
        found[~hidden_N] = stream.position_TA[counts[0] : counts[0] + seen]
        found[hidden_N] = stream.position_TA[len(stream) - (n - seen) :]
        torch.testing.assert_close(found, plain[counts[0] : counts[0] + n])
        text = stream.position_TA[counts[0] + seen :][: counts[2]]
        torch.testing.assert_close(text, plain[counts[0] + n :][: counts[2]])
        assert stream.readings[MIXED].row_N.tolist() == list(range(len(stream) - (n - seen), len(stream)))


def test_a_causal_kind_is_read_in_both_directions(model: mm.Model):
    stream = model.packer([(TEXT, values())])
    rows = model.rows(stream).detach().requires_grad_()
    states = model.core(rows, stream.position_TA, stream.layout)
    hidden = stream.readings[TEXT].row_N
    for state in (states[0], states[hidden[0]]):
        (gradient,) = torch.autograd.grad(state.sum(), rows, retain_graph=True)
        assert gradient.abs().sum(1).all()


@pytest.mark.parametrize(("count", "share", "span"), [(10, 0.75, 1), (7, 0.15, 1), (40, 0.5, 5), (41, 0.3, 4)])
def test_every_token_is_hidden_with_the_share(count: int, share: float, span: int):
    torch.manual_seed(0)
    step = 0.04
    tokens = Tokens(torch.zeros(count, 2), mm.at_times(torch.arange(count) * step))
    draws = 1500
    drawn = torch.stack([Masked(share, span).hidden(tokens, (step, 1, 1), random=True) for _ in range(draws)])
    error = 4.5 * (share * (1 - share) / draws) ** 0.5
    assert float((drawn.float().mean(0) - share).abs().max()) < error
    assert (drawn[:, 1:] != drawn[:, :-1]).any(0).all()  # a span may begin anywhere
    for hidden_N in drawn[:200].tolist():
        runs = "".join("x" if h else "." for h in hidden_N).strip("x").split(".")  # at the ends they may be cut
        assert all(len(run) % span == 0 for run in runs if run)
    if span == 1:  # as many as the share says, up to what a whole token cannot
        assert set(drawn.sum(1).tolist()) <= {int(share * count), int(share * count) + 1}


def test_spans_of_pictures_are_squares():
    tokens = PICTURES(np.zeros((32, 32), np.float32))
    torch.manual_seed(0)
    for _ in range(50):
        grid = Masked(0.5, span=2).hidden(tokens, PICTURES.step, random=True).reshape(8, 8).tolist()
        tops = [y for y in range(1, 8) if grid[y] != grid[y - 1]]  # rows where another row of squares begins
        sides = [x for x in range(1, 8) if any(row[x] != row[x - 1] for row in grid)]
        assert len({y % 2 for y in tops}) <= 1
        assert len({x % 2 for x in sides}) <= 1
        assert tops
        assert sides


def test_short_values_are_hidden_in_part_too():
    for count in (2, 3, 5):
        tokens = Tokens(torch.zeros(count, 1), mm.at_times(torch.arange(count)))
        for share in (0.01, 0.99):
            some = [int(Masked(share, span=10).hidden(tokens, (1, 1, 1), random=True).sum()) for _ in range(50)]
            assert 0 < min(some) <= max(some) < count
    together = Tokens(torch.zeros(6, 1), torch.zeros(6, 3))  # all in one place: no span can part them
    assert 0 < int(Masked(0.5, span=3).hidden(together, (1, 1, 1), random=True).sum()) < 6


def test_what_is_hidden_is_drawn_anew_in_training_and_fixed_otherwise(model: mm.Model):
    def places(stream: mm.stream.Stream) -> list[list[float]]:
        return stream.position_TA[stream.readings[IMAGE].row_N[: stream.readings[IMAGE].lengths[0]]].tolist()

    alone = places(model.pack(IMAGE, [values()]))
    before = torch.get_rng_state()
    assert places(model.pack(IMAGE, [values(), values(1)])) == alone
    assert torch.equal(torch.get_rng_state(), before)
    assert len({str(places(model.packer([(IMAGE, values())], random=True))) for _ in range(20)}) > 10

    def trained(seed: int) -> list[list[list[float]]]:
        batches = Batches(model.packer, {IMAGE: [values()]}, batch=1, seed=seed)
        return [places(batches[step].streams[0]) for step in range(6)]

    assert trained(0) == trained(0) != trained(1)
    assert len({str(p) for p in trained(0)}) > 3  # the same picture, six times round


PART_OF_A_HEAD = [
    (Masked(0.6, normalise="token"), PICTURES, [np.linspace(0, i, 64 * i).reshape(8, -1) / 4 for i in (1, 2, 3, 4)]),
    (Masked(0.5, span=3), AudioFrames(rate_hz=8000, mels=16), sounds(0.5, 0.6, 0.6, 0.9)),
    (Masked(0.3), TextBytes(causal=True), ["hello there", "masked", "sev", "a few words"]),
]


@pytest.mark.parametrize("check", [c for case in PART_OF_A_HEAD for c in head_checks(*case)], ids=str)
def test_it_keeps_the_promises_of_a_head(check: Callable[[], None]):
    check()


def test_verify_knows_it(model: mm.Model):
    report = verify(model)
    assert report.passed, str(report)
    assert set(report.samples) >= {IMAGE, TEXT, SOUND, MIXED, f"{MIXED} (only sound)"}
    assert f"{MIXED} (only image)" not in report.samples


def test_predict_fills_in_what_was_hidden(model: mm.Model, tmp_path):
    for task in (IMAGE, TEXT, SOUND):
        field = model.packer.patterns[task].writes
        tokenizer, value = model.packer.tokenizers[field.kind], values()[field.name]
        answer = model.predict(task, **{field.name: value})
        whole = tokenizer(value)
        hidden_N = model.packer.head(task).hidden(whole, tokenizer.step, random=False)
        assert torch.equal(answer.tokens.content[~hidden_N], whole.content[~hidden_N])
        stream = model.pack(task, [{field.name: value}], answers=False)
        with torch.no_grad():
            logits = model.logits(stream)[task]
        if task == TEXT:
            assert answer.tokens.content[hidden_N].tolist() == logits.argmax(1).tolist()
            assert answer.confidence == pytest.approx(float(logits.softmax(1).amax(1).prod()), rel=1e-4)
        elif task == SOUND:
            torch.testing.assert_close(answer.tokens.content[hidden_N], logits)
        else:
            picture = tokenizer.decode(whole)
            patches = hidden_N.reshape(2, 4).repeat_interleave(4, 0).repeat_interleave(4, 1)
            assert torch.equal(answer.value[0][~patches], picture[0][~patches])
            seen = whole.content[~hidden_N, :16]
            wanted = logits * (seen.var(1, correction=0) + 1e-6).sqrt().mean() + seen.mean()
            torch.testing.assert_close(answer.tokens.content[hidden_N, :16], wanted)
            assert torch.equal(answer.tokens.content[:, 16:], whole.content[:, 16:])
    again = mm.Model.load(model.save(tmp_path / "saved"))
    assert again.packer.head(SOUND) == TASKS[2].head
    assert again.predict(TEXT, story="just a story").value == model.predict(TEXT, story="just a story").value


def bars(number: int) -> dict[str, np.ndarray]:
    """Upright bars: whatever is hidden can be told from what is seen."""
    widths = np.random.default_rng(number).random(8) < 0.5
    return {"image": np.tile(np.float32(widths), (8, 1))}


def test_training_beats_the_mean_and_the_weights_go_on(lively):
    data = [bars(i) for i in range(64)]
    tokenizer = ImagePatches(patch=2, channels=1)
    model = mm.Model({"image": tokenizer}, mm.Core(width=32, depth=2, heads=2), [mm.Task(IMAGE, Masked(0.5))])
    mm.fit(model, {IMAGE: data}, steps=120, batch=16, lr=1e-2, quiet=True, device="cpu", precision="float32")
    unseen = [bars(1000 + i) for i in range(32)]
    stream = model.pack(IMAGE, unseen)
    with model.inference_mode():
        loss = float(model.loss(stream))
    mean = float(target(stream, IMAGE).var(0, correction=0).mean())
    assert mean > 0.9
    assert loss < 0.5 * mean

    labelled = model.extended({"label": Labels(("a", "b"))}, ["image -> label"])
    new = labelled.state_dict()
    assert all(torch.equal(new[name], weight) for name, weight in model.state_dict().items())
    mm.fit(
        labelled, {"image -> label": [{**x, "label": "ab"[i % 2]} for i, x in enumerate(data[:8])]}, steps=2, quiet=True
    )


class One(Tokenizer):
    feature_size = 1

    def encode(self, value: Any) -> Tokens:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Masked(0.0), ConfigError, "share=0.0 must be between 0 and 1"),
        (lambda: Masked(1.0), ConfigError, "share=1.0 must be between 0 and 1"),
        (lambda: Masked(0.5, span=0), ConfigError, "span=0 hides nothing"),
        (lambda: mm.override(Masked(0.5), normalise="patch"), ConfigError, "normalise='patch' is none of none, token"),
        (lambda: Masked(0.5).vocab(Labels(("a",))), ConfigError, "a value of Labels is a single token"),
        (lambda: Masked(0.5).vocab(Labels(("a",), several=True)), ConfigError, "a value of Labels is a single token"),
        (lambda: Masked(0.5, normalise="token").vocab(One()), ConfigError, "the single feature of One"),
        (
            lambda: mm.packer.Packer({"text": TextBytes()}, [mm.Task("seen:text -> text", Masked(0.5))]),
            TaskError,
            "does not read 'text'.*'text -> text'",
        ),
        (
            lambda: mm.packer.Packer({"text": TextBytes()}, [mm.Task("-> text", Masked(0.5))]),
            TaskError,
            "does not read 'text'",
        ),
        (
            lambda: hiding()([("text -> text", {"text": "a"})]),
            StreamError,
            "sample 0 of task 'text -> text': field 'text': Masked: a value of one token",
        ),
        (
            lambda: hiding()([("text -> text", {"text": None})]),
            StreamError,
            "sample 0 of task 'text -> text': field 'text' is None, but it is what Masked hides",
        ),
        (
            lambda: Masked(0.5).answer(torch.zeros(1, 256), [1], TextBytes()),
            ConfigError,
            "use Model.predict",
        ),
        (
            lambda: mm.Model(
                {"text": TextBytes()},
                mm.Core(width=16, depth=1, heads=2, rotary_split=(0, 0, 0)),
                [mm.Task("text -> text", Masked(0.5))],
            ),
            ConfigError,
            "rotary_split is not all 0",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(make: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()


def test_the_linear_layer_is_all_it_learns_beside_its_query():
    readout = Masked(0.5).readout(8, Features(features=3))
    assert isinstance(readout, Readout)
    assert {name: tuple(p.shape) for name, p in readout.named_parameters()} == {
        "linear.weight": (3, 8),
        "linear.bias": (3,),
        "query": (1, 8),
    }
