"""Transcription on a language of tones that a small model learns in seconds: windows, streams, files, subtitles, the command."""

import gc
import io
import json
import math
import re
import wave
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.attention import Cache, Layout, RelativeBias, Span
from multimodal.encoder_decoder import EncoderDecoder
from multimodal.layers import MLP, Recurrent, SelfAttention
from multimodal.masks import PREFIX_LM, Chunked, MaskInfo, SameSample, Window
from multimodal.media import sound_blocks
from multimodal.media import sounds as sound_module
from multimodal.shapes import ConfigError, MediaError, StreamError, TaskError
from multimodal.transcription import (
    Beam,
    Decoder,
    GreedyCTC,
    Lexicon,
    Listener,
    NGramLM,
    Transcript,
    Word,
    align,
    error_rates,
    formatted,
    transcribe,
    transcription_tasks,
    transcripts,
)
from multimodal.transcription import alignment as alignment_module
from multimodal.transcription.alignment import WordDecoder
from multimodal.transcription.recordings import overlapping_windows, windows_between_pauses
from multimodal_tokenizers import AudioFrames, ImagePatches, TextBytes
from tests.transcription.tones import RATE, TASK, UNIT, frames, said, text_of, trained_ear

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("cyclopts")

from multimodal.cli import main  # noqa: E402


@pytest.fixture(scope="module")
def ear() -> mm.Model:
    return trained_ear()


@dataclass(frozen=True)
class Spy(Decoder):
    """GreedyCTC, and keeps the rows that were pushed."""

    rows: list[Tensor] = field(default_factory=list)

    def search(self):
        inner, rows = GreedyCTC().search(), self.rows

        class Search(type(inner)):
            def push(self, log_p_NV: Tensor) -> None:
                rows.append(log_p_NV)
                super().push(log_p_NV)

        return Search()


def whole_rows(model: mm.Model, sound: tuple, task: str = TASK) -> Tensor:
    with torch.no_grad():
        return model.logits(model.pack(task, [{"sound": sound}], answers=False))[task].log_softmax(-1)


def a_model(core: Any, lively, tasks=None, **kinds) -> mm.Model:
    tokenizers = {"sound": frames(), "text": TextBytes()} | kinds
    return lively(mm.Model(tokenizers, core, tasks or [mm.Task(TASK, mm.CTC())]))


# windows


def test_rows_of_windows_are_those_of_the_whole(lively):
    """Where a token's context (2 layers of 2 to each side, and the spectrogram's reach) fits in half the overlap."""
    model = a_model(mm.Core(width=16, depth=2, heads=2, mask=SameSample() & Window(3)), lively)
    wave_S, _ = said(text_of(40, 1), 1)
    for length in (len(wave_S), 90 * UNIT, 90 * UNIT + 1, 60 * UNIT, 12345):
        sound, spy = (wave_S[:length], RATE), Spy()
        transcribe(model, TASK, [sound], decoder=spy, window_s=30 * 0.04, overlap_s=13 * 0.04, batch=3)
        wanted_NV = whole_rows(model, sound)
        rows_NV = torch.cat(spy.rows)
        assert len(spy.rows) > 1 or length == 12345
        assert rows_NV.shape == wanted_NV.shape
        torch.testing.assert_close(rows_NV, wanted_NV, atol=1e-4, rtol=1e-4)


def test_long_sounds_lose_and_double_no_word(ear: mm.Model):
    texts = [text_of(60, 100), text_of(3, 101), text_of(35, 102)]
    sounds = [(said(text, 7)[0], RATE) for text in texts]
    for decoder in (None, Beam(width=4)):
        found = transcribe(ear, TASK, sounds, window_s=4, overlap_s=1, batch=5, decoder=decoder)
        assert [t.text for t in found] == texts
    for transcript, (wave_S, _) in zip(found, sounds, strict=True):
        assert transcript.seconds == pytest.approx(len(wave_S) / RATE)
        assert transcript.complete


def test_words_have_the_times_at_which_they_were_spoken(ear: mm.Model):
    text = text_of(40, 5)
    wave_S, label_S = said(text, 5)
    (transcript,) = transcribe(ear, TASK, [(wave_S, RATE)], window_s=4, overlap_s=1)
    spaces = (label_S == ord(" ")).astype(int)
    starts = [0, *(np.flatnonzero(np.diff(spaces) == -1) + 1)]
    sounding = (label_S != 256) & (label_S != ord(" "))
    assert len(transcript.words) == len(starts) == 40
    for word, start, until in zip(transcript.words, starts, [*starts[1:], len(wave_S)], strict=True):
        letters = start + np.flatnonzero(sounding[start:until])
        assert word.start_s == pytest.approx(letters[0] / RATE, abs=0.081)  # a token is 0.04 s
        assert word.end_s == pytest.approx(letters[-1] / RATE, abs=0.081)
        assert 0.5 < word.confidence <= 1


