"""Broken tokenizers beyond those of test_faults_kit.py: what is wrong with each is its docstring, which PLANTED.md lists.

Each varies `Numbers`, `Wave`, `Text`, `Kind` or another small kind that keeps the contract, by one fault.
"""

import gc
import json
import logging
import signal
import sys
import tempfile
import threading
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import ImageFile
from torch import nn

import multimodal as mm
from multimodal_tokenizers import ImagePatches, TextBytes


def words():
    return ["good day", "bad tune", "what? é"]


def lists():
    return [[3, 1, 2, 7, 5], [6, 5, 9], [4, 4, 8, 1]]


def waves():
    return [np.float32(np.sin(np.arange(9) + i) + 0.1 * i) for i in range(3)]


def sounds():
    return [(wave, 16000) for wave in waves()]


def records():
    return [{"b": x, "a": x[::-1].copy(), "rate": 100 + i} for i, x in enumerate(waves())]


def squares():
    draw = np.random.default_rng(0)
    return [draw.random((8, 8), dtype=np.float32) for _ in range(3)]


def classes():
    return ["cat", "dog"]


def dates():
    return [(2024, 3, 1), (2025, 7, 14), (2023, 11, 30)]


@dataclass(frozen=True)
class Numbers(mm.Tokenizer):
    """A list of whole numbers below 100, one token each."""

    vocab_size = 100

    def encode(self, value):
        if type(value) is not list or not value or any(type(x) is not int for x in value):
            raise mm.MediaError(f"{type(self).__name__}.encode: {value!r} is no list of numbers")
        return mm.Tokens(torch.tensor(value), self.places(len(value)))

    def decode(self, tokens):
        return tokens.content.tolist()


@dataclass(frozen=True)
class AnswersByNumber(Numbers):
    """Says which tokens have answers by numbers, not bools."""

    def answered(self, tokens):
        return torch.ones(len(tokens), dtype=torch.int64)


@dataclass(frozen=True)
class ReadNumbers(Numbers):
    """Numbers that are only read."""

    decode = mm.Tokenizer.decode


@dataclass(frozen=True)
class Wave(mm.Tokenizer):
    """An array (n,), a token for each number and its square."""

    feature_size = 2

    def encode(self, value):
        if not isinstance(value, np.ndarray) or value.ndim != 1 or not len(value):
            raise mm.MediaError(f"{type(self).__name__}.encode: {value!r} is no array (n,)")
        x = torch.tensor(value.copy(), dtype=torch.float32)
        return mm.Tokens(torch.stack([x, x**2], 1), self.places(len(x)))

    def decode(self, tokens):
        return tokens.content[:, 0].numpy().copy()


class ReadWave(Wave):
    """A wave that is only read."""

    decode = mm.Tokenizer.decode


class HotByThree(Wave):
    """Says one_hot=3, which does not divide its 2 features."""

    one_hot = 3


class Hot(Numbers):
    """A list of whole numbers below 10, one-hot."""

    vocab_size = None
    feature_size = 10
    one_hot = 10

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(nn.functional.one_hot(tokens.content, 10).float(), tokens.position_NA)

    def decode(self, tokens):
        return tokens.content.argmax(-1).tolist()


class HalfHot(Hot):
    """Says one_hot, and gives halves."""

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content / 2, tokens.position_NA)


class TwiceHot(Hot):
    """Says one_hot, and gives two ones for numbers above 4."""

    def encode(self, value):
        tokens = super().encode(value)
        tokens.content[:, 0] += torch.tensor(value) > 4
        return tokens


class Text(TextBytes):
    """Bytes of a text; errors name the class that is varied."""


class ReadText(TextBytes):
    """A text that is only read."""

    decode = mm.Tokenizer.decode
    text = False


@dataclass(frozen=True)
class Kind(mm.Tokenizer):
    """One of three names."""

    names: tuple[str, ...] = ("cat", "dog", "cow")
    classes = True

    @property
    def vocab_size(self):
        return len(self.names)

    def encode(self, value):
        if value not in self.names:
            raise mm.MediaError(f"{type(self).__name__}.encode: {value!r} is none of {self.names}")
        return mm.Tokens(torch.tensor([self.names.index(value)]), torch.zeros(1, 3))

    def decode(self, tokens):
        return self.names[int(tokens.content[0])]


