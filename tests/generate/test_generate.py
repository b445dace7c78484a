"""Writing token by token: the cached loop against the whole pass made anew for every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

import multimodal as mm
from multimodal.masks import PREFIX_LM
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokens, at_times
from multimodal_tokenizers import AudioFrames, ImagePatches, TextBytes

STOP = 6


@dataclass(frozen=True)
class Digits(mm.Tokenizer):
    """Numbers from 0 to 5, two steps of time apart: so few that an untrained model stops now and then."""

    causal: bool = False
    vocab_size = STOP

    def encode(self, value: Sequence[int]) -> Tokens:
        return Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens: Tokens) -> list[int]:
        return tokens.content.tolist()

    def places(self, count: int) -> torch.Tensor:
        return at_times(torch.arange(count) * 2.0)


TASKS = ["digits -> digits", "image sound digits -> digits", "story digits image -> digits", "-> digits"]


def make(core: mm.Core, lively, seed: int = 0) -> mm.Model:
    tokenizers = {
        "digits": Digits(),
        "story": TextBytes(causal=True),
        "image": ImagePatches(patch=4, channels=1),
        "sound": AudioFrames(rate_hz=8000, mels=8, stack=2),
    }
    return lively(mm.Model(tokenizers, core, TASKS, seed=seed))


@pytest.fixture
def prompts(values):
    def of(count: int) -> list[dict]:
        made = [{**values(i), "digits": [(i * k) % 6 for k in range(1, 2 + i % 5)]} for i in range(count)]
        made[1]["image"] = None
        return made

    return of


def without_cache(model: mm.Model, task: str, sample: dict, max_tokens: int) -> tuple[list[int], float, bool]:
    """Greedy, by packing and reading the whole sample again for every token."""
    answer = model.packer.patterns[task].answer
    written: list[int] = []
    log_p = 0.0
    while True:
        stream = model.packer([(task, {**sample, answer: written})], answers=bool(written))
        with torch.no_grad():
            row = model.logits(stream, backend="dense")[task][-1].double().log_softmax(-1)
        token = int(row.argmax())
        if token != STOP and len(written) == max_tokens:
            return written, log_p, False
        log_p += float(row[token])
        if token == STOP:
            return written, log_p, True
        written.append(token)


CORES = {
    "plain": mm.Core(width=32, depth=2, heads=4, kv_heads=2),
    "window": mm.Core(width=32, depth=2, heads=2, mask=PREFIX_LM & mm.masks.Window(4)),
    "fields apart": mm.Core(
        width=32,
        depth=2,
        heads=2,
        mask=mm.masks.SameSample() & mm.masks.Causal() & (mm.masks.SameSegment() | mm.masks.Window(3)),
    ),
}


def test_the_cases_above_contain_what_they_are_meant_to(lively, prompts):
    """Answers of several lengths, some that stop and some that are cut, in prompts of several lengths."""
    model = make(CORES["plain"], lively)
    answers = [a for task in TASKS[:3] for a in model.generate(task, prompts(6), max_tokens=8)]
    assert len({len(a.value) for a in answers}) >= 3
    assert {a.complete for a in answers} == {True, False}
    stream = model.pack(TASKS[1], prompts(6), answers=False)
    assert len({span.total for span in stream.layout.spans}) >= 3
    assert stream.readings[TASKS[1]].samples != tuple(range(6))  # the packer sorted them


def test_a_batch_is_cut_into_parts_and_keeps_its_order(lively, prompts):
    model = make(CORES["plain"], lively)
    samples = prompts(7)
    whole = model.generate(TASKS[0], samples, max_tokens=5)
    parts = model.generate(TASKS[0], samples, max_tokens=5, batch=3)
    assert [a.value for a in parts] == [a.value for a in whole]
    assert model.generate(TASKS[0], [], max_tokens=5) == []


def test_max_tokens_leaves_the_answer_incomplete(lively):
    model = make(CORES["plain"], lively)
    readout = model.readout(TASKS[0])
    with torch.no_grad():
        readout.linear.weight.zero_()
        readout.linear.bias.copy_(torch.tensor([0, 0, 9.0, 0, 0, 0, 0]))  # always 2
    answer = model.generate(TASKS[0], digits=[1, 2], max_tokens=4)
    assert (answer.value, answer.complete) == ([2, 2, 2, 2], False)
    with torch.no_grad():
        readout.linear.bias[STOP] = 20.0  # always stop
    answer = model.generate(TASKS[0], digits=[1, 2], max_tokens=4)
    assert (answer.value, answer.complete) == ([], True)
    assert answer.confidence == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 and beams=1 must be at least 1"),
        ({"temperature": -1.0}, r"temperature=-1\.0 must be at least 0"),
        ({"temperature": 1.0, "sampler": mm.generate.Greedy()}, "give temperature=1.0 or a sampler, not both"),
        ({"beams": 2, "guidance": 3.0}, r"beams=2 with guidance=3\.0; use one of them"),
        ({"beams": 2, "temperature": 1.0}, "beams=2 look for the likeliest answer"),
        ({"stop": "x"}, "stop strings need a kind that is text, and 'digits' is not"),
        ({"sampler": "greedy"}, "sampler='greedy' is no Sampler"),
    ],
    ids=str,
)
def test_bad_settings_are_named(lively, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(CORES["plain"], lively).generate(TASKS[0], digits=[1], **settings)


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone(lively, prompts):
    model = make(CORES["plain"], lively)

    def draw(seed: int, temperature: float = 1.0) -> list[list[int]]:
        return [a.value for a in model.generate(TASKS[0], prompts(6), max_tokens=6, seed=seed, temperature=temperature)]

    before = torch.get_rng_state()
    first = draw(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert draw(5) == first
    assert draw(6) != first
    greedy = [a.value for a in model.generate(TASKS[0], prompts(6), max_tokens=6)]
    assert draw(5, temperature=1e-4) == greedy
    assert first != greedy


def test_generation_changes_neither_mode_nor_weights(lively, prompts):
    model = make(CORES["plain"].replace(dropout=0.5), lively).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    once = [a.value for a in model.generate(TASKS[0], prompts(3), max_tokens=4)]
    assert [a.value for a in model.generate(TASKS[0], prompts(3), max_tokens=4)] == once  # no dropout while writing
    assert model.training
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_three_texts_learned_by_heart_are_written_exactly(tokenizers):
    texts = {"one": "a first tale", "two": "Zwei, für die Katz", "three": "3"}
    samples = [
        {"text": name, "image": torch.full((4, 4 * (i + 1)), i / 3), "story": s}
        for i, (name, s) in enumerate(texts.items())
    ]
    core = mm.Core(width=48, depth=2, heads=4)
    model = mm.Model({k: tokenizers[k] for k in ("text", "image", "story")}, core, ["text image -> story"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.loss(model.pack("text image -> story", samples))
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    answers = model.generate("text image -> story", samples)
    assert [a.value for a in answers] == list(texts.values())
    assert all(a.complete and a.confidence > 0.2 for a in answers)
    cut = model.generate("text image -> story", samples, max_tokens=5)
    assert [a.value for a in cut] == ["a fir", "Zwei,", "3"]
    assert [a.complete for a in cut] == [False, False, True]


def test_an_answer_of_exactly_max_tokens_may_still_stop(tokenizers):
    model = mm.Model({"text": tokenizers["text"]}, mm.Core(width=32, depth=1, heads=2), ["text -> text"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(model.pack("text -> text", [{"text": "q", "answer": "yes"}])).backward()
        optimizer.step()
    answer = model.generate("text -> text", text="q", max_tokens=3)
    assert (answer.value, answer.complete) == ("yes", True)


def test_what_is_neither_field_nor_option_is_not_lost(lively):
    model = make(CORES["plain"], lively)
    with pytest.raises(mm.TaskError, match=r"has no field 'max_token'; it reads digits; did you mean 'max_tokens'\?"):
        model.generate(TASKS[0], digits=[1], max_token=3)
    with pytest.raises(mm.TaskError, match="rename 'digit' to 'digits'"):
        model.predict(TASKS[0], digit=[1])
    with pytest.raises(ConfigError, match=r"'tempature' is neither a field .* did you mean 'temperature'\?"):
        list(model.stream(TASKS[0], digits=[1], tempature=3))


@pytest.mark.parametrize(
    "core",
    [
        mm.Core(width=32, depth=2, heads=2),
        mm.EncoderDecoder(reader=mm.Core(width=32, depth=1, heads=2), writer=mm.Core(width=32, depth=2, heads=2)),
    ],
    ids=["one core", "two cores"],
)
def test_a_picture_helps_to_translate(lively, core):
    """Captioning and translation are tasks like any other, together or with either left out."""
    task = "image en:text -> de:text"
    kinds = {"image": ImagePatches(patch=4, channels=1), "text": TextBytes()}
    model = lively(mm.Model(kinds, core, [task, "image -> text", "en:text -> de:text"]))
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = {"image": image, "en": "a dog"}
    samples = [whole, {**whole, "image": None}, {**whole, "en": None}]
    answers = model.generate(task, samples, max_tokens=6)
    assert len({tuple(a.tokens.content.tolist()) for a in answers}) == 3  # each field tells
    for answer, sample in zip(answers, samples, strict=True):
        assert model.generate(task, **sample, max_tokens=6).value == answer.value
    assert model.generate("image -> text", image=image, max_tokens=6).tokens is not None


def test_blanked_samples_lack_their_fields_in_a_share_of_the_times():
    from multimodal.data import seed_generators

    rows = [{"label": "a", "picture": i} for i in range(4000)]
    blanked = mm.Blanked(rows, ("label",), share=0.25)
    seed_generators(7)
    first = [blanked[i] for i in range(len(blanked))]
    assert sum(s["label"] is None for s in first) / 4000 == pytest.approx(0.25, abs=0.02)
    assert [s["picture"] for s in first] == list(range(4000))
    seed_generators(7)
    assert [blanked[i] for i in range(len(blanked))] == first
    assert rows[0] == {"label": "a", "picture": 0}
