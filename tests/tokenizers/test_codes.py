"""What lets pictures and sound be written: codebooks against scikit-learn, sounds and pictures that come back from their tokens."""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

import multimodal as mm
from multimodal.check import ConformanceError, head_checks, tokenizer_checks
from multimodal.heads.flow import FlowMatching
from multimodal.shapes import CheckpointError, ConfigError, MediaError
from multimodal.tokenizer import Tokenizer, Tokens
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes
from multimodal_tokenizers import codes as codes_module
from multimodal_tokenizers.codes import BOOK, Codes, nearest

DATA = Path(__file__).parents[2] / "multimodal" / "demo"
SPOKEN_HZ = 8000
GREY = ImagePatches(patch=4, channels=1)
RANDOM = np.random.default_rng(0)
PICTURES = [RANDOM.random((8, 12), dtype=np.float32) for _ in range(4)]
COLOURED = [RANDOM.random((8, 12, 3), dtype=np.float32) for _ in range(3)]
SIZES = [RANDOM.random(shape, dtype=np.float32) for shape in ((8, 12), (9, 5), (8, 8))]


@pytest.fixture(scope="module")
def digits() -> list[torch.Tensor]:
    return list(torch.tensor(load_digits().images / 16, dtype=torch.float32)[:400])


@pytest.fixture(scope="module")
def words() -> list[torch.Tensor]:
    wave, rate = soundfile.read(DATA / "spoken_words.flac", dtype="float32")
    assert rate == SPOKEN_HZ
    rows = json.loads((DATA / "spoken_words.json").read_text(encoding="utf-8"))
    return [torch.from_numpy(wave[r["start"] : r["start"] + r["length"]].copy()) for r in rows[:: len(rows) // 8]]


def rows_of(of: Tokenizer, values: list[Any]) -> torch.Tensor:
    return torch.cat([of(value).content[:, : of.written_features] for value in values])


def misses(codes: Codes, values: list[Any]) -> float:
    """Squared distance of all tokens from their codes."""
    return sum(
        float((codes.features(codes(value)).content - rows_of(codes.of, [value])).square().sum()) for value in values
    )


# Codes


@pytest.mark.parametrize("size", [16, 64])
def test_a_codebook_is_as_good_as_that_of_scikit_learn(digits, size: int) -> None:
    codes = Codes.train(GREY, digits, size)
    theirs = KMeans(size, n_init=1, random_state=0, max_iter=100).fit(rows_of(GREY, digits).numpy()).inertia_
    assert misses(codes, digits) < 1.04 * theirs


def test_more_codes_miss_less_and_any_are_better_than_random_ones(digits) -> None:
    rows = rows_of(GREY, digits)
    found = []
    for size in (4, 16, 64):
        found.append(misses(Codes.train(GREY, digits, size), digits))
        some = rows[torch.randperm(len(rows))[:size]]
        assert found[-1] < 0.9 * float(nearest(rows, some)[1].sum())
    assert found[0] > 1.2 * found[1] > 1.2**2 * found[2]
    mean = float((rows - rows.mean(0)).square().sum())
    assert misses(Codes.train(GREY, digits, 1), digits) == pytest.approx(mean, rel=1e-4)


def test_every_code_is_used_and_is_the_mean_of_its_rows(digits) -> None:
    codes = Codes.train(GREY, digits, 32, rounds=1000)
    rows = rows_of(GREY, digits)
    ids = torch.cat([codes(value).content for value in digits])
    assert torch.equal(ids.unique(), torch.arange(32))
    means = torch.stack([rows[ids == c].mean(0) for c in range(32)])
    torch.testing.assert_close(codes.codes_VF, means, atol=0.02, rtol=0)


def test_codes_that_nothing_is_nearest_to_are_moved(digits, monkeypatch) -> None:
    good = misses(Codes.train(GREY, digits, 16), digits)
    monkeypatch.setattr(codes_module, "_seeded", lambda rows, size, *_: rows[:1].repeat(size, 1))
    codes = Codes.train(GREY, digits, 16)  # all begin at one place, and all but one are dead
    assert len(torch.cat([codes(value).content for value in digits]).unique()) == 16
    assert misses(codes, digits) < 1.2 * good


def test_nearest_is_nearest() -> None:
    rows, codes = torch.randn(300, 7) + 3, torch.randn(40, 7) + 3
    ids, errors = nearest(rows, codes)
    distance = (rows[:, None] - codes[None]).double().square().sum(-1)
    assert torch.equal(ids, distance.argmin(1))
    torch.testing.assert_close(errors.double(), distance.min(1).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["sincos", "learned", "rotary"])
def test_as_many_codes_as_different_patches_lose_nothing(position: str) -> None:
    of = ImagePatches(patch=4, channels=1, position=position)  # type: ignore[arg-type]
    tiles = torch.rand(5, 4, 4)
    pictures = [
        torch.cat([torch.cat([tiles[c] for c in row], 1) for row in torch.randint(5, (2, 3)).tolist()])
        for _ in range(20)
    ]
    codes = Codes.train(of, pictures, 5)  # places are no part of a code: 6 places times 5 tiles would be 30
    for picture in pictures:
        torch.testing.assert_close(codes.decode(codes(picture))[0], picture, atol=1e-6, rtol=0)
    with pytest.raises(
        ConfigError,
        match=r"^Codes.train: the values have only 5 different rows; use size=5 or less, or give more values$",
    ):
        Codes.train(of, pictures, 6)


def test_rare_rows_are_found_among_many_equal_ones() -> None:
    blank, rare = np.zeros((32, 32)), np.ones((4, 4))
    rare[0, 0] = 0
    codes = Codes.train(GREY, [blank] * 20 + [rare], 2)
    assert misses(codes, [rare, blank]) == 0


def test_the_same_values_and_seed_give_the_same_book(digits) -> None:
    one, two = (Codes.train(GREY, digits[:100], 32, seed=3) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert Codes.train(GREY, digits[:100], 32, seed=4) != one
    state = torch.get_rng_state()
    some = Codes.train(GREY, digits, 8, max_rows=200)
    assert torch.equal(torch.get_rng_state(), state)
    assert misses(some, digits) < 1.3 * misses(Codes.train(GREY, digits, 8), digits)


def test_pictures_of_one_size_can_be_written(digits) -> None:
    codes = Codes.train(GREY, digits[:50], 16)
    assert (codes.vocab_size, codes.feature_size, codes.classes, codes.length) == (16, None, False, 4)
    assert codes.places(3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    written = codes.decode(Tokens(torch.tensor([3, 1, 4, 1]), codes.places(4)))
    assert written.shape == (1, 8, 8)
    tiles = codes.codes_VF[[3, 1, 4, 1]].reshape(2, 2, 4, 4) / 2 + 0.5
    torch.testing.assert_close(written[0], tiles.permute(0, 2, 1, 3).reshape(8, 8).clamp(0, 1))
    assert codes.picture(codes(digits[0])).shape == (8, 8, 1)
    with pytest.raises(ConfigError, match=r"^Codes: places\(5\), but a written value has length=4$"):
        codes.places(5)


def test_other_sizes_are_read_and_decoded() -> None:
    codes = Codes.train(GREY, PICTURES, 8)
    other = codes(SIZES[1])
    assert len(other) == 3 * 2
    assert codes.decode(other).shape == (1, 12, 8)
    several = Codes.train(GREY, SIZES, 8)
    assert several.length is None
    with pytest.raises(
        ConfigError, match=r"^ImagePatches: to write pictures, give it size=\(rows, columns\) in pixels"
    ):
        several.places(1)


def test_what_the_inner_kind_foresees_is_not_remembered(digits) -> None:
    of = ImagePatches(patch=4, channels=1, size=(8, 8))
    codes = Codes.train(of, digits[:20], 8)
    assert codes.length == 4
    assert torch.equal(codes.places(4), of.places(4))
    assert len(codes.book) < len(Codes.train(GREY, digits[:20], 8).book)
    clips = [(RANDOM.standard_normal(1600).astype(np.float32), 8000) for _ in range(3)]
    sound = Codes.train(AudioFrames(rate_hz=8000, mels=8), clips, 4)
    assert sound.length is None  # all clips are equally long, but the next may be longer
    assert sound.step == sound.of.step


def test_a_book_travels_with_a_checkpoint(digits, tmp_path: Path) -> None:
    codes = Codes.train(GREY, digits[:50], 16, causal=True)
    model = mm.Model({"picture": codes, "text": TextBytes()}, mm.Core.tiny(), ["text -> picture"])
    loaded = mm.Model.load(model.save(tmp_path / "model"))
    again = loaded.packer.tokenizers["picture"]
    assert again == codes
    assert pickle.loads(pickle.dumps(codes)) == codes
    assert (again.length, again.causal) == (4, True)
    assert torch.equal(again(digits[60]).content, codes(digits[60]).content)
    sample = [{"text": "a", "picture": digits[0]}]
    assert torch.equal(
        *(m.losses(m.pack("text -> picture", sample))["text -> picture"] for m in (model.eval(), loaded))
    )
    (tmp_path / "model" / "tokenizers" / "picture" / BOOK).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"Codes: codebook\.safetensors is damaged or cut short"):
        mm.Model.load(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"^Codes: its file codebook\.safetensors is missing$"):
        Codes.from_config(codes.config(), {})


@dataclass(frozen=True)
class ReadOnly(Tokenizer):
    feature_size = 2

    def encode(self, value: Any) -> Tokens:
        raise NotImplementedError


class WithFile(ImagePatches):
    """Patches whose tokenizer keeps a file, under a name of its own and under that of the book."""

    def files(self) -> dict[str, bytes]:
        return {"note": b"mine", BOOK: b"also mine"}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: dict[str, bytes] | None = None) -> "WithFile":
        assert files == {"note": b"mine", BOOK: b"also mine"}
        return super().from_config(config)


def test_the_files_of_the_inner_kind_travel_too(tmp_path: Path) -> None:
    codes = Codes.train(WithFile(patch=4, channels=1), PICTURES, 4)
    model = mm.Model({"picture": codes, "text": TextBytes()}, mm.Core.tiny(), ["text -> picture"])
    assert mm.Model.load(model.save(tmp_path / "model")).packer.tokenizers["picture"] == codes


def test_what_cannot_be_coded(digits) -> None:
    for of, message in [
        (TextBytes(), "Codes: TextBytes has no features to code; its values are ids"),
        (Labels(("a",), several=True), "Codes: Labels has no features to code; its values are classes"),
        (ReadOnly(), "Codes: ReadOnly has no decode, so its codes could not be decoded"),
        (ImagePatches, "Codes: of is .*ImagePatches.*, not a Tokenizer made by its constructor"),
    ]:
        with pytest.raises(ConfigError, match=f"^{message}$"):
            Codes.train(of, digits, 4)
    with pytest.raises(ConfigError, match=r"^Codes.train: size=0 and rounds=100 must be at least 1$"):
        Codes.train(GREY, digits, 0)
    with pytest.raises(ConfigError, match=r"^Codes.train: there are no values to learn from$"):
        Codes.train(GREY, [], 4)
    codes = Codes.train(GREY, digits[:10], 4)
    with pytest.raises(
        ConfigError, match=r"^Codes: the codes have 16 features, but ImagePatches writes 48; train a book"
    ):
        Codes(ImagePatches(patch=4), codes.book)
    with pytest.raises(MediaError, match=r"^Codes.encode: ImagePatches.encode: image is 2x2 pixels"):
        codes(np.zeros((2, 2)))


# Sound


@pytest.mark.parametrize("normalise", ["fixed", "clip"])
@pytest.mark.parametrize("stack", [1, 4])
def test_spoken_words_come_back(words, normalise: str, stack: int) -> None:
    audio = AudioFrames(rate_hz=SPOKEN_HZ, mels=64, stack=stack, normalise=normalise)  # type: ignore[arg-type]
    plain = AudioFrames(rate_hz=SPOKEN_HZ, mels=64, stack=1, normalise="fixed")
    for word in words:
        tokens = audio((word, SPOKEN_HZ))
        wave, rate_hz = audio.decode(tokens)
        assert (rate_hz, wave.dtype) == (SPOKEN_HZ, torch.float32)
        assert 0 <= len(wave) - len(word) < stack * audio.hop_samples
        assert len(wave) == len(tokens) * stack * audio.hop_samples
        assert 0.01 < wave.abs().max() <= 1
        before, after = (plain.spectrogram(x)[: len(word) // audio.hop_samples] for x in (word, wave))
        if normalise == "clip":  # its level and contrast are gone
            before, after = ((x - x.mean()) / x.std() for x in (before, after))
        assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.97
        if normalise == "fixed":
            assert (after - before).square().mean().sqrt() * 4 < 0.6  # nats; the words' own spread is about 4
            loud, mine = (float(x.square().mean().sqrt()) for x in (word, wave[: len(word)]))
            assert mine == pytest.approx(loud, rel=0.2)
        assert torch.equal(audio.decode(tokens)[0], wave)


def test_sound_comes_back_in_its_place() -> None:
    """A click and a tone lie where they lay, to within half a window, from the first frame to the last."""
    audio = AudioFrames(normalise="fixed", stack=1)
    for at_s in (0.0, 0.213, 0.45):
        wave_S = torch.zeros(8000)
        at = int(at_s * 16000)
        wave_S[at : at + 800] = torch.sin(2 * torch.pi * 1000 * torch.arange(800) / 16000) * 0.5
        got, _ = audio.decode(audio((wave_S, 16000)))
        place = torch.arange(len(got)) * got.square()
        assert float(place.sum() / got.square().sum()) == pytest.approx(at + 400, abs=0.0125 * 16000)
        spectrum = torch.fft.rfft(got).abs()
        assert float(spectrum.argmax() / len(got) * 16000) == pytest.approx(1000, abs=40)


def test_anything_that_a_model_may_draw_is_a_sound() -> None:
    audio = AudioFrames(rate_hz=8000, mels=8, stack=2)
    assert len(audio.decode(Tokens(torch.zeros(0, 16), audio.places(0)))[0]) == 0
    for scale in (0.0, 1.0, 100.0):
        wave, _ = audio.decode(Tokens(torch.randn(3, 16) * scale, audio.places(3)))
        assert wave.isfinite().all()
        assert wave.abs().max() <= 1
    state = torch.get_rng_state()
    audio.decode(Tokens(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), audio.places(3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_vocoder_gets_log_mels() -> None:
    audio = AudioFrames(rate_hz=8000, mels=8, stack=2, normalise="fixed")
    wave = torch.randn(1600) * 0.1
    tokens = audio((wave, 8000))
    given = []

    def vocoder(log_NF: torch.Tensor) -> torch.Tensor:
        given.append(log_NF)
        return torch.ones(5)

    sound, rate_hz = audio.decode(tokens, vocoder=vocoder)
    assert (sound.tolist(), rate_hz) == ([1.0] * 5, 8000)
    power = audio._mel(torch.nn.functional.pad(wave, (0, 256)))[:, :20].T
    torch.testing.assert_close(given[0], (power + 1e-6).log(), atol=1e-4, rtol=1e-4)


# Pictures


@pytest.mark.parametrize("position", ["sincos", "learned", "rotary"])
def test_patches_fed_back_one_by_one_are_those_of_encode(position: str) -> None:
    tokenizer = ImagePatches(patch=4, size=(8, 12), position=position)  # type: ignore[arg-type]
    tokens = tokenizer(COLOURED[0])
    assert tokenizer.length == len(tokens) == 6
    assert tokenizer.written_features == 48
    places_NA = tokenizer.places(6)
    assert torch.equal(places_NA, tokens.position_NA)
    for i in range(6):
        drawn = tokens.content[i : i + 1, :48]
        assert torch.equal(tokenizer.fed_back(drawn, places_NA[i : i + 1]), tokens.content[i : i + 1])
    written = tokenizer.decode(Tokens(tokens.content[:, :48], tokenizer.places(6)))
    torch.testing.assert_close(written, torch.from_numpy(COLOURED[0]).permute(2, 0, 1))
    wild = tokenizer.decode(Tokens(torch.randn(6, 48) * 100, tokenizer.places(6)))
    assert (wild.min(), wild.max()) == (0, 1)
    cut = tokenizer.decode(Tokens(tokens.content[:4], tokenizer.places(4)))
    torch.testing.assert_close(cut[:, :4], written[:, :4])
    torch.testing.assert_close(cut[:, 4:, :4], written[:, 4:, :4])
    assert (cut[:, 4:, 4:] == 0.5).all()  # the mean, where nothing has been written


def test_other_sizes_are_still_read() -> None:
    tokenizer = ImagePatches(patch=4, channels=1, size=(8, 12), position="learned")
    plain = ImagePatches(patch=4, channels=1, position="learned")
    for picture in SIZES:
        assert torch.equal(tokenizer(picture).content, plain(picture).content)
        torch.testing.assert_close(tokenizer.decode(tokenizer(picture)), plain.decode(plain(picture)))
    assert ImagePatches.from_config(json.loads(json.dumps(tokenizer.config()))) == tokenizer


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (8, 10)}, r"size=\(8, 10\) is not two multiples, rows and columns, of patch=4"),
        ({"size": (0, 8)}, r"size=\(0, 8\) is not two multiples"),
        ({"size": (8,)}, r"size=\(8,\) is not two multiples"),
        ({"size": (8, 16), "max_side": 12}, r"size=\(8, 16\) is larger than max_side=12"),
    ],
    ids=str,
)
def test_wrong_sizes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^ImagePatches: {message}"):
        ImagePatches(patch=4, **settings)


def test_pictures_without_a_size_are_not_written() -> None:
    for call in (lambda: GREY.places(1), lambda: GREY.fed_back(torch.zeros(1, 16), torch.zeros(1, 3))):
        with pytest.raises(
            ConfigError, match=r"^ImagePatches: to write pictures, give it size=\(rows, columns\) in pixels"
        ):
            call()
    with pytest.raises(ConfigError, match=r"^ImagePatches: places\(7\), but a picture of size=\(8, 12\) has 6$"):
        ImagePatches(patch=4, size=(8, 12)).places(7)


def ramp(side: int, level: float) -> np.ndarray:
    """8x8 pixels: dark or bright on one side."""
    picture = np.full((8, 8), 0.2, np.float32)
    picture[:, 4 * side : 4 * side + 4] = level
    return picture


@pytest.mark.parametrize("way", ["codes", "features"])
def test_a_model_writes_the_picture_it_is_asked_for(way: str) -> None:
    samples = [{"label": ("left", "right")[i % 2], "picture": ramp(i % 2, 0.7 + 0.05 * (i % 5))} for i in range(20)]
    tokenizer: Tokenizer = ImagePatches(patch=4, channels=1, size=(8, 8), mean=0.4, std=0.3)
    head: mm.Head = FlowMatching(width=64, depth=1)
    if way == "codes":
        tokenizer, head = Codes.train(GREY, [s["picture"] for s in samples], 6), mm.NextToken()
    labels = Labels(("left", "right"))
    task = "label -> picture"
    model = mm.Model(
        {"label": labels, "picture": tokenizer}, mm.Core(width=32, depth=2, heads=2), [mm.Task(task, head)]
    )
    mm.fit(model, {task: samples}, steps=100, batch=20, lr=5e-3, device="cpu", precision="float32", quiet=True)
    for side, label in enumerate(labels.names):
        answer = model.generate(task, label=label)
        assert answer.value.shape == (1, 8, 8)
        assert answer.complete
        bright = answer.value[0, :, 4 * side : 4 * side + 4].mean()
        dark = answer.value[0, :, 4 - 4 * side : 8 - 4 * side].mean()
        assert bright == pytest.approx(0.8, abs=0.15)
        assert dark == pytest.approx(0.2, abs=0.15)


# Conformance


CLIPS = [(RANDOM.standard_normal(n).astype(np.float32) * 0.1, 8000) for n in (1600, 2400, 900)]
SOUND = AudioFrames(rate_hz=8000, mels=8)
KINDS = [
    (Codes.train(GREY, PICTURES, 16), PICTURES),
    (Codes.train(ImagePatches(patch=4, position="learned", size=(8, 12)), COLOURED, 12, causal=True), COLOURED),
    (Codes.train(SOUND, CLIPS, 8), CLIPS),
    (SOUND, CLIPS),
    *((ImagePatches(patch=4, size=(8, 12), position=p), COLOURED) for p in ("sincos", "learned", "rotary")),
]
HEADS = [
    (FlowMatching(width=32, depth=1), ImagePatches(patch=4, size=(8, 12)), COLOURED),
    (FlowMatching(width=32, depth=1), SOUND, CLIPS),
    (mm.NextToken(), Codes.train(GREY, PICTURES, 8), PICTURES),
]


def _named(cases, make):
    return [
        pytest.param(check, id=f"{type(case[0]).__name__}{i}-{check}")
        for i, case in enumerate(cases)
        for check in make(*case)
    ]


@pytest.mark.parametrize("check", _named(KINDS, tokenizer_checks))
def test_written_kinds_meet_the_contract(check) -> None:
    check()


@pytest.mark.parametrize("check", _named(HEADS, head_checks))
def test_heads_that_write_them_meet_the_contract(check) -> None:
    check()


class ForgetsRows(ImagePatches):
    def fed_back(self, features_NF, position_NA):
        return super().fed_back(features_NF, position_NA * 0)


class Transposed(ImagePatches):
    def places(self, count):
        return super().places(count).flip(1).roll(1, 1)


class Whispers(AudioFrames):
    """Not merely lossy: the sound has nothing to do with its frames."""

    def decode(self, tokens, *, vocoder=None):
        wave, rate_hz = super().decode(tokens)
        return wave.flip(0) * 0 + 0.1 * torch.sin(torch.arange(len(wave)) * 2.0), rate_hz


class Hasty(AudioFrames):
    def decode(self, tokens, *, vocoder=None):
        wave, rate_hz = super().decode(tokens)
        return wave[::2], rate_hz


class Fragile(AudioFrames):
    def decode(self, tokens, *, vocoder=None):
        return super().decode(tokens)[0], 8000 // len(tokens)


@pytest.mark.parametrize(
    ("name", "faulty", "values", "problem"),
    [
        ("places_agree", ForgetsRows(patch=4, size=(8, 12)), COLOURED, "fed_back gives"),
        ("places_agree", Transposed(patch=4, size=(8, 12)), COLOURED, r"places\(6\)"),
        (
            "places_agree",
            ImagePatches(patch=4, size=(8, 8)),
            COLOURED,
            "no value has the 4 tokens that every written one",
        ),
        ("decode_inverts_encode", Whispers(rate_hz=8000, mels=8), CLIPS, "comes back from decode"),
        ("decode_inverts_encode", Hasty(rate_hz=8000, mels=8), CLIPS, "comes back from decode"),
        ("decode_takes_anything", Fragile(rate_hz=8000, mels=8), CLIPS, r"features \(0, 32\): ZeroDivisionError"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Tokenizer) else None,
)
def test_a_planted_fault_of_writing_is_named(name: str, faulty: Tokenizer, values: list[Any], problem: str) -> None:
    check = next(check for check in tokenizer_checks(faulty, values) if str(check) == name)
    with pytest.raises(ConformanceError, match=f"{name}: .*{problem}"):
        check()


def test_codes_far_from_zero_are_distinguished():
    """Squares of large numbers must not swallow the differences."""
    rows_NF = 101325.0 + torch.arange(16.0)[:, None].repeat(1, 2)
    ids, distance = nearest(rows_NF, rows_NF)
    assert ids.tolist() == list(range(16))
    assert float(distance.max()) == 0.0
