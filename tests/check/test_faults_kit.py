"""The conformance kit catches each planted fault by the check that names its cause, and passes what keeps the contract."""

import os
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import multimodal as mm
from multimodal.check import tokenizer_checks
from multimodal.check.models import CHECKS as IN_MODELS
from multimodal.check.report import run_checks
from multimodal_tokenizers import AudioFrames, Codes, Features, ImagePatches, Labels, TextBPE, TextBytes

ROOT = Path(__file__).resolve().parents[2]


def words():
    return ["good day", "bad tune", "what? é"]


def lists():
    return [[3, 1, 2, 7, 5], [6, 5, 9], [4, 4, 8, 1]]


def waves():
    return [np.float32(np.sin(np.arange(9) + i) + 0.1 * i) for i in range(3)]


def sounds():
    return [(wave, 16000) for wave in waves()]


def report_of(tokenizer, values):
    """What came of the checks that need no model, which is trained."""
    slow = {check.name for check in IN_MODELS}
    checks = [check for check in tokenizer_checks(tokenizer, values) if str(check) not in slow]
    return run_checks(repr(tokenizer), checks, raises=False)


@dataclass(frozen=True)
class Numbers(mm.Tokenizer):
    """A list of whole numbers below 100, one token each."""

    vocab_size = 100

    def encode(self, value):
        if type(value) is not list or not value:
            raise mm.MediaError(f"{type(self).__name__}.encode: {value!r} is no list of numbers")
        return mm.Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens):
        return tokens.content.tolist()


@dataclass(frozen=True)
class Wave(mm.Tokenizer):
    """An array (n,), a token for each number and its square."""

    feature_size = 2

    def encode(self, value):
        if not isinstance(value, np.ndarray) or value.ndim != 1 or not len(value):
            raise mm.MediaError(f"{type(self).__name__}.encode: {value!r} is no array (n,)")
        x = torch.tensor(value, dtype=torch.float32)
        return mm.Tokens(torch.stack([x, x**2], 1), self.places(len(x)))

    def decode(self, tokens):
        return tokens.content[:, 0].numpy()


class Text(TextBytes):
    """What the faults below vary; errors name the class that is varied."""


# 24: the input is changed in place


class SortsInPlace(Numbers):
    def encode(self, value):
        if isinstance(value, list):
            value.sort()
        return super().encode(value)


class ClipsInPlace(Wave):
    def encode(self, value):
        if isinstance(value, np.ndarray):
            np.clip(value, -0.5, 0.5, out=value)
        return super().encode(value)


class Pops(Numbers):
    """Takes the numbers out of a mapping."""

    def encode(self, value):
        if not isinstance(value, dict):
            raise mm.MediaError("Pops.encode: wanted a mapping")
        return super().encode(value.pop("numbers", [1]))

    def decode(self, tokens):
        return {"numbers": super().decode(tokens)}


class HalvesATensor(Wave):
    def encode(self, value):
        if isinstance(value, torch.Tensor):
            value /= 2
            value = value.numpy()
        return super().encode(value)


# 25: the process decides


@dataclass(frozen=True)
class Words(mm.Tokenizer):
    """Words of a text as numbers, by `number`."""

    vocab_size = 1000

    def encode(self, value):
        if not isinstance(value, str) or not value:
            raise mm.MediaError(f"{type(self).__name__}.encode: {value!r} is no text")
        return mm.Tokens(torch.tensor([self.number(word) for word in value.split()]), self.places(len(value.split())))

    def number(self, word):
        raise NotImplementedError


class Hashes(Words):
    def number(self, word):
        return hash(word) % 1000


class Grows(Words):
    known: ClassVar[dict] = {}

    def number(self, word):
        return self.known.setdefault(word, len(self.known))


@dataclass(frozen=True)
class GrowsInside(Words):
    def __post_init__(self):
        object.__setattr__(self, "known", {})

    def number(self, word):
        return self.known.setdefault(word, len(self.known))