@dataclass(frozen=True)
class Record(mm.Tokenizer):
    """A mapping of two arrays (n,) and a rate, a token for each moment."""

    feature_size = 3

    def encode(self, value):
        if not isinstance(value, dict) or set(value) != {"a", "b", "rate"} or not len(value["a"]):
            raise mm.MediaError(f"{type(self).__name__}.encode: {value!r} is no such mapping")
        x = np.stack([*self.columns(value), np.full(len(value["a"]), self.rate(value), np.float32)], 1)
        return mm.Tokens(torch.from_numpy(x.astype(np.float32)), self.places(len(x)))

    def columns(self, value):
        return [value["a"], value["b"]]

    def rate(self, value):
        return value["rate"] / 100


# what a value holds is lost


class DropsTheFirst(ReadWave):
    """Takes the first number for a header."""

    def encode(self, value):
        return super().encode(value[1:] if isinstance(value, np.ndarray) and len(value) > 1 else value)


class EverySecond(ReadNumbers):
    """Leaves out every second element."""

    def encode(self, value):
        return super().encode(value[1::2] + value[-1:] if type(value) is list else value)


class HeadAndTail(ReadText):
    """Keeps the first and last 200 letters of a long text."""

    def encode(self, value):
        return super().encode(value[:200] + value[-200:] if isinstance(value, str) and len(value) > 400 else value)


class KeepsTheEnd(ReadWave):
    """Keeps the last 300 numbers of a long wave."""

    def encode(self, value):
        return super().encode(value[-300:] if isinstance(value, np.ndarray) else value)


class MergesRuns(ReadNumbers):
    """Merges equal neighbours into one."""

    def encode(self, value):
        if type(value) is list:
            value = [x for i, x in enumerate(value) if i == 0 or x != value[i - 1]]
        return super().encode(value)


class IgnoresTheRate(ReadWave):
    """Takes (wave, rate) and never looks at the rate."""

    def encode(self, value):
        return super().encode(value[0] if isinstance(value, tuple) else None)


class IgnoresAnEntry(Record):
    """Takes a mapping with a rate and never looks at it."""

    def rate(self, value):
        float(value["rate"])
        return 0.0


class LowersReadText(ReadText):
    """Makes letters small, of a text that is only read."""

    def encode(self, value):
        return super().encode(value.lower() if isinstance(value, str) else value)


class StripsAccents(ReadText):
    """Takes accents off, of a text that is only read."""

    def encode(self, value):
        if isinstance(value, str):
            value = "".join(c for c in unicodedata.normalize("NFD", value) if not unicodedata.combining(c))
        return super().encode(value)


class Squares(ReadWave):
    """Encodes the size of each number without its sign."""

    def encode(self, value):
        return super().encode(abs(value) if isinstance(value, np.ndarray) else value)


