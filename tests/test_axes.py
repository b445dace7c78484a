"""Kinds with more position axes than time, row and column: in packs, caches, towers, exports and whatever else knows places."""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import multimodal as mm
from multimodal.check import tokenizer_checks, verify
from multimodal.count.flops import embed_cost
from multimodal.declare import declaration, rebuild
from multimodal.export.compare import largest_difference
from multimodal.export.programs import programs_of
from multimodal.heads.base import Segment
from multimodal.look import xray
from multimodal.positions import Rotary, on_axes, rotary_frequencies, rotate, rotations
from multimodal.shapes import AXES, ConfigError, MediaError, StreamError
from multimodal.tokenizer import Places
from multimodal.tower import PixelShuffle, Tower
from multimodal.transcription.language_model import ModelLM
from multimodal_tokenizers import ClassTokens, Labels, TextBytes

VOICE = (*AXES, "voice")
CORE = mm.Core(width=32, depth=2, heads=2, axes=(*AXES, "depth", "page", "voice"), rotary_split=(2, 1, 1, 1, 1, 1))


@dataclass(frozen=True)
class Voices(mm.Tokenizer):
    """Chords of `voices` pitches 0 to 11: a token for each pitch, at the time of its chord and in its voice."""

    voices: int = 3
    vocab_size = 12
    axes = VOICE
    step = (0.5, 1.0, 1.0)

    def encode(self, value: Any) -> mm.Tokens:
        pitches = torch.tensor(value, dtype=torch.int64).reshape(-1, self.voices).flatten()
        return mm.Tokens(pitches, self.places(len(pitches)))

    def places(self, count: int) -> Tensor:
        index_N = torch.arange(float(count))
        nothing_N = torch.zeros(count)
        time_N = (index_N / self.voices).floor() * 0.5
        return torch.stack([time_N, nothing_N, nothing_N, index_N % self.voices], 1)

    def decode(self, tokens: mm.Tokens) -> list[list[int]]:
        chords = tokens.content[: len(tokens) // self.voices * self.voices]
        return chords.reshape(-1, self.voices).tolist()


@dataclass(frozen=True)
class Scans(mm.Tokenizer):
    """Arrays (pages, depths, rows, columns), a token for each number; a depth is half a step and a page 3 steps."""

    feature_size = 1
    axes = (*AXES, "page", "depth")
    step = (1.0, 1.0, 1.0, 3.0, 0.5)

    def encode(self, value: Any) -> mm.Tokens:
        if not isinstance(value, np.ndarray) or value.ndim != 4:
            raise MediaError(f"Scans.encode: {type(value).__name__} is no array (pages, depths, rows, columns)")
        page, depth, row, column = (torch.arange(float(n)) for n in value.shape)
        place_NA = torch.cartesian_prod(page * 3, depth * 0.5, row, column)
        position_NA = torch.cat([torch.zeros(len(place_NA), 1), place_NA[:, [2, 3, 0, 1]]], 1)
        return mm.Tokens(torch.from_numpy(value.astype(np.float32)).reshape(-1, 1).clone(), position_NA)

    def places(self, count: int) -> Tensor:
        raise ConfigError("Scans: they are read and not written")

    def decode(self, tokens: mm.Tokens) -> np.ndarray:
        place_NA = tokens.position_NA / torch.tensor(self.step)
        columns, pages, depths, rows = (
            ((place_NA[:, [2, 3, 4, 1]].amax(0) + 1).int()).tolist() if len(tokens) else (0,) * 4
        )
        return tokens.content.reshape(pages, depths, rows, columns).numpy()


def chords(seed: int, count: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 12, (count, 3)).tolist()


def scan(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(np.float32)


KINDS = {"voices": Voices(), "scan": Scans(), "text": TextBytes(), "label": Labels(("a", "b"))}
SCANS = [scan(0, 2, 1, 2, 2), scan(1, 1, 3, 1, 2), scan(2, 2, 2, 2, 1), scan(3, 1, 1, 3, 3)]
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "scan text -> voices": [
        {"scan": s, "text": "abcd"[: 1 + i], "voices": chords(i, 1 + i)} for i, s in enumerate(SCANS)
    ],
    "voices scan -> label": [
        {"voices": chords(i, 2 + i), "scan": s, "label": "ab"[i % 2]} for i, s in enumerate(SCANS)
    ],
    "voices -> text": [{"voices": chords(i, 1 + i), "text": "dcba"[i:]} for i in range(4)],
}


@pytest.fixture
def model(lively) -> mm.Model:
    return lively(mm.Model(KINDS, CORE, list(SAMPLES)))


def test_the_three_axes_are_as_they_were():
    assert mm.Core.tiny().axes == AXES == Labels(("a", "b")).axes
    old = declaration(mm.Core.tiny())
    del old["config"]["axes"]  # as a checkpoint of before has it
    assert rebuild(json.loads(json.dumps(old))) == mm.Core.tiny()
    assert mm.at_times(torch.arange(2)).tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(("kind", "values"), [(Voices(), [chords(i, 2 + i) for i in range(3)]), (Scans(), SCANS)])
def test_both_kinds_pass_every_check(kind: mm.Tokenizer, values: list[Any]):
    slow = ("fresh_process", "worker_process")  # nothing of a process has to do with axes
    for check in tokenizer_checks(kind, values):
        if str(check) not in slow:
            assert check.result().status in ("ok", "skipped"), check.result()


def test_packed_is_alone_is_cached_is_whole_and_no_gradient_crosses(model: mm.Model):
    found = verify(model, SAMPLES)
    assert found.passed, str(found)
    assert {row.check for row in found.rows} >= {"packed", "mixed", "dense", "cached", "answers", "gradient"}


def test_kinds_of_other_axes_meet_on_those_of_the_core(model: mm.Model):
    sample = {"voices": [[1, 2, 3]], "scan": scan(0, 2, 2, 1, 1), "label": "a"}
    stream = model.pack("voices scan -> label", [sample])
    assert CORE.axes == ("time", "row", "column", "depth", "page", "voice")
    assert stream.position_TA.tolist() == [
        *([0, 0, 0, 0, 0, voice] for voice in range(3)),
        *([1, 0, 0, depth, page, 0] for page in range(2) for depth in range(2)),
        [2, 0, 0, 0, 0, 0],  # the learned token
    ]


@pytest.mark.parametrize("axis", range(6))
def test_every_axis_matters_by_its_share(model: mm.Model, axis: int):
    """Moving one token along an axis changes what is read, unless the axis has no rotary pairs."""
    stream = model.pack("voices scan -> label", SAMPLES["voices scan -> label"])
    moved_TA = stream.position_TA.clone()
    moved_TA[1, axis] += 2
    shares = tuple(0 if i == axis else share for i, share in enumerate(CORE.rotary_split))
    without = model.core.core.replace(rotary_split=shares).build()
    without.load_state_dict(model.core.state_dict())
    with torch.no_grad():
        rows = model.rows(stream)
        here, there = (model.core(rows, x, stream.layout) for x in (stream.position_TA, moved_TA))
        blind = [without(rows, x, stream.layout) for x in (stream.position_TA, moved_TA)]
    assert (here - there).abs().max() > 1e-3
    assert torch.equal(*blind)


def test_rotations_are_those_of_each_axis():
    split, base = (3, 1, 2, 1, 1), (1e4, 1e2, 50.0, 20.0, 10.0)
    axis_K, frequency_K = rotary_frequencies(32, split, base)
    place_TA = torch.tensor([[0.0, 0, 0, 0, 0], [3.0, 1, 2, 5, 4]])
    x_THK = torch.randn(2, 1, 32)
    turned = rotate(x_THK, rotations(place_TA, axis_K, frequency_K))
    pair = 0
    for axis, pairs in enumerate((6, 2, 4, 2, 2)):
        for i in range(pairs):
            a, b = x_THK[1, 0, 2 * pair : 2 * pair + 2].tolist()
            angle = float(place_TA[1, axis]) * base[axis] ** (-i / pairs)
            wanted = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
            torch.testing.assert_close(turned[1, 0, 2 * pair : 2 * pair + 2], torch.tensor(wanted))
            pair += 1
    assert pair == 16
    assert torch.equal(turned[0], x_THK[0])


@pytest.mark.parametrize(
    ("head_width", "split", "pairs"),
    [
        (8, (2, 1, 1, 1), (1, 1, 1, 1)),
        (10, (2, 1, 1, 1), (2, 1, 1, 1)),
        (64, (2, 1, 1, 1), (14, 6, 6, 6)),
        (6, (1, 0, 0, 1), (2, 0, 0, 1)),
    ],
)
def test_every_axis_with_a_share_has_a_pair(head_width: int, split: tuple[int, ...], pairs: tuple[int, ...]):
    axis_K, _ = rotary_frequencies(head_width, split, (100.0,) * 4)
    assert tuple(torch.bincount(axis_K, minlength=4).tolist()) == pairs


def test_settings_of_further_axes():
    core = mm.Core.tiny().replace(axes=VOICE)
    assert core.rotary_split == (2, 1, 1, 1)
    assert core.rotary_base == (10000.0, 100.0, 100.0, 100.0)
    more = core.replace(axes=(*VOICE, "page"), rotary_base=(1e4, 1e2, 1e2, 7.0))
    assert more.rotary == Rotary(split=(2, 1, 1, 1, 1), base=(1e4, 1e2, 1e2, 7.0, 100.0))
    assert mm.Core.tiny().replace(axes=VOICE, rotary_split=(0, 0, 0)).rotary_split == (0, 0, 0, 0)
    assert rebuild(json.loads(json.dumps(declaration(more)))) == more
    own = mm.layers.SelfAttention(rotary=Rotary(split=(1, 0, 0, 1), base=(1e4, 1e2, 1e2, 9.0)))
    built = core.replace(block=(own, mm.layers.MLP())).build()
    axis_K, _ = next(iter(built._frequencies.values()))
    assert axis_K.tolist() == [0, 0, 0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mm.Core.tiny().replace(axes=("time", "voice")), r"Core: axes=\('time', 'voice'\) must be .* begins with"),
        (lambda: mm.Core.tiny().replace(axes=(*VOICE, "voice")), "must be a tuple of different names"),
        (lambda: mm.Core.tiny().replace(axes=list(VOICE)), "must be a tuple of different names"),
        (lambda: mm.Core.tiny().replace(rotary_split=(1, 1, 1, 1)), "rotary_split and rotary_base give one number each"),
        (
            lambda: mm.Core.tiny().replace(rotary_split=(1, 1, 1, 1), rotary_base=(9.0,) * 4),
            "give 4 numbers, one for each axis, but the axes are time, row, column",
        ),
        (
            lambda: mm.Core.tiny().replace(
                block=(mm.layers.SelfAttention(rotary=Rotary(split=(1, 0, 0, 1), base=(9.0,) * 4)), mm.layers.MLP())
            ),
            "for 4 axes, but the core's axes are time, row, column; give the core more axes",
        ),
        (lambda: mm.Core(width=12, depth=1, heads=2, axes=VOICE).build(), "3 pairs of a head of width 6 do not suffice"),
        (
            lambda: mm.EncoderDecoder(reader=mm.Core.tiny().replace(axes=VOICE), writer=mm.Core.tiny()),
            "both get the positions of one stream, so make them equal",
        ),
        (lambda: Tower(Voices(), mm.Core.tiny()), r"Tower: Voices places its tokens by voice too.*core\.replace\(axes="),
        (
            lambda: mm.packer.Packer({"x": Unplaced()}, ["x -> x"]),
            r"tokenizers\['x'\]: axes=\('voice',\) must be a tuple",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


class Unplaced(Voices):
    axes = ("voice",)


@pytest.mark.parametrize("core", [mm.Core.tiny(), mm.EncoderDecoder(reader=mm.Core.tiny(), writer=mm.Core.tiny())])
def test_the_error_of_an_unknown_axis_says_what_to_write(core):
    kinds = {"voices": Voices(), "scan": Scans(), "label": Labels(("a", "b"))}
    with pytest.raises(ConfigError, match=r"tokenizers\['voices'\] places its tokens by voice too") as error:
        mm.Model(kinds, core, ["voices scan -> label"])
    (wanted,) = re.findall(r"give it (core\.replace.*)$", str(error.value))
    made = eval(wanted, {"core": core})
    assert made.axes == (*AXES, "voice", "page", "depth")
    mm.Model(kinds, made, ["voices scan -> label"])


def test_other_positions_than_declared_are_refused_by_name():
    class Forgetful(Voices):
        axes = AXES

    with pytest.raises(
        MediaError, match=r"Forgetful\.encode: position is .* \(3, 4\), wanted float32 \(3, 3\): time, row, column"
    ):
        Forgetful()([[1, 2, 3]])
    with pytest.raises(StreamError, match=r"tokens of 'voices' have positions \(3, 4\), .* axes=tokenizer\.axes"):
        Segment("voices", Voices()([[1, 2, 3]]), Voices.step, False).position(CORE.axes)
    assert tuple(Voices()([], empty=True).position_NA.shape) == (0, 4)


@pytest.mark.parametrize("last", [None, 2])
def test_two_cores(lively, last: int | None):
    two = mm.EncoderDecoder(reader=CORE, writer=CORE.replace(depth=1), last=last)
    tasks = ["scan text -> voices", "voices -> text"]
    found = verify(lively(mm.Model(KINDS, two, tasks)), {task: SAMPLES[task] for task in tasks})
    assert found.passed, str(found)


def test_learned_times_and_fields_and_guidance(lively):
    core = CORE.replace(learned_times=64, learned_fields=3)
    model = lively(mm.Model(KINDS, core, ["scan text -> voices"]))
    found = verify(model, {"scan text -> voices": SAMPLES["scan text -> voices"]})
    assert found.passed, str(found)
    sample = SAMPLES["scan text -> voices"][0]
    read = {name: sample[name] for name in ("scan", "text")}
    guided = model.generate("scan text -> voices", **read, guidance=1.5, max_tokens=7)
    wanted = _whole(model, "scan text -> voices", read, guided.tokens)
    blank = _whole(model, "scan text -> voices", dict.fromkeys(read), guided.tokens)
    chosen = (blank + 1.5 * (wanted - blank)).argmax(-1)
    count = len(guided.tokens)
    assert chosen[:count].tolist() == guided.tokens.content.tolist()
    assert guided.tokens.position_NA.tolist() == Voices().places(count).tolist()


def _whole(model: mm.Model, task: str, read: dict[str, Any], tokens: mm.Tokens) -> Tensor:
    """Log-probabilities after each token of an answer, read in one pass."""
    stream = model.packer([(task, read)], answers=False, begins=[tokens])
    with torch.no_grad():
        return model.logits(stream)[task].log_softmax(-1)


def test_hidden_tokens_have_their_places_on_every_axis(lively):
    model = lively(mm.Model({"scan": Scans()}, CORE, [mm.Task("scan -> scan", mm.Masked(0.5, span=2))]))
    found = verify(model, {"scan -> scan": [{"scan": s} for s in SCANS]})
    assert found.passed, str(found)
    stream = model.pack("scan -> scan", [{"scan": SCANS[0]}])
    wanted = on_axes(SCANS_IN_STEPS := Scans()(SCANS[0]).position_NA / torch.tensor(Scans.step), Scans.axes, CORE.axes)
    assert len(SCANS_IN_STEPS) == 8
    assert sorted(stream.position_TA.tolist()) == sorted(wanted.tolist())


def test_a_tower_reads_further_axes(lively):
    inner = mm.Core(width=24, depth=1, heads=2, axes=Scans.axes)
    value = scan(0, 2, 2, 2, 4)
    for connector, tokens in ((mm.tower.Linear(), 32), (PixelShuffle(2), 8)):
        tower = Tower(Scans(), inner, connector)
        assert len(tower(value)) == tokens
        assert torch.equal(tower.inner_tokens(tower(value)).position_NA, Scans()(value).position_NA)
        model = lively(mm.Model({"scan": tower, "label": Labels(("a", "b"))}, CORE, ["scan -> label"]))
        found = verify(
            model, {"scan -> label": [{"scan": scan(i, 1 + i % 2, 2, 2, 2), "label": "a"} for i in range(4)]}
        )
        assert found.passed, str(found)
    with pytest.raises(MediaError, match="PixelShuffle: side=3 does not divide 2 rows x 4 columns"):
        Tower(Scans(), inner, PixelShuffle(3))(value)


class _ByPlace(nn.Module):
    """Numbers plus their positions, by a linear layer each."""

    reads_places = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.number, self.place = nn.Linear(1, width), nn.Linear(5, width)

    def forward(self, content: Tensor, places: Places) -> Tensor:
        assert all(len(extent) == 5 for extent in places.extents)
        return self.number(content) + self.place(places.position_NA)

    def padded(self, content: Tensor, position_BNA: Tensor, length_B: Tensor) -> Tensor:
        return self.number(content) + self.place(position_BNA)


@dataclass(frozen=True)
class PlacedScans(Scans):
    """Scans whose embedding reads all five axes."""

    def embed(self, width: int) -> nn.Module:
        return _ByPlace(width)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (Scans(), "scan text -> label"),
        (PlacedScans(), "scan -> label"),
        (ClassTokens(Scans(), count=1), "scan -> label"),
        (Tower(Scans(), CORE), "scan -> label"),
        (Scans(), "scan -> voices"),
    ],
)
@pytest.mark.parametrize("two", [False, True])
def test_programs_have_every_axis(lively, kind: mm.Tokenizer, task: str, two: bool):
    core = mm.EncoderDecoder(reader=CORE, writer=CORE) if two else CORE
    model = lively(mm.Model({**KINDS, "scan": kind}, core, [task]))
    made = {program.name: program for program in programs_of(model, task)}
    place = next(entry for entry in next(iter(made.values())).inputs if entry.name == "scan.place")
    assert place.axes == ("batch", "scan_tokens", 5)
    assert place.meaning.endswith("time, row, column, page, depth")
    with torch.no_grad():
        assert largest_difference(model, task, list(made.values()), lambda name, inputs: made[name](inputs)) < 1e-5
    assert embed_cost(kind, 32, False).forward > 0