LETTERS = list({chr(c) for c in range(32, 256)})


class OrderOfASet(Words):
    def number(self, word):
        return sum(LETTERS.index(c) * (i + 1) for i, c in enumerate(word)) % 1000


class FileOfTheFolder(Words):
    lossy = True

    def number(self, word):
        letters = Path("letters.txt").read_text(encoding="utf-8")
        return sum(letters.find(c) * (i + 1) for i, c in enumerate(word)) % 1000


offset = 0


class GlobalVariable(Words):
    def number(self, word):
        return (sum(ord(c) * (i + 1) for i, c in enumerate(word)) + offset) % 1000


class Counts(Words):
    """How many texts came before is part of the first token; the same text is looked up, so that it gives the same again."""

    seen: ClassVar[dict] = {}

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content + self.seen.setdefault(value, len(self.seen)), tokens.position_NA)

    def number(self, word):
        return ord(word[0])


# 26: information is lost


class FirstTwo(Text):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content[:2], tokens.position_NA[:2])


class Sorted(Numbers):
    def encode(self, value):
        return super().encode(sorted(value) if type(value) is list else value)


class Lowers(Text):
    def encode(self, value):
        return super().encode(value.lower() if isinstance(value, str) else value)


class ConstantButLossy(Numbers):
    lossy = True

    def encode(self, value):
        return super().encode([0] * len(value) if type(value) is list else value)


class DecodesAConstant(Numbers):
    lossy = True

    def decode(self, tokens):
        return [7] * len(tokens)


class DropsTheSign(Wave):
    def encode(self, value):
        return super().encode(abs(value) if isinstance(value, np.ndarray) else value)


class FlatPatches(ImagePatches):
    """Only the mean of each patch is left, which comes back the same each time."""

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content.mean(1, keepdim=True).expand_as(tokens.content).clone(), tokens.position_NA)


# 27: values are cut in silence


class CutsAt64(Text):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content[:64], tokens.position_NA[:64])


class CutsALongWave(Wave):
    def encode(self, value):
        return super().encode(value[:500] if isinstance(value, np.ndarray) else value)


@dataclass(frozen=True)
class CutsNormalised(mm.Tokenizer):
    """Takes off the mean of all, then forgets the end: every token changes a little with what is cut."""

    feature_size = 1

    def encode(self, value):
        if not isinstance(value, np.ndarray) or value.ndim != 1 or not len(value):
            raise mm.MediaError(f"CutsNormalised.encode: {value!r} is no array (n,)")
        x = torch.tensor(value - value.mean(), dtype=torch.float32)[:200, None]
        return mm.Tokens(x, self.places(len(x)))


class CutsTheLastOne(Numbers):
    decode = mm.Tokenizer.decode

    def encode(self, value):
        return super().encode(value[:-1] if type(value) is list and len(value) > 1 else value)


class CutsColumns(ImagePatches):
    def encode(self, value):
        return super().encode(value[:, :8] if isinstance(value, np.ndarray) else value)


# 28: causal, but the whole value is known


class KnowsTheMean(Wave):
    causal = True

    def encode(self, value):
        return super().encode(value - value.mean() if isinstance(value, np.ndarray) and len(value) else value)

    decode = mm.Tokenizer.decode


class KnowsTheLength(Wave):
    causal = True

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content + len(tokens) / 100, tokens.position_NA)

    decode = mm.Tokenizer.decode


class KnowsTheSum(Text):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens((tokens.content + int(tokens.content.sum())) % 256, tokens.position_NA)

    decode = mm.Tokenizer.decode


class RelativePlaces(Wave):
    causal = True
    step = (0.01, 1.0, 1.0)
    decode = mm.Tokenizer.decode

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA / len(tokens))


# 29: what is declared is not so


class DecodesToLists(Text):
    def decode(self, tokens):
        return list(super().decode(tokens))


class TextOfFeatures(Wave):
    text = True