class WholeNumbers(ReadWave):
    """Cuts fractions off."""

    def encode(self, value):
        return super().encode(np.floor(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value)


class ClipsNumbers(ReadWave):
    """Cuts numbers off at -10 and 10."""

    def encode(self, value):
        return super().encode(value.clip(-10, 10) if isinstance(value, np.ndarray) else value)


class ClipsIds(ReadNumbers):
    """Makes every number above 99 a 99."""

    def encode(self, value):
        return super().encode([min(x, 99) for x in value] if type(value) is list else value)


class UnknownLetters(ReadText):
    """Makes every letter beyond Latin a question mark."""

    def encode(self, value):
        return super().encode(value.encode("latin-1", "replace").decode("latin-1") if isinstance(value, str) else value)


class DropsLetters(ReadText):
    """Leaves out letters that it does not know."""

    def encode(self, value):
        return super().encode(value.encode("latin-1", "ignore").decode("latin-1") if isinstance(value, str) else value)


class MissingIsZero(Wave):
    """Makes NaN a 0, in silence."""

    def encode(self, value):
        return super().encode(np.nan_to_num(value) if isinstance(value, np.ndarray) else value)


class MissingIsMean(Wave):
    """Fills NaN with the mean of the others."""

    def encode(self, value):
        if isinstance(value, np.ndarray) and np.isnan(value).any():
            value = np.where(np.isnan(value), np.float32(np.nanmean(value)), value)
        return super().encode(value)


class NoneIsZero(Numbers):
    """Makes None a 0."""

    def encode(self, value):
        return super().encode([0 if x is None else x for x in value] if type(value) is list else value)


class SkipsStrangers(Numbers):
    """Leaves out elements that are no numbers."""

    def encode(self, value):
        return super().encode([x for x in value if type(x) is int] if type(value) is list else value)


class UnknownIsFirst(Kind):
    """Encodes a name that it does not know as the first class."""

    def encode(self, value):
        return super().encode(
            value if not isinstance(value, str) or not value or value in self.names else self.names[0]
        )


class FoldsClasses(Kind):
    """Encodes any name by its length."""

    def encode(self, value):
        if not isinstance(value, str) or not value:
            return super().encode(value)
        given = {"cat": 0, "dog": 1, "cow": 2}
        return mm.Tokens(torch.tensor([given.get(value, len(value) % 3)]), torch.zeros(1, 3))


class NamesTwice(Kind):
    """Has one name for two classes."""


# memory and order of the same value


class OrderOfMemory(ImagePatches):
    """Reads the numbers as they lie in memory, not as the array has them."""

    def encode(self, value):
        if isinstance(value, np.ndarray) and value.ndim == 2:
            value = np.frombuffer(value.tobytes("A"), value.dtype).reshape(value.shape)
        return super().encode(value)


class OrderOfKeys(Record):
    """Takes the columns of a mapping in the order of its keys."""

    def columns(self, value):
        return [x for x in value.values() if isinstance(x, np.ndarray)]


class IgnoresGaps(Wave):
    """Reads the memory behind an array, past the gaps of a view."""

    def encode(self, value):
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.base is not None and value.strides[0] > 0:
            value = value.base.reshape(-1)[: len(value)]
        return super().encode(value)


# what is left behind


@dataclass(frozen=True)
class LearnsItsMean(Wave):
    """Takes the first number it meets as a setting of its own."""

    mean: float | None = None

    def encode(self, value):
        tokens = super().encode(value)
        if self.mean is None:
            object.__setattr__(self, "mean", float(tokens.content[0, 0]))
        return tokens


class Prints(Wave):
    """Prints the shape of every value."""

    def encode(self, value):
        print("encoding", np.shape(value))
        return super().encode(value)


class SwitchesGarbageOff(Wave):
    """Switches the collection of garbage off, to be fast."""

    def encode(self, value):
        gc.disable()
        return super().encode(value)


class SilencesLogging(Wave):
    """Switches logging off for the whole process."""

    def encode(self, value):
        logging.disable(logging.CRITICAL)
        return super().encode(value)


class TakesSignals(Wave):
    """Ignores SIGTERM from then on."""

    def encode(self, value):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return super().encode(value)


class ReplacesOutput(Wave):
    """Puts its own stream in the place of standard output."""

    def encode(self, value):
        sys.stdout = sys.__stderr__
        return super().encode(value)


class ReadsCutPictures(Wave):
    """Makes PIL accept pictures that are cut, everywhere."""

    def encode(self, value):
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        return super().encode(value)


class LeavesACache(Wave):
    """Writes a file into the current folder."""

    def encode(self, value):
        Path("wave-cache.json").write_text(json.dumps(np.shape(value)), encoding="utf-8")
        return super().encode(value)


class LeavesTemporaryFiles(Wave):
    """Leaves a temporary file for every value."""

    def encode(self, value):
        with tempfile.NamedTemporaryFile(suffix=".raw", delete=False) as file:
            file.write(b"0")
        return super().encode(value)


class LeavesFilesOpen(Wave):
    """Opens a file for every value and holds on to it."""

    opened: ClassVar[list] = []

    def encode(self, value):
        self.opened.append(open(__file__, "rb"))  # noqa: SIM115
        return super().encode(value)


class LeavesThreads(Wave):
    """Starts a thread for every value, which goes on."""

    def encode(self, value):
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        return super().encode(value)


class HoldsValues(Wave):
    """Holds on to every value it has met."""

    met: ClassVar[list] = []

    def encode(self, value):
        self.met.append(value)
        return super().encode(value)


class SharedScratch(Wave):
    """Works in one buffer that all threads share."""

    scratch = np.zeros(4096, np.float32)

    def encode(self, value):
        if not isinstance(value, np.ndarray) or value.ndim != 1 or len(value) > 4096:
            return super().encode(None)
        self.scratch[: len(value)] = value
        time.sleep(0.002)
        return super().encode(self.scratch[: len(value)])


class MainThreadOnly(Wave):
    """Needs the main thread, as handlers of signals do."""

    def encode(self, value):
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        return super().encode(value)


@dataclass(frozen=True)
class LocalDates(mm.Tokenizer):
    """Encodes a date as days by the time zone of this machine."""

    feature_size = 1

    def encode(self, value):
        if not isinstance(value, tuple) or len(value) != 3 or any(type(x) is not int for x in value):
            raise mm.MediaError(f"LocalDates.encode: {value!r} is no date")
        days = time.mktime((*value, 0, 0, 0, 0, 0, 0)) / 86400 - 19000
        return mm.Tokens(torch.tensor([[days]], dtype=torch.float32), self.places(1))


class EndsTheProgram(Wave):
    """Ends the program at a value it cannot read."""

    def encode(self, value):
        if not isinstance(value, (np.ndarray, str)):
            sys.exit("bad value")
        return super().encode(value)


# what is declared


class HugeVocabulary(Numbers):
    """Declares more ids than memory has room for."""

    vocab_size = 2**40


class WritesMoreThanItHas(Wave):
    """Declares more written features than a token has."""

    written_features = 5


class NegativeLearned(Wave):
    """Declares a negative number of learned tokens."""

    learned = -1


# places


class UnixTime(ReadWave):
    """Puts tokens at seconds since 1970."""

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA * 256 + 1.7e9)

    step = (256.0, 1.0, 1.0)