@pytest.mark.slow
def test_a_written_program_has_every_axis(lively, tmp_path):
    model = lively(mm.Model({"voices": Voices(), "scan": Scans()}, CORE, ["scan -> voices"]))
    manifest = json.loads((model.export("pt2", tmp_path / "out") / "manifest.json").read_text(encoding="utf-8"))
    (place,) = [entry for entry in manifest["programs"]["step"]["inputs"] if entry["name"] == "token.place"]
    assert place["axes"] == ["batch", 4]


def test_tokens_are_named_by_every_axis(model: mm.Model):
    assert Scans().token_names(Scans()(scan(0, 2, 1, 1, 2))) == [
        "row 0, column 0, page 0", "row 0, column 1, page 0", "row 0, column 0, page 3", "row 0, column 1, page 3",
    ]  # fmt: skip
    assert Voices().token_names(Voices()([[1, 2, 3], [4, 5, 6]]))[2:4] == ["at 0, voice 2", "at 0.5, voice 0"]
    seen = xray(model, "voices -> text", {"voices": [[1, 2, 3]]}, answer="ab")
    assert seen.fields["voices"].labels == ("at 0, voice 0", "at 0, voice 1", "at 0, voice 2")


def test_it_is_saved_trained_and_goes_on(tmp_path):
    model = mm.Model(KINDS, CORE, list(SAMPLES))
    mm.fit(model, SAMPLES, steps=3, batch=3, folder=tmp_path / "run", quiet=True)
    again = mm.Model.load(tmp_path / "run" / "model").eval()
    assert again.core.core == CORE
    for task, samples in SAMPLES.items():
        stream = model.eval().pack(task, samples)
        assert torch.equal(again.logits(stream)[task], model.logits(stream)[task])


def test_a_language_model_of_voices_is_that_of_the_task(lively):
    model = lively(mm.Model({"voices": Voices()}, CORE, ["-> voices"]))
    ids = [3, 1, 4, 1, 5, 9, 2]
    wanted = _whole(model, "-> voices", {}, mm.Tokens(torch.tensor(ids), Voices().places(7)))
    lm = ModelLM(model, "-> voices")
    for count in (2, 7, 5):
        torch.testing.assert_close(lm.log_p(ids[:count]), wanted[count], atol=1e-5, rtol=0)