class NotFive(Numbers):
    length = 5


class FiveOfNone(Numbers):
    length = 2


class PictureRaises(Wave):
    def picture(self, tokens):
        return tokens.content[:, 3]


class PictureWithoutColours(Wave):
    def picture(self, tokens):
        return tokens.content.clamp(0, 1)


class PictureOfBytes(Wave):
    def picture(self, tokens):
        return tokens.content[None].abs() * 255


class PictureOfOtherWidth(Wave):
    def picture(self, tokens):
        return torch.zeros(1, len(tokens) + 1, 1)


# 30: the process is changed, memory is shared, objects are remembered


class ChangesFolder(Wave):
    def encode(self, value):
        os.chdir("/")
        return super().encode(value)


class SwitchesAutogradOff(Wave):
    def encode(self, value):
        torch.set_grad_enabled(False)
        return super().encode(value)


class SetsDefaultDtype(Wave):
    def encode(self, value):
        torch.set_default_dtype(torch.float64)
        return super().encode(value)


class SetsEnvironment(Wave):
    def encode(self, value):
        os.environ["MULTIMODAL_PLANTED"] = "1"
        return super().encode(value)


class SetsThreads(Wave):
    def encode(self, value):
        torch.set_num_threads(torch.get_num_threads() + 1)
        return super().encode(value)


class HidesWarnings(Wave):
    def encode(self, value):
        warnings.simplefilter("ignore")
        return super().encode(value)


class DecodeChangesFolder(Wave):
    def decode(self, tokens):
        os.chdir("/")
        return super().decode(tokens)


class DrawsInDecode(Wave):
    def decode(self, tokens):
        return super().decode(tokens) + 0 * np.random.standard_normal(len(tokens))


class IsAView(Wave):
    decode = mm.Tokenizer.decode
    feature_size = 1

    def encode(self, value):
        if not isinstance(value, np.ndarray) or not len(value):
            raise mm.MediaError("IsAView.encode: wanted an array")
        return mm.Tokens(torch.from_numpy(value)[:, None], self.places(len(value)))


class IsAViewOfASound(IsAView):
    def encode(self, value):
        if not isinstance(value, tuple):
            raise mm.MediaError("IsAViewOfASound.encode: wanted (wave, rate)")
        return super().encode(value[0])


class UsesABufferAgain(Wave):
    buffer = torch.zeros(100, 2)

    def encode(self, value):
        tokens = super().encode(value)
        if len(tokens) > 100:
            raise mm.MediaError("UsesABufferAgain.encode: too long")
        self.buffer[: len(tokens)] = tokens.content
        return mm.Tokens(self.buffer[: len(tokens)], tokens.position_NA)


class ById(Wave):
    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content + id(value) % 1009, tokens.position_NA)


class RemembersById(Wave):
    """Its memory holds the values too, so that no two have one id at a time."""

    known: ClassVar[dict] = {}

    def encode(self, value):
        if id(value) not in self.known:
            self.known[id(value)] = value, super().encode(value)
        return self.known[id(value)][1]


# 31: embedding takes only numbers that encode gives


class LooksNumbersUp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table, self.linear = nn.Embedding(100, width), nn.Linear(1, width)

    def forward(self, content):
        if not torch.equal(content, content.round()):
            raise IndexError("no such row")
        return self.table(content[:, 0].long()) + self.linear(content)


@dataclass(frozen=True)
class EmbedsByTable(mm.Tokenizer):
    feature_size = 1

    def encode(self, value):
        if type(value) is not list or not value:
            raise mm.MediaError(f"EmbedsByTable.encode: {value!r} is no list of numbers")
        return mm.Tokens(torch.tensor(value, dtype=torch.float32)[:, None] * 2 + 1, self.places(len(value)))

    def embed(self, width):
        return LooksNumbersUp(width)