def test_fusion_and_words_choose_between_texts(ear: mm.Model):
    wave_S, _ = said("ab ba ab", 3)
    other = Lexicon(["abba", "ba", "ac"], TextBytes())
    (transcript,) = transcribe(ear, TASK, [(wave_S, RATE)], decoder=Beam(lexicon=other, cutoff=math.inf, width=32))
    assert transcript.text != "ab ba ab"
    assert set(transcript.text.split()) <= set(other.words)
    assert transcript.text
    prior = NGramLM.train([list(b"cd cd cd")] * 50, order=3, vocab=256)
    (swayed,) = transcribe(ear, TASK, [(wave_S, RATE)], decoder=Beam(prior=prior, weight=40.0, cutoff=math.inf))
    assert swayed.text != "ab ba ab"
    helped = NGramLM.train([list(b"ab ba ab")], order=3, vocab=256)
    (helped_by,) = transcribe(ear, TASK, [(wave_S, RATE)], decoder=Beam(prior=helped))
    assert helped_by.text == "ab ba ab"


def test_passages_forget_rows_and_no_words(ear: mm.Model, monkeypatch: pytest.MonkeyPatch):
    text = text_of(50, 11)
    log_p_NV = whole_rows(ear, (said(text, 11)[0], RATE))
    time_N = torch.arange(len(log_p_NV), dtype=torch.float64) * 0.04
    held = []

    def read(decoder, passage: int = 10_000) -> list[Word]:
        reader = WordDecoder(decoder, TextBytes(), 0.04, passage)
        for part in torch.arange(len(log_p_NV)).split(7):
            reader.push(log_p_NV[part], time_N[part])
            held.append(reader._stored)
        return reader.finish()

    whole = [read(GreedyCTC()), read(Beam(width=4))]
    assert max(held) == len(log_p_NV)
    assert " ".join(word.text for word in whole[0]) == text
    held.clear()
    for before, decoder in zip(whole, (GreedyCTC(), Beam(width=4)), strict=True):
        after = read(decoder, 20)
        assert [w.text for w in after] == [w.text for w in before]
        assert [w.start_s for w in after] == pytest.approx([w.start_s for w in before], abs=0.041)
    assert max(held) < 60
    monkeypatch.setattr(alignment_module, "SURE", 2.0)  # never sure: passages end all the same
    held.clear()
    assert [w.text for w in read(GreedyCTC(), 5)] == [w.text for w in whole[0]]
    assert max(held) < 20


def test_three_hours_are_never_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seconds = 3 * 3600
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(1000)
        noise = np.random.default_rng(0).integers(126, 131, 60_000).astype(np.uint8).tobytes()
        for _ in range(seconds // 60):
            file.writeframes(noise)
    tokenizer = AudioFrames(rate_hz=1000, mels=4, hop_ms=100, window_ms=100, stack=10)  # a token a second
    core = mm.Core(width=8, depth=1, heads=1)
    model = mm.Model({"sound": tokenizer, "text": TextBytes()}, core, [mm.Task(TASK, mm.CTC())])
    asked, ahead, done, tensors = 0, [], [], []
    read = soundfile.SoundFile.read

    def counted(self, frames: int = -1, **settings):
        nonlocal asked
        wave = read(self, frames, **settings)
        assert 0 < frames <= 10_000
        asked += len(wave)
        return wave

    def progress(index: int, done_s: float, total_s: float) -> None:
        ahead.append(asked / 1000 - done_s)
        done.append((index, done_s, total_s))
        if len(done) % 50 == 0:
            tensors.append(max(x.numel() for x in gc.get_objects() if type(x) is Tensor))

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    (transcript,) = transcribe(
        model, TASK, [tmp_path / "long.wav"], window_s=60, overlap_s=10, batch=4, progress=progress
    )
    assert transcript.seconds == seconds
    assert asked == seconds * 1000
    assert max(ahead) < 60 * 5  # a batch of windows and the blocks in hand
    assert max(tensors) < 1_000_000  # of 10.8 million samples
    assert done[-1] == (0, seconds, seconds)
    assert len(done) > 200


@pytest.mark.parametrize(
    ("window_s", "overlap_s", "problem"),
    [
        (4, 4, "overlap_s=4 must lie between 0 and window_s=4"),
        (0.1, 0.05, "is 2 tokens and overlap_s=0.05 is 1; use 0.32 s and 0.08 s or more"),
        (9e9, 1, "more than max_tokens=65536 of AudioFrames; use at most 2621.44 s"),
    ],
)
def test_windows_that_cannot_be_are_refused(ear: mm.Model, window_s: float, overlap_s: float, problem: str):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        transcribe(ear, TASK, [(np.zeros(9, np.float32), RATE)], window_s=window_s, overlap_s=overlap_s)


# sounds


@pytest.mark.parametrize(
    ("rate", "rate_hz"), [(8000, 8000), (44100, 8000), (11025, 16000), (16000, 8000), (22050, 44100)]
)
def test_blocks_of_a_file_are_its_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int, rate_hz: int):
    random = np.random.default_rng(rate)
    soundfile.write(tmp_path / "x.wav", 0.1 * random.standard_normal((3 * rate + 17, 2)), rate, subtype="FLOAT")
    wanted_S = mm_read(tmp_path / "x.wav", rate_hz)
    for block_s in (0.013, 0.5, 10.0):
        monkeypatch.setattr(sound_module, "BLOCK_S", block_s)
        blocks = list(sound_blocks(tmp_path / "x.wav", rate_hz=rate_hz, who="test"))
        assert len(blocks) > 5 or block_s > 0.5
        assert {total for _, total in blocks} == {len(wanted_S)}
        torch.testing.assert_close(torch.cat([block for block, _ in blocks]), wanted_S, atol=1e-5, rtol=0)