class PlacesByLength(Wave):
    """Spreads the places of a value that is written over 0 to 8, whatever its length."""

    def places(self, count):
        return mm.at_times(torch.linspace(0, 8, count)) if count > 1 else mm.at_times(torch.zeros(count))


class CountsDown(Numbers):
    """Counts rows of what is written from its end."""

    def places(self, count):
        places_NA = super().places(count)
        places_NA[:, 1] = torch.arange(count, dtype=torch.float32).flip(0)
        return places_NA


# decode and what is shown


class DecodesInPlace(Wave):
    """Changes the tokens that it decodes."""

    def decode(self, tokens):
        return tokens.content[:, 0].mul_(2).numpy().copy() / 2


class DecodesWithNoise(Wave):
    """Adds noise of a generator of its own to what it decodes."""

    lossy = True
    draw: ClassVar = np.random.default_rng(0)

    def decode(self, tokens):
        return super().decode(tokens) + np.float32(1e-4) * self.draw.standard_normal(len(tokens), dtype=np.float32)


class EndsSentences(Text):
    """Decodes with a full stop at the end, and takes it off when it encodes."""

    def encode(self, value):
        return super().encode(value.removesuffix(".") if isinstance(value, str) else value)

    def decode(self, tokens):
        return super().decode(tokens) + "."


class WritesBackwards(Text):
    """Encodes the last letter first."""

    def encode(self, value):
        return super().encode(value[::-1] if isinstance(value, str) else value)

    def decode(self, tokens):
        return super().decode(tokens)[::-1]


class WantsNumbers(Kind):
    """Measures compare the name of a class with its number."""

    def wanted(self, value):
        return str(self.names.index(value))


class WantsAnother(Wave):
    """Measures compare a wave with a wave of other numbers."""

    def wanted(self, value):
        return value + 1