class TakesTheRoot(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(1, width)

    def forward(self, content):
        return self.linear(content.sqrt())


class EmbedsTheRoot(EmbedsByTable):
    def embed(self, width):
        return TakesTheRoot(width)


PLANTED = [
    (24, SortsInPlace(), lists, "input_untouched", r"list \[3, 1, 2, 7, 5\] is not what it was .* in place"),
    (24, ClipsInPlace(), waves, "input_untouched", "in place"),
    (24, Pops(), lambda: [{"numbers": x} for x in lists()], "input_untouched", "in place"),
    (24, HalvesATensor(), lambda: [torch.from_numpy(x) for x in waves()], "input_untouched", "in place"),
    (25, Hashes(), words, "fresh_process", "hash seed"),
    (25, OrderOfASet(), words, "fresh_process", "hash seed"),
    (25, Grows(), words, "fresh_process", "which values came before"),
    (25, GrowsInside(), words, "fresh_process", "which values came before"),
    (25, Counts(), words, "fresh_process", "which values came before"),
    (26, FirstTwo(), words, "nothing_lost", "the end is cut or lost in silence"),
    (26, Sorted(), lists, "decode_gives_value", r"\[3, 1, 2, 7, 5\] comes back from decode as list \[1, 2, 3, 5, 7\]"),
    (
        26,
        Lowers(),
        lambda: ["Good Day", "bad"],
        "decode_gives_value",
        "'Good Day' comes back .* 'good day'.*lossy=True",
    ),
    (26, ConstantButLossy(), lists, "nothing_lost", "the same 5 tokens"),
    (26, DecodesAConstant(), lists, "decode_inverts_encode", "nothing of it is left"),
    (26, DropsTheSign(), waves, "decode_gives_value", "lose what it held"),
    (
        26,
        FlatPatches(patch=4, channels=1, position="rotary"),
        lambda: pictures(8, 12),
        "decode_gives_value",
        "lose what it held",
    ),
    (27, CutsAt64(), words, "nothing_lost", "the same 64 tokens"),
    (27, CutsALongWave(), waves, "nothing_lost", "the same 500 tokens"),
    (27, CutsNormalised(), waves, "nothing_lost", "the same 200 tokens"),
    (27, CutsTheLastOne(), lists, "nothing_lost", "ends differently"),
    (27, CutsColumns(patch=4, channels=1), lambda: pictures(8, 12), "nothing_lost", "ends differently"),
    (28, KnowsTheMean(), waves, "causal_prefix", "tokens know the whole value"),
    (28, KnowsTheLength(), waves, "causal_prefix", "tokens know the whole value"),
    (28, KnowsTheSum(causal=True), words, "causal_prefix", "tokens know the whole value"),
    (28, RelativePlaces(), waves, "causal_prefix", "tokens know the whole value"),
    (29, DecodesToLists(), words, "text_as_declared", "text=True, but decode gives list"),
    (29, TextOfFeatures(), waves, "text_as_declared", "the content is features"),
    (29, NotFive(), lambda: [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]], "length_as_declared", r"\[1, 2, 3, .* 7 tokens"),
    (29, NotFive(), lambda: [[1, 2, 3, 4, 5], [1, 2]], "length_as_declared", "has 2 tokens"),
    (29, FiveOfNone(), lists, "length_as_declared", "no value has the 2 tokens"),
    (29, PictureRaises(), waves, "picture_tiles", "picture fails on ndarray .*IndexError"),
    (29, PictureWithoutColours(), waves, "picture_tiles", r"wanted a tensor \(Y, X, C\)"),
    (29, PictureOfBytes(), lambda: [x[None].T[:, 0] for x in waves()], "picture_tiles", "wanted"),
    (29, PictureOfOtherWidth(), waves, "picture_tiles", "do not tile"),
    (30, ChangesFolder(), waves, "process_untouched", "encode changes the current folder"),
    (30, SwitchesAutogradOff(), waves, "process_untouched", "encode changes autograd"),
    (30, SetsDefaultDtype(), waves, "process_untouched", "default dtype"),
    (30, SetsEnvironment(), waves, "process_untouched", "environment variables"),
    (30, SetsThreads(), waves, "process_untouched", "number of threads"),
    (30, HidesWarnings(), waves, "process_untouched", "filters of warnings"),
    (30, DecodeChangesFolder(), waves, "process_untouched", "decode changes the current folder"),
    (30, DrawsInDecode(), waves, "generators_untouched", "decode moved the global generator of numpy.random"),
    (30, IsAView(), waves, "memory_own", "is a view of the caller's array"),
    (30, IsAViewOfASound(), sounds, "memory_own", "is a view of the caller's array"),
    (30, UsesABufferAgain(), waves, "memory_own", "memory that it uses again"),
    (30, ById(), waves, "copies_agree", "which object it is given"),
    (30, RemembersById(), waves, "copies_agree", "remembers objects"),
    (31, EmbedsByTable(), lists, "embed_any_numbers", "embed fails on half of the content .*IndexError"),
    (31, EmbedsTheRoot(), lists, "embed_any_numbers", "NaN or infinity for minus"),
]