def mm_read(path: Path, rate_hz: int) -> Tensor:
    from multimodal.media import read_sound

    return read_sound(path, rate_hz=rate_hz, who="test")


def test_files_bytes_and_waves_agree(ear: mm.Model, tmp_path: Path):
    text = text_of(12, 8)
    wave_S, _ = said(text, 8)
    soundfile.write(tmp_path / "x.wav", wave_S, RATE, subtype="FLOAT")
    data = (tmp_path / "x.wav").read_bytes()
    values = [tmp_path / "x.wav", str(tmp_path / "x.wav"), data, io.BytesIO(data), (wave_S, RATE)]
    found = transcribe(ear, TASK, values, window_s=2, overlap_s=0.8)
    assert found == [found[0]] * 5
    assert found[0].text == text


def test_windows_and_pieces_lie_on_tokens():
    wave_S = torch.arange(1000.0)
    blocks = [(part, 1000) for part in wave_S.split(77)]
    pieces = list(overlapping_windows(iter(blocks), window=20, overlap=6, unit=10))
    rows = []
    for piece in pieces:
        assert torch.equal(piece.wave_S, wave_S[piece.start : piece.start + len(piece.wave_S)])
        assert piece.start % 10 == 0
        tokens = -(-len(piece.wave_S) // 10)
        rows += list(range(piece.start // 10, piece.start // 10 + tokens))[piece.first : piece.stop]
    assert rows == list(range(100))
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(list(overlapping_windows(iter([(wave_S[:200], 200)]), window=20, overlap=6, unit=10))) == 1
    pieces = list(windows_between_pauses(iter(blocks), window=20, search=5, unit=10))
    assert torch.equal(torch.cat([piece.wave_S for piece in pieces]), wave_S)
    assert all(piece.start % 10 == 0 and len(piece.wave_S) <= 200 for piece in pieces)


def test_pieces_end_where_it_is_quiet():
    wave_S = torch.randn(2000)
    wave_S[1750:1850] *= 0.001
    first = next(windows_between_pauses(iter([(wave_S, 2000)]), window=190, search=48, unit=10))
    assert 1750 < len(first.wave_S) < 1850


def test_bad_sounds_are_named_and_lose_no_others(ear: mm.Model, tmp_path: Path):
    text = text_of(8, 2)
    wave_S, _ = said(text, 2)
    soundfile.write(tmp_path / "good.wav", wave_S, RATE)
    (tmp_path / "noise.wav").write_bytes(b"no sound at all")
    soundfile.write(tmp_path / "empty.wav", wave_S[:0], RATE)
    data = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(data[: len(data) // 2])
    broken = wave_S.copy()
    broken[-1000] = np.nan
    soundfile.write(tmp_path / "nan.wav", broken, RATE, subtype="FLOAT")
    # finite, but no sound in -1..1
    soundfile.write(tmp_path / "far.wav", wave_S + np.float32(1e25), RATE, subtype="FLOAT")
    names = ["good", "noise", "missing", "empty", "cut", "nan", "good", "far"]
    files = [tmp_path / f"{name}.wav" for name in names]
    found = dict(transcripts(ear, TASK, files, window_s=1, overlap_s=0.4, batch=3))
    assert sorted(found) == list(range(8))
    assert [getattr(found[i], "text", None) for i in range(8)] == [text, None, None, None, None, None, text, None]
    assert "floats are wanted in -1..1" in str(found[7])
    problems = ["cannot read", "there is no file", "no samples", "was cut short", "not finite"]
    for error, problem, file in zip([found[i] for i in range(1, 6)], problems, files[1:6], strict=True):
        assert isinstance(error, MediaError)
        assert problem in str(error)
        assert file.name in str(error)
    with pytest.raises(MediaError, match=r"there is no file .*missing\.wav"):
        transcribe(ear, TASK, files[2:])


def test_calls_that_cannot_be_are_refused(ear: mm.Model, lively):
    with pytest.raises(ConfigError, match="give a list of sounds, not tuple"):
        transcribe(ear, TASK, (np.zeros(9, np.float32), RATE))
    with pytest.raises(TaskError, match="there is no task 'sound -> txt'"):
        transcribe(ear, "sound -> txt", [])
    model = a_model(
        mm.Core(width=8, depth=1, heads=1),
        lively,
        ["image -> text", "sound image -> text", mm.Task("sound -> text", mm.NextToken())],
        image=ImagePatches(patch=4, channels=1),
    )
    assert transcription_tasks(model) == [TASK]
    with pytest.raises(TaskError, match="'image', which is no sound"):
        transcribe(model, "image -> text", [])
    with pytest.raises(TaskError, match="reads 2 fields; wanted one sound"):
        transcribe(model, "sound image -> text", [])
    with pytest.raises(ConfigError, match="takes no decoder"):
        transcribe(model, TASK, [], decoder=GreedyCTC())
    odd = a_model(mm.Core(width=8, depth=1, heads=1), lively, sound=Uneven())
    trimmed = a_model(mm.Core(width=8, depth=1, heads=1), lively, sound=frames(trim_db=20.0))
    with pytest.raises(ConfigError, match=r"leaves out the silence at both ends of a sound \(trim_db=20\.0\)"):
        transcribe(trimmed, TASK, [])
    with pytest.raises(ConfigError, match=r"lasts 10\.5 samples"):
        transcribe(odd, TASK, [])


@dataclass(frozen=True)
class Uneven(AudioFrames):
    """Tokens that end between samples."""

    @property
    def step(self) -> tuple[float, float, float]:
        return (10.5 / self.rate_hz, 1.0, 1.0)


# writing token by token


@pytest.mark.parametrize("twin", [False, True])
def test_a_task_that_writes_reads_pieces(lively, twin: bool):
    tasks = [mm.Task("sound -> written:text", mm.NextToken())] + [mm.Task(TASK, mm.CTC())] * twin
    core = mm.Core(width=32, depth=2, heads=2)
    model = a_model(core, lively, tasks)
    wave_S, _ = said(text_of(12, 4), 4)
    sounds = [(wave_S, RATE), (wave_S[:4000], RATE)]
    found = transcribe(model, "sound -> written:text", sounds, window_s=2.0, max_tokens=9, batch=3)
    assert [t.seconds for t in found] == [len(wave_S) / RATE, 0.5]
    pieces = list(windows_between_pauses(iter([(torch.from_numpy(wave_S), 0)]), window=50, search=12, unit=UNIT))
    assert len(pieces) > 3
    words: list[Word] = []
    for piece in pieces:
        answer = model.generate("sound -> written:text", sound=(piece.wave_S, RATE), max_tokens=9)
        start_s, end_s = piece.start / RATE, (piece.start + len(piece.wave_S)) / RATE
        mine = found[0].words[len(words) : len(words) + len(answer.value.split())]
        assert [w.text for w in mine] == answer.value.split()
        if not twin:
            assert {(w.start_s, w.end_s) for w in mine} <= {(start_s, end_s)}
        assert all(start_s <= w.start_s <= w.end_s <= end_s + 1e-9 for w in mine)
        words += mine
    assert found[0].words == tuple(words)
    assert found[0].text == " ".join(w.text for w in words)
    assert found[0].complete is False  # random weights seldom stop
    assert formatted(found[0], "srt")


def test_a_task_that_writes_is_ranked_by_ctc_too(lively, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tasks = [mm.Task("sound -> written:text", mm.NextToken()), mm.Task(TASK, mm.CTC())]
    model = a_model(mm.Core(width=32, depth=2, heads=2), lively, tasks)
    wave_S, _ = said(text_of(3, 4), 4)
    options = {"beams": 3, "ctc": (TASK, 0.6)}
    wanted = model.generate("sound -> written:text", sound=(wave_S, RATE), max_tokens=9, **options)
    assert wanted.value != model.generate("sound -> written:text", sound=(wave_S, RATE), max_tokens=9, beams=3).value
    (found,) = transcribe(
        model, "sound -> written:text", [(wave_S, RATE)], window_s=60.0, max_tokens=9, beams=3, ctc_weight=0.6
    )
    assert found.text.split() == wanted.value.split()
    model.save(tmp_path / "both")
    soundfile.write(tmp_path / "a.wav", wave_S, RATE, subtype="FLOAT")
    command = ["transcribe", str(tmp_path / "both"), str(tmp_path / "a.wav"), "--task", "sound -> written:text"]
    assert main([*command, "--window-s", "60", "--max-tokens", "9", "--beam", "3", "--ctc-weight", "0.6"]) == 0
    assert capsys.readouterr().out.split() == wanted.value.split()
    alone = a_model(mm.Core(width=32, depth=2, heads=2), lively, tasks[:1])
    with pytest.raises(ConfigError, match=r"needs a task with the head CTC\(\) that reads the same sound"):
        transcribe(alone, "sound -> written:text", [(wave_S, RATE)], beams=3, ctc_weight=0.6)
    with pytest.raises(ConfigError, match=r"reads by CTC alone; .* give decoder=Beam\(width\)"):
        transcribe(model, TASK, [(wave_S, RATE)], beams=3)


def test_written_words_take_the_times_of_ctc(ear: mm.Model, monkeypatch: pytest.MonkeyPatch):
    more = ear.extended(tasks=[mm.Task("sound -> written:text", mm.NextToken())])
    text = text_of(5, 21)
    wave_S, _ = said(text, 21)
    (by_ctc,) = transcribe(more, TASK, [(wave_S, RATE)])
    answers = [mm.Prediction(f" {text}\n", 0.5)]
    monkeypatch.setattr(mm.Model, "generate", lambda *_, **__: answers)
    (transcript,) = transcribe(more, "sound -> written:text", [(wave_S, RATE)])
    assert transcript == by_ctc
    answers[0] = mm.Prediction("far too long " * 99, 0.5)  # more than the rows can hold: the piece's times
    (transcript,) = transcribe(more, "sound -> written:text", [(wave_S, RATE)])
    assert len(transcript.words) == 3 * 99
    assert {(w.start_s, w.end_s) for w in transcript.words} == {(0.0, transcript.seconds)}


# streams

STREAMS = {
    "causal": (frames(causal=True), mm.Core(width=32, depth=2, heads=2, kv_heads=1)),
    "chunks": (frames(), mm.Core(width=32, depth=2, heads=2, mask=SameSample() & Chunked(4))),
    "chunks and a window": (frames(), mm.Core(width=32, depth=2, heads=2, mask=SameSample() & Window(7) & Chunked(3))),
    "long windows": (frames(window_ms=200.0, causal=True), mm.Core(width=32, depth=1, heads=2)),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("pushed", [97, 1600, 20_000])
def test_streamed_rows_are_those_of_the_whole(lively, monkeypatch: pytest.MonkeyPatch, name: str, pushed: int):
    monkeypatch.setattr("multimodal.transcription.streaming._CAPACITY", 16)  # so that the cache has to grow
    tokenizer, core = STREAMS[name]
    model = a_model(core, lively, sound=tokenizer)
    wave_S = torch.from_numpy(said(text_of(5, 1), 1)[0])[:20_000]
    spy = Spy()
    listener = Listener(model, TASK, decoder=spy)
    heard: list[Word] = []
    for part in wave_S.split(pushed):
        heard += listener.push(part)
        before = len(torch.cat(spy.rows)) if spy.rows else 0
        assert before >= listener.seconds / 0.04 - listener.right - listener.chunk - 1
    heard += listener.finish()
    rows_NV, wanted_NV = torch.cat(spy.rows), whole_rows(model, (wave_S, RATE))
    assert before < len(rows_NV) == len(wanted_NV) == 63
    torch.testing.assert_close(rows_NV, wanted_NV, atol=1e-5, rtol=1e-5)
    (whole,) = transcribe(model, TASK, [(wave_S, RATE)])
    assert listener.text == whole.text == " ".join(word.text for word in heard)


@pytest.mark.parametrize(("decoder", "latest"), [(GreedyCTC(), 1.0), (Beam(width=4), 4.0)])
def test_words_arrive_while_they_are_spoken(ear: mm.Model, decoder, latest: float):
    text = text_of(20, 31)
    wave_S = torch.from_numpy(said(text, 31)[0])
    listener = Listener(ear, TASK, decoder=decoder)
    heard, late = [], []
    for part in wave_S.split(800):
        for word in listener.push(part):
            heard.append(word)
            late.append(listener.seconds - word.end_s)
        assert (listener.text + " " + listener.guess).split() == " ".join(
            [*(w.text for w in heard), listener.guess]
        ).split()
    assert len(heard) > 10
    assert max(late) < latest
    assert text.startswith(listener.text)
    heard += listener.finish()
    assert listener.text == text
    (whole,) = transcribe(ear, TASK, [(wave_S, RATE)], decoder=decoder)
    assert [w.text for w in heard] == [w.text for w in whole.words]
    assert listener.finish() == []
    with pytest.raises(StreamError, match="this sound is finished; make a new Listener"):
        listener.push(wave_S)


WINDOWS = {
    "the core's": (frames(), {"mask": SameSample() & Chunked(4) & Window(6)}, 5),
    "a causal one": (frames(causal=True), {"mask": PREFIX_LM & Window(9)}, 8),
    "the layers' own": (
        frames(),
        {
            "mask": SameSample() & Chunked(2),
            "block": ((SelfAttention(mask=Window(4)), MLP()), (SelfAttention(mask=Window(11)), MLP())),
        },
        10,
    ),
    "recurrent": (frames(causal=True), {"block": (Recurrent(), MLP())}, 0),
    "with a bias": (frames(), {"mask": SameSample() & Chunked(3) & Window(7), "prior": RelativeBias(20)}, 6),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_under_a_window_the_cache_stays_at_one_size(lively, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr("multimodal.transcription.streaming._AT_ONCE", 16)
    tokenizer, settings, reach = WINDOWS[name]
    model = a_model(mm.Core(width=16, depth=2, heads=2, **settings), lively, sound=tokenizer)
    wave_S = torch.from_numpy(said(text_of(40, 1), 1)[0])[: 700 * UNIT]
    spy = Spy()
    listener = Listener(model, TASK, decoder=spy)
    assert listener.reach == reach
    random, start, sizes = np.random.default_rng(0), 0, set()
    while start < len(wave_S):
        count = int(random.choice([1, UNIT, 5 * UNIT, 40 * UNIT]))  # less than a token, and more than one pass
        listener.push(wave_S[start : start + count])
        sizes.add((listener._cache.capacity, sum(x.numel() for x in (*listener._cache.k, *listener._cache.v))))
        start += count
    listener.finish()
    ((capacity, numbers),) = sizes  # from the first token to the last
    assert capacity < 50 < listener.tokens == 700
    assert numbers <= 2 * 2 * 16 * capacity
    rows_NV, wanted_NV = torch.cat(spy.rows), whole_rows(model, (wave_S, RATE))
    torch.testing.assert_close(rows_NV, wanted_NV, atol=2e-4, rtol=1e-4)  # angles of place 700 are rounded


@pytest.mark.parametrize("name", ["no window", "one layer without"])
def test_without_a_window_the_cache_grows(lively, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr("multimodal.transcription.streaming._CAPACITY", 16)
    some = {"block": ((SelfAttention(mask=Window(4)), MLP()), (SelfAttention(), MLP()))} if name != "no window" else {}
    core = mm.Core(width=16, depth=2, heads=2, mask=SameSample() & Chunked(2), **some)
    listener = Listener(a_model(core, lively), TASK)
    assert listener.reach is None
    listener.push(torch.zeros(100 * UNIT))
    assert listener._cache.capacity >= 96


def test_a_row_without_its_oldest_tokens_is_read_as_before(lively):
    """One token at a time, in a row beside one of which nothing is dropped: the plan of steps has another path."""
    model = a_model(mm.Core(width=16, depth=2, heads=2, mask=PREFIX_LM & Window(5)), lively, sound=frames(causal=True))
    core, generator = model.core, torch.Generator().manual_seed(0)
    stream_BTD = torch.randn(2, 30, 16, generator=generator)
    caches = [core.core.cache(rows=2, capacity=30) for _ in range(2)]

    def read(cache: Cache, start: int, stop: int) -> Tensor:
        count = stop - start
        order_T = torch.arange(start, stop, dtype=torch.int32).repeat(2)
        zeros, sample_T = torch.zeros_like(order_T), torch.arange(2, dtype=torch.int32).repeat_interleave(count)
        info = MaskInfo(sample=sample_T, order=order_T, bidirectional=zeros, segment=zeros)
        position_TA = torch.stack([order_T.float(), zeros.float(), zeros.float()], -1)
        layout = Layout((Span(0, count),) * 2, info)
        with torch.no_grad():
            return core(stream_BTD[:, start:stop].flatten(0, 1), position_TA, layout, cache=cache).view(2, count, -1)

    whole_BTD, cache = read(caches[0], 0, 30), caches[1]
    parts = [read(cache, 0, 8)]
    for at in range(8, 20):
        parts.append(read(cache, at, at + 1))
        cache.drop(0, cache.stored(0) - 4)
    parts += [read(cache, 20, 26), read(cache, 26, 30)]
    assert (cache.stored(0), cache.stored(1), cache.length) == (14, 30, [30, 30])
    torch.testing.assert_close(torch.cat(parts, 1), whole_BTD, atol=1e-5, rtol=1e-5)
    other = core.core.cache(rows=1, capacity=14)
    other.copy(0, 0, of=cache)
    assert (other.length, other.dropped) == ([30], [16])
    torch.testing.assert_close(other.k[0][0], cache.k[0][0, :14])
    cache.clear(0)
    assert cache.stored(0) == cache.dropped[0] == 0


def test_wanted_samples_are_those_of_the_next_chunk(ear: mm.Model):
    listener = Listener(ear, TASK)
    wave_S = torch.from_numpy(said(text_of(3, 1), 1)[0])
    start, wanted = 0, listener.wanted
    while start + wanted <= len(wave_S):
        before = listener.tokens
        listener.push(wave_S[start : start + wanted - 1])
        assert listener.tokens == before
        listener.push(wave_S[start + wanted - 1 : start + wanted])
        assert listener.tokens == before + listener.chunk
        start, wanted = start + wanted, listener.wanted
    assert start > 20 * UNIT


def test_listening_to_nothing(ear: mm.Model):
    listener = Listener(ear, TASK)
    assert listener.push(torch.zeros(0)) == listener.finish() == []
    assert listener.text == listener.guess == ""


def test_models_that_cannot_listen_say_what_to_change(ear: mm.Model, lively):
    def refused(problem: str, core: Any, tasks=None, **kinds) -> None:
        with pytest.raises(ConfigError, match=problem):
            Listener(a_model(core, lively, tasks, **kinds), (tasks or [mm.Task(TASK)])[0].pattern)

    plain, chunked = (
        mm.Core(width=8, depth=1, heads=1),
        mm.Core(width=8, depth=1, heads=1, mask=SameSample() & Chunked(2)),
    )
    refused(r"look at what comes later; train with AudioFrames\(causal=True\) or with Core\(mask=", plain)
    refused(
        r"look at what comes later", mm.Core(width=8, depth=1, heads=1, mask=SameSample() & (Chunked(2) | Window(2)))
    )
    refused(r"depends on all of it; .*normalise='fixed'", chunked, sound=frames(normalise="clip"))
    refused(r"writes after the whole sound; .* CTC\(\)", chunked, [mm.Task(TASK, mm.NextToken())])
    refused(r"an EncoderDecoder has no cache of what it reads", EncoderDecoder(reader=chunked, writer=plain))
    for wrong in (torch.zeros(2, 5), torch.zeros(5, dtype=torch.int16), torch.tensor([float("nan")])):
        with pytest.raises(MediaError, match=r"wanted one channel .* at 8000 Hz"):
            Listener(ear, TASK).push(wrong)


# transcripts


def words(*parts: tuple[str, float, float]) -> tuple[Word, ...]:
    return tuple(Word(text, start_s, end_s, 0.5) for text, start_s, end_s in parts)


TALK = Transcript(
    "so <it> & that. on we go",
    words(
        ("so", 0.2, 0.4),
        ("<it>", 0.4, 1.0),
        ("&", 1.0, 1.2),
        ("that.", 1.2, 59.9996),
        ("on", 3725.0009, 3725.3),
        ("we", 3725.4, 3725.5),
        ("go", 3729.0, 3729.5),
    ),
    3730.0,
)


def test_subtitles():
    assert TALK.srt() == (
        "1\n00:00:00,200 --> 00:00:01,200\nso <it> &\n\n"
        "2\n00:00:01,200 --> 00:01:00,000\nthat.\n\n"
        "3\n01:02:05,001 --> 01:02:05,500\non we\n\n"
        "4\n01:02:09,000 --> 01:02:09,500\ngo\n\n"
    )
    assert TALK.vtt() == (
        "WEBVTT\n\n"
        "00:00:00.200 --> 00:00:01.200\nso &lt;it&gt; &amp;\n\n"
        "00:00:01.200 --> 00:01:00.000\nthat.\n\n"
        "01:02:05.001 --> 01:02:05.500\non we\n\n"
        "01:02:09.000 --> 01:02:09.500\ngo\n\n"
    )
    crossed = Transcript("", words(("one.", 1.0, 3.0), ("two.", 2.0, 2.5), ("three", 9.0, 9.0)), 9.0)
    assert re.findall(r"(\S+) --> (\S+)", crossed.vtt()) == [
        ("00:00:01.000", "00:00:03.000"),
        ("00:00:03.000", "00:00:03.001"),
        ("00:00:09.000", "00:00:09.001"),
    ]
    assert Transcript("", (), 1.0).srt() == ""
    assert Transcript("", (), 1.0).vtt() == "WEBVTT\n\n"


def seconds_of(clock: str) -> float:
    hours, minutes, seconds = clock.replace(",", ".").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


@pytest.mark.parametrize("together", [False, True])
def test_subtitles_are_short_in_order_and_whole(together: bool):
    random = np.random.default_rng(0)
    texts = ["x" * int(random.integers(1, 12)) for _ in range(200)]
    times = [(10.0 * (i // 50), 10.0 * (i // 50) + 10) if together else (0.3 * i, 0.3 * i + 0.3) for i in range(200)]
    transcript = Transcript(" ".join(texts), words(*((t, *at) for t, at in zip(texts, times, strict=True))), 60.0)
    cues = re.findall(r"(\d+)\n(\S+) --> (\S+)\n(.*)\n\n", transcript.srt())
    assert [int(number) for number, *_ in cues] == list(range(1, len(cues) + 1))
    assert " ".join(text for *_, text in cues) == transcript.text
    last = 0.0
    for _, start, end, text in cues:
        assert len(text) <= 42
        assert last <= seconds_of(start) < seconds_of(end) <= seconds_of(start) + 7.001
        last = seconds_of(end)


def test_json_has_everything():
    data = json.loads(TALK.json())
    assert data["text"] == TALK.text
    assert tuple(Word(**word) for word in data["words"]) == TALK.words
    assert (data["seconds"], data["complete"]) == (3730.0, True)
    assert formatted(TALK, "text") == TALK.text + "\n"
    with pytest.raises(ConfigError, match="no transcript format 'doc'; there are text, srt, vtt, json"):
        formatted(TALK, "doc")


def test_error_rates_by_hand():
    pytest.importorskip("jiwer")
    rates = error_rates(["the cat sat", "on"], ["the bat sat down", "on"])
    assert rates == {"wer": pytest.approx(2 / 4), "cer": pytest.approx((1 + 5) / 13)}
    assert error_rates(["a b"], [""]) == {"wer": 1.0, "cer": 1.0}
    assert error_rates(["a"], ["a"]) == {"wer": 0.0, "cer": 0.0}
    assert error_rates(["ab cd", ""], ["ab cd", "ef"]) == {"wer": 1 / 2, "cer": 2 / 5}
    for references, hypotheses, problem in (
        (["a"], [], "1 references and 0 hypotheses"),
        ("a", "a", "not one text"),
    ):
        with pytest.raises(ConfigError, match=problem):
            error_rates(references, hypotheses)


def test_align_is_public():
    assert align(torch.zeros(3, 4).log_softmax(-1), [], torch.zeros(3), 1.0) == []


# the command


@pytest.fixture(scope="module")
def saved(ear: mm.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ear.save(tmp_path_factory.mktemp("ear") / "model")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recordings")
    files = {}
    for i in range(2):
        files[text_of(9, i)] = folder / f"talk{i}.wav"
        soundfile.write(folder / f"talk{i}.wav", said(text_of(9, i), i)[0], RATE)
    return files


def test_the_command_prints(saved: Path, recordings: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    (first, file), (second, other) = recordings.items()
    assert main(["transcribe", str(saved), str(file)]) == 0
    assert capsys.readouterr() == (first + "\n", "")
    options = ["--beam", "4", "--window-s", "2", "--overlap-s", "0.5"]
    assert main(["transcribe", str(saved), str(file), str(other), *options]) == 0
    assert capsys.readouterr().out == f"== {file}\n{first}\n== {other}\n{second}\n"
    assert main(["transcribe", str(saved), str(file), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == first
    assert main(["transcribe", str(saved), str(file), str(other), "--format", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["file"], line["text"]) for line in lines] == [(str(file), first), (str(other), second)]


def test_the_command_writes_files(saved: Path, recordings: dict[str, Path], tmp_path: Path, capsys):
    files = [str(file) for file in recordings.values()]
    assert main(["transcribe", str(saved), *files, "--format", "srt", "--out", str(tmp_path / "new")]) == 0
    for i, text in enumerate(recordings):
        lines = re.findall(r"-->.*\n(.*)\n\n", (tmp_path / "new" / f"talk{i}.srt").read_text() + "\n")
        assert " ".join(lines) == text
    assert str(tmp_path / "new" / "talk1.srt") in capsys.readouterr().out
    (tmp_path / "talk0.txt").write_text("my notes")
    assert main(["transcribe", str(saved), files[0], "--out", str(tmp_path)]) == 0
    assert (tmp_path / "talk0.txt").read_text() == "my notes"
    assert (tmp_path / "talk0-2.txt").read_text().strip() == next(iter(recordings))
    assert main(["transcribe", str(saved), files[0], "--out", str(tmp_path / "talk0.txt")]) == 2
    assert main(["transcribe", str(saved), files[0], files[0], "--out", str(tmp_path)]) == 2
    assert "would both be written to" in capsys.readouterr().err


def test_the_command_keeps_to_a_list_of_words(saved: Path, recordings: dict[str, Path], tmp_path: Path, capsys):
    (tmp_path / "words.txt").write_text("a b\ncd\n")
    file = str(next(iter(recordings.values())))
    assert main(["transcribe", str(saved), file, "--words", str(tmp_path / "words.txt")]) == 0
    assert set(capsys.readouterr().out.split()) <= {"a", "b", "cd"}


def test_one_bad_file_loses_no_other(saved: Path, recordings: dict[str, Path], tmp_path: Path, capsys):
    (tmp_path / "bad.wav").write_text("hello")
    first, second = recordings.values()
    files = [str(first), str(tmp_path / "bad.wav"), str(tmp_path / "missing.wav"), str(second)]
    assert main(["transcribe", str(saved), *files]) == 1
    out, err = capsys.readouterr()
    assert all(text in out for text in recordings)
    assert "bad.wav" in err
    assert "there is no file" in err
    assert "2 of 4 files could not be read" in err


def test_the_command_says_what_is_wrong(saved: Path, recordings: dict[str, Path], tmp_path: Path, capsys):
    file = str(next(iter(recordings.values())))
    core = mm.Core(width=8, depth=1, heads=1)
    plain = mm.Model({"text": TextBytes()}, core, ["text -> answer:text"]).save(tmp_path / "plain")
    tasks = [mm.Task("sound -> written:text", mm.NextToken()), mm.Task(TASK, mm.CTC())]
    both = mm.Model({"sound": frames(), "text": TextBytes()}, core, tasks).save(tmp_path / "both")
    for arguments, problem in (
        ([str(saved)], "give one sound file or more"),
        ([str(tmp_path / "nothing"), file], "there is no folder"),
        ([str(plain), file], "this checkpoint transcribes nothing"),
        (
            [str(both), file],
            "several tasks transcribe; choose one with --task: 'sound -> written:text', 'sound -> text'",
        ),
        ([str(both), file, "--task", "sound->written:text", "--prior", "0.5"], "are for CTC"),
        (
            [str(both), file, "--task", "sound->written:text", "--ctc-weight", "0.5"],
            "ranks beams, and there is one only",
        ),
        ([str(both), file, "--task", TASK, "--ctc-weight", "0.5"], "reads by CTC alone"),
        ([str(saved), file, "--task", "text -> sound"], "there is no task"),
        ([str(plain), file, "--task", "text->answer:text", "--beam", "3"], "reads 'text', which is no sound"),
        ([str(saved), file, "--prior", "0.5"], "no task '-> text'"),
        ([str(saved), file, "--words", str(tmp_path / "none.txt")], "none.txt"),
        ([str(saved), file, "--window-s", "0.1"], "is 2 tokens and overlap_s=0.025"),
    ):
        assert main(["transcribe", *arguments]) == 2, arguments
        assert problem in capsys.readouterr().err
    assert main(["transcribe", str(both), file, "--task", "sound->written:text", "--max-tokens", "2"]) == 0
    assert "stopped at --max-tokens" in capsys.readouterr().err