class WrittenByAnother(Text):
    """Is written with other ids than it is read with."""

    @property
    def written(self):
        return Numbers()


class WrittenUnread(Numbers):
    """Is written by a tokenizer without decode."""

    @property
    def written(self):
        return ReadNumbers()


class SavesAnother(Text):
    """Saves a text without its last letter."""

    def write(self, value, path):
        return super().write(value[:-1], path)


class SavesElsewhere(Numbers):
    """Saves its value, and does not say where."""

    def write(self, value, path):
        super().write(value, path)


class SavesWithoutEnding(Numbers):
    """Saves its value under a name that no program opens."""

    def write(self, value, path):
        Path(path).write_text(json.dumps(value), encoding="utf-8")
        return Path(path)


class SavesUnread(Numbers):
    """Saves a format of its own that it cannot read."""

    def write(self, value, path):
        path = Path(path).with_suffix(".numbers")
        path.write_text(" ".join(map(str, value)), encoding="utf-8")
        return path


class OneNameTooFew(Wave):
    """Names all tokens but the last."""

    def token_names(self, tokens):
        return [f"{x:.2f}" for x in tokens.content[:-1, 0].tolist()]


class NamesAreNumbers(Numbers):
    """Gives numbers as the names of tokens."""

    def token_names(self, tokens):
        return tokens.content.tolist()


class TurnedPicture(ImagePatches):
    """Shows a square picture turned: its rows as columns."""

    def picture(self, tokens):
        return super().picture(tokens).transpose(0, 1)


class MirroredPicture(ImagePatches):
    """Shows a picture from right to left."""

    def picture(self, tokens):
        return super().picture(tokens).flip(1)


# embedding


class Rows(nn.Module):
    """A module, and what a fault makes of its content and its rows."""

    def __init__(self, inner, before=lambda content: content, then=lambda rows: rows):
        super().__init__()
        self.inner, self.before, self.then = inner, before, then

    def forward(self, content):
        return self.then(self.inner(self.before(content)))


class EmbedsInPlace(Wave):
    """Normalises the content that it embeds in place."""

    def embed(self, width):
        return Rows(super().embed(width), lambda content: content.mul_(0.5))


class EmbedsByNoise(Wave):
    """Adds noise to rows in evaluation too."""

    def embed(self, width):
        return Rows(super().embed(width), then=lambda rows: rows + 0.01 * torch.randn_like(rows))


class EmbedsHalf(Wave):
    """Embeds the first feature only."""

    def embed(self, width):
        return Rows(super().embed(width), lambda content: content * torch.ones_like(content).cumsum(1).le(1))


class TableTooSmall(ReadNumbers):
    """Has a row too few in its table."""

    def embed(self, width):
        return nn.Embedding(self.vocab_size - 1, width)


class IdsShareRows(ReadNumbers):
    """Gives two neighbouring ids one row."""

    def embed(self, width):
        return Rows(super().embed(width), lambda ids: ids // 2)


class OwnNumbers(Wave):
    """Draws its first weights from a generator of NumPy's, without a seed."""

    def embed(self, width):
        linear = super().embed(width)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(np.random.default_rng().standard_normal(linear.weight.shape)))
        return linear


class SeedsInEmbed(Wave):
    """Seeds torch's generator before it draws its weights."""

    def embed(self, width):
        torch.manual_seed(42)
        return super().embed(width)


class OneModule(Wave):
    """Gives every model the same module."""

    made: ClassVar[dict] = {}

    def embed(self, width):
        return self.made.setdefault(width, super().embed(width))


class RawSamples(Wave):
    """Encodes samples as the numbers of 16 bits that they are."""

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content * 32768, tokens.position_NA)

    def decode(self, tokens):
        return super().decode(tokens) / 32768


class AlmostNothing(Wave):
    """Embeds rows of a billionth."""

    def embed(self, width):
        return Rows(super().embed(width), then=lambda rows: rows * 1e-9)


class FixedFloats(Wave):
    """Computes in float32, whatever the type of its weights is."""

    def embed(self, width):
        return Rows(super().embed(width), lambda content: content.float())