def pictures(rows, columns):
    draw = np.random.default_rng(0)
    return [draw.random((rows, columns), dtype=np.float32) for _ in range(3)]


@pytest.mark.parametrize(
    ("tokenizer", "values", "name", "problem"),
    [pytest.param(*case, id=f"{number}-{type(case[0]).__name__}{i}") for i, (number, *case) in enumerate(PLANTED)],
)
def test_fault_24_to_31_a_planted_fault_is_caught_by_the_check_that_names_it(tokenizer, values, name, problem):
    report = report_of(tokenizer, values())
    failed = report.failed
    assert failed, f"nothing was noticed\n{report}"
    assert [result.name for result in failed] == [name], report
    assert re.search(problem, failed[0].detail), failed[0].detail


@pytest.mark.slow
def test_fault_25a_what_only_this_process_or_folder_has_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("letters.txt").write_text("abcdefghijklmnopqrstuvwxyzé?1", encoding="utf-8")
    (failed,) = report_of(FileOfTheFolder(), words()).failed
    assert failed.name == "fresh_process"
    assert "fails (FileNotFoundError" in failed.detail
    assert "the current folder" in failed.detail
    monkeypatch.setattr(sys.modules[__name__], "offset", 3)
    (failed,) = report_of(GlobalVariable(), words()).failed
    assert "what only this process has" in failed.detail


def test_fault_25b_what_another_process_cannot_have_is_skipped_with_the_reason():
    @dataclass(frozen=True)
    class Local(Wave):
        pass

    skipped = {r.name: r.detail for r in report_of(Local(), waves()) if r.status == "skipped"}
    assert skipped == {"fresh_process": skipped["fresh_process"]}
    assert "defined inside a function" in skipped["fresh_process"]


@dataclass(frozen=True)
class Bag(mm.Tokenizer):
    """How often each letter comes, in any order: read, and not written."""

    feature_size = 256

    def encode(self, value):
        if not isinstance(value, str) or not value:
            raise mm.MediaError(f"Bag.encode: {value!r} is no text")
        counts = torch.bincount(torch.tensor([ord(c) % 256 for c in value]), minlength=256)
        return mm.Tokens(counts[None].float(), self.places(1))


@dataclass(frozen=True)
class LowerCase(TextBytes):
    """Loses information, and says so."""

    lossy = True

    def encode(self, value):
        return super().encode(value.lower() if isinstance(value, str) else value)


@dataclass(frozen=True)
class Steps(mm.Tokenizer):
    """A number in 0..1 as one of 8 steps."""

    vocab_size = 8
    lossy = True

    def encode(self, value):
        if not isinstance(value, float) or not 0 <= value <= 1:
            raise mm.MediaError(f"Steps.encode: {value!r} is no number in 0..1")
        return mm.Tokens(torch.tensor([min(int(value * 8), 7)]), self.places(1))

    def decode(self, tokens):
        return (int(tokens.content[0]) + 0.5) / 8 if len(tokens) else 0.0


def recordings():
    draw = np.random.default_rng(1)
    return [(draw.standard_normal(n).astype(np.float32) * 0.1, 16000) for n in (8000, 12000)]


def frames():
    return [np.random.default_rng(i).standard_normal((n, 3)).astype(np.float32) for i, n in enumerate((12, 17, 8))]


HEALTHY = [
    (lambda: TextBytes(causal=True), words),
    (lambda: TextBPE.train(words() * 5, vocab_size=290, causal=True), words),
    (lambda: AudioFrames(causal=True, normalise="fixed"), recordings),
    (lambda: AudioFrames(rate_hz=8000, mels=8, stack=1, window_ms=50.0), recordings),
    (lambda: Codes.train(AudioFrames(rate_hz=8000, mels=8), recordings(), 8, quiet=True), recordings),
    (
        lambda: Codes.train(ImagePatches(patch=4, channels=1, size=(8, 12)), pictures(8, 12), 12, quiet=True),
        lambda: pictures(8, 12),
    ),
    (lambda: ImagePatches(patch=4, channels=1, max_side=16), lambda: pictures(24, 40)),
    (
        lambda: ImagePatches(patch=4, channels=3),
        lambda: [np.uint8(255 * np.stack([x] * 3, -1)) for x in pictures(9, 5)],
    ),
    (lambda: ImagePatches(patch=4, channels=1, size=(8, 12)), lambda: [*pictures(8, 12), *pictures(4, 12)]),
    (lambda: Labels(("cat", "dog", "cow"), several=True), lambda: [["cow", "cat"], ["dog"]]),
    (lambda: Features(3, stack=2, context=1), frames),
    (Wave, waves),
    (Numbers, lists),
    (Bag, words),
    (LowerCase, lambda: ["Good Day", "bad"]),
    (Steps, lambda: [0.1, 0.5, 0.9]),
]


@pytest.mark.parametrize(("make", "values"), HEALTHY)
def test_fault_26a_what_keeps_the_contract_passes(make, values):
    report = report_of(make(), values())
    assert not report.failed, report
    assert next(r for r in report if r.name == "fresh_process").status == "ok"


def test_fault_28a_a_clip_normalised_by_its_own_mean_is_not_causal():
    (failed,) = report_of(AudioFrames(causal=True), recordings()).failed
    assert failed.name == "causal_prefix"


def test_fault_30b_the_kit_leaves_the_process_and_the_values_as_they_were():
    values, before = lists(), (os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    for fault in (SortsInPlace(), ChangesFolder(), SwitchesAutogradOff(), SetsDefaultDtype(), SetsThreads()):
        report_of(fault, values if isinstance(fault, Numbers) else waves())
    assert values == lists()
    assert before == (os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())


SCRIPT = """
from dataclasses import dataclass
import torch
import multimodal as mm
from multimodal.check import check_tokenizer

@dataclass(frozen=True)
class Hashed(mm.Tokenizer):
    vocab_size = 100

    def encode(self, value):
        if not isinstance(value, str) or not value:
            raise mm.MediaError(f"Hashed.encode: {value!r} is no text")
        return mm.Tokens(torch.tensor([hash(word) % 100 for word in value.split()]), self.places(len(value.split())))

print("started")
report = check_tokenizer(Hashed(), ["good day", "bad tune"], raises=False)
print([(r.name, r.status, r.detail) for r in report if r.name == "fresh_process"])
"""


@pytest.mark.slow
def test_fault_25c_a_class_of_the_running_script_is_asked_too(tmp_path):
    (tmp_path / "hashed.py").write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tokenizers"))),
    }
    done = subprocess.run([sys.executable, "hashed.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1
    assert "('fresh_process', 'FAILED', " in done.stdout
    assert "hash seed" in done.stdout