class TensorsOfTheCPU(Wave):
    """Adds a tensor that stays on the CPU."""

    def embed(self, width):
        return Rows(super().embed(width), then=lambda rows: rows + torch.linspace(0, 1, rows.shape[1]))


class Convolves(nn.Module):
    """A convolution over the tokens of each value, of each with its neighbours on both sides."""

    reads_places = True

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv1d(2, width, 3, padding=1)

    def forward(self, content, places):
        return torch.cat([self.conv(x.T[None])[0].T for x in content.split(list(places.lengths))])


class LooksAhead(ReadWave):
    """Declares itself causal, and its convolution sees the next token."""

    causal = True

    def embed(self, width):
        return Convolves(width)


# (tokenizer, values, the check that must fail, words of its message)
PLANTED = [
    (AnswersByNumber(), lists, "relations_as_declared", "answered gave torch.int64"),
    (HotByThree(), waves, "one_hot_as_declared", "one_hot=3: a whole number that divides feature_size=2"),
    (
        HalfHot(),
        lists,
        "one_hot_as_declared",
        "declares one_hot=10, but gave a group of features that is not a 1 among 0s",
    ),
    (TwiceHot(), lists, "one_hot_as_declared", "declares one_hot=10, but gave a group"),
    (DropsTheFirst(), waves, "every_part_counts", "begins differently"),
    (EverySecond(), lists, "every_part_counts", "begins differently"),
    (HeadAndTail(), words, "every_part_counts", "goes on differently"),
    (KeepsTheEnd(), waves, "every_part_counts", "begins differently"),
    (MergesRuns(), lists, "every_part_counts", "equal neighbours are merged"),
    (IgnoresTheRate(), sounds, "every_part_counts", r"whatever entry 1 is \(16000 here\)"),
    (IgnoresAnEntry(), records, "every_part_counts", r"whatever 'rate' is \(100 here\)"),
    (LowersReadText(), words, "variants_differ", "the case of a value is lost"),
    (StripsAccents(), words, "variants_differ", "accents of a value are lost"),
    (Squares(), waves, "variants_differ", "signs of a value are lost"),
    (WholeNumbers(), lambda: [x * 9 for x in waves()], "variants_differ", "fractions of a value are lost"),
    (ClipsNumbers(), waves, "extremes_differ", "rare or large is replaced in silence"),
    (ClipsIds(), lists, "extremes_differ", "rare or large is replaced in silence"),
    (UnknownLetters(), words, "extremes_differ", "good day日.* and .*good day本"),
    (DropsLetters(), words, "extremes_differ", "rare or large is replaced in silence"),
    (MissingIsZero(), waves, "missing_seen", "with a missing number in it"),
    (MissingIsMean(), waves, "missing_seen", "with a missing number in it"),
    (NoneIsZero(), lists, "missing_seen", "with a missing number in it"),
    (SkipsStrangers(), lists, "foreign_element_refused", "refuse what an element cannot be"),
    (UnknownIsFirst(), classes, "unknown_class_refused", "was encoded as str 'cat'"),
    (FoldsClasses(), classes, "unknown_class_refused", "is no class of this kind and was encoded"),
    (
        NamesTwice(("cat", "dog", "cat")),
        classes,
        "every_class_named",
        r"class 2 decodes to str 'cat', which is encoded as class \[0\]",
    ),
    (OrderOfMemory(patch=4, channels=1), squares, "equal_values_agree", "in the order of columns"),
    (OrderOfKeys(), records, "equal_values_agree", "with its keys in another order"),
    (IgnoresGaps(), waves, "equal_values_agree", "as a view with gaps"),
    (LearnsItsMean(), waves, "settings_untouched", "encode changes the settings of LearnsItsMean"),
    (Prints(), waves, "process_untouched", "encode prints 'encoding"),
    (SwitchesGarbageOff(), waves, "process_untouched", "garbage collection"),
    (SilencesLogging(), waves, "process_untouched", "logging.disable"),
    (TakesSignals(), waves, "process_untouched", "the handler of SIGTERM"),
    (ReplacesOutput(), waves, "process_untouched", "sys.stdout"),
    (ReadsCutPictures(), waves, "process_untouched", "PIL's loading of cut pictures"),
    (LeavesACache(), waves, "leaves_nothing", "wave-cache.json in the current folder"),
    (LeavesTemporaryFiles(), waves, "leaves_nothing", "raw in the temporary folder"),
    (LeavesFilesOpen(), waves, "leaves_nothing", "leaves a file open"),
    (LeavesThreads(), waves, "leaves_nothing", "Thread.* running"),
    (HoldsValues(), waves, "value_let_go", "3 of 3 arrays are still held"),
    (SharedScratch(), waves, "threads_agree", "other tokens while other threads encode"),
    (MainThreadOnly(), waves, "threads_agree", "fails in another thread .*main thread"),
    (LocalDates(), dates, "fresh_process", "the time zone of the machine"),
    (EndsTheProgram(), waves, "wrong_type_refused", "it ends the whole program"),
    (HugeVocabulary(), lists, "declared", "beyond memory"),
    (WritesMoreThanItHas(), waves, "declared", "written_features=5"),
    (NegativeLearned(), waves, "declared", "learned=-1"),
    (UnixTime(), waves, "places_in_reach", "steps from the start"),
    (PlacesByLength(), waves, "places_grow", r"places\(1\)|places\(2\)"),
    (CountsDown(), lists, "places_grow", r"places\(1\) are not the first 1"),
    (DecodesInPlace(), waves, "decode_pure", "decode changes the tokens"),
    (DecodesWithNoise(), waves, "decode_pure", "decode of the same tokens gives"),
    (EndsSentences(), lambda: ["good day.", "bad tune."], "text_grows", "shown token by token"),
    (WritesBackwards(), words, "text_grows", "shown token by token"),
    (WantsNumbers(), classes, "wanted_as_decoded", r"wanted\(str 'cat'\) is str '0'"),
    (WantsAnother(), waves, "wanted_as_decoded", "nothing would ever be counted as right"),
    (WrittenByAnother(), words, "written_fits", "they share weights"),
    (WrittenUnread(), lists, "written_fits", "has no decode"),
    (SavesAnother(), words, "file_holds_value", "'good day' as value.txt, which reads as str 'good da'"),
    (SavesElsewhere(), lists, "file_holds_value", "write returns NoneType None, wanted the path"),
    (SavesWithoutEnding(), lists, "file_holds_value", "whose name has no ending"),
    (SavesUnread(), lists, "file_holds_value", "encode reads no file that write makes"),
    (OneNameTooFew(), waves, "names_for_tokens", "8 names for 9 tokens"),
    (NamesAreNumbers(), lists, "names_for_tokens", "every name is a text"),
    (TurnedPicture(patch=4, channels=1), squares, "picture_tiles", "is not drawn in tile"),
    (MirroredPicture(patch=4, channels=1), squares, "picture_tiles", "is not drawn in tile"),
    (EmbedsInPlace(), waves, "embed_pure", "embed changes its content in place"),
    (EmbedsByNoise(), waves, "embed_pure", "other rows the next time"),
    (EmbedsHalf(), waves, "embed_reads_all", "whatever feature 1 of 2 is"),
    (TableTooSmall(), lists, "embed_reads_all", r"no row for some of the ids 0\.\.99"),
    (IdsShareRows(), lists, "embed_reads_all", "100 ids only 50 different rows"),
    (OwnNumbers(), waves, "embed_by_seed", "the same seed gives other first weights weight"),
    (SeedsInEmbed(), waves, "embed_by_seed", "embed seeds torch's global generator"),
    (OneModule(), waves, "embed_by_seed", "share the weights weight, bias"),
    (RawSamples(), waves, "embed_scale", "bring features to about"),
    (AlmostNothing(), waves, "embed_scale", r"1e-|[0-9]e-10"),
    (FixedFloats(), waves, "embed_moves", "embed fails in bfloat16"),
    (TensorsOfTheCPU(), waves, "embed_moves", "torch.linspace"),
    (LooksAhead(), waves, "embed_causal", "pad a convolution in front"),
]
