"""The runner of docs/export.md, which has onnxruntime, NumPy and our tokenizers alone, answers as the model does."""

import os
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import multimodal as mm
from multimodal.export.formats import FORMATS
from multimodal.heads import Mean
from multimodal.media import read_sound
from multimodal_tokenizers import AudioFrames, ClassTokens, ImagePatches, Labels, TextBytes

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MULTIMODAL_DATA", ROOT.parent / "shared" / "data"))
CORE = mm.Core(width=32, depth=1, heads=4, kv_heads=2)
KINDS = {
    "image": ClassTokens(ImagePatches(patch=4, channels=1), count=2, placed=1, table=(3, 5)),
    "audio": AudioFrames(rate_hz=8000, mels=16),
    "text": TextBytes(causal=True),
    "label": Labels([str(n) for n in range(10)]),
}
REAL = 50  # inputs of each sort
TEXTS = ["¿qué?", "a", *filter(None, (ROOT / "README.md").read_text(encoding="utf-8").splitlines())][:REAL]

pytestmark = pytest.mark.slow


@pytest.fixture
def runner(lively, tmp_path) -> Any:
    """runner(core, task) -> (the model, a runner of its export)."""
    for name in FORMATS["onnx"].needs:
        pytest.importorskip(name, reason="the extra `export` is not installed")
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python notest\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    module = ModuleType("document_export")
    exec(compile(code, "docs/export.md", "exec"), module.__dict__)

    def make(core: mm.Core | mm.EncoderDecoder, task: str | mm.Task) -> tuple[mm.Model, Any]:
        model = lively(mm.Model(KINDS, core, [task]))
        return model, module.Runner(model.export("onnx", tmp_path / "out"))

    return make


def digits() -> list[np.ndarray]:
    """Real handwritten digits; some are cut, so that their sizes differ."""
    pictures = np.float32(pytest.importorskip("sklearn.datasets").load_digits().images[:REAL] / 16)
    return [picture if i % 3 else picture[: 8 - 4 * (i % 2), :4] for i, picture in enumerate(pictures)]


def test_classes_of_digits(runner):
    model, program = runner(CORE, mm.Task("image -> label", mm.Classify(pool=Mean())))
    samples = [{"image": picture} for picture in digits()]
    wanted = [answer.value for answer in model.predict("image -> label", samples)]
    assert program.classify(samples) == wanted
    assert [program.classify([sample])[0] for sample in samples[:3]] == wanted[:3]
    assert len(wanted) == REAL
    assert len(set(wanted)) > 1
    # a picture whose attention would take all memory is refused, and nothing is run
    large = {"image": np.zeros((400, 400), np.float32)}
    with pytest.raises(ValueError, match=r"answer: attention of 1 samples of up to 10002 tokens takes about 8.9 GiB"):
        program.classify([large])
    program.most_bytes = 4**2 * 24 * 4  # 4 heads, the first picture without one of its rows
    with pytest.raises(ValueError, match="give fewer at once, or smaller ones"):
        program.classify([{"image": np.zeros((8, 8), np.float32)}])
    assert program.classify([{"image": np.zeros((4, 8), np.float32)}])


def test_transcripts_of_spoken_digits(runner):
    if not (DATA / "fsdd.zip").is_file():
        pytest.skip("no fsdd.zip in the folder of MULTIMODAL_DATA")
    model, program = runner(CORE, mm.Task("audio -> text", mm.CTC()))
    with zipfile.ZipFile(DATA / "fsdd.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".wav")]
        names = names[:: len(names) // REAL][:REAL]
        waves = [read_sound(archive.read(name), rate_hz=8000, who="tests") for name in names]
    samples = [{"audio": (wave_S, 8000)} for wave_S in waves]
    wanted = [answer.value for answer in model.predict("audio -> text", samples)]
    assert len(samples) == REAL
    assert program.transcribe(samples) == wanted
    assert len(set(wanted)) > 1


def test_texts_written_with_the_cache(runner):
    two = mm.EncoderDecoder(reader=CORE, writer=CORE)
    model, program = runner(two, mm.Task("image text -> answer:text", mm.NextToken(never=(7,), never_first=(256,))))
    samples = [{"image": picture, "text": text} for picture, text in zip(digits(), TEXTS, strict=True)]
    samples[1]["image"] = None
    wanted = model.generate("image text -> answer:text", samples, max_tokens=9)
    assert program.write(samples, max_tokens=9) == [answer.value for answer in wanted]
    assert program.write(samples[:1], max_tokens=4) == [
        model.generate("image text -> answer:text", samples[:1], max_tokens=4)[0].value
    ]


def test_what_the_model_refuses_is_refused(runner):
    model, program = runner(CORE.replace(learned_times=24), mm.Task("text -> answer:text", mm.NextToken()))
    for text, written in (("a" * 18, 5), ("a" * 18, 6), ("a" * 40, 1), ("", 24), ("a", 200)):
        sample, found = {"text": text or None}, []
        for write in (
            lambda sample=sample, written=written: program.write([sample], max_tokens=written)[0],
            lambda sample=sample, written=written: (
                model.generate("text -> answer:text", **sample, max_tokens=written).value
            ),
        ):
            try:
                found.append(write())
            except ValueError:
                found.append("refused")
        assert found[0] == found[1]
        assert (found[0] == "refused") == (len(text) + written > 23)


def test_no_tokens_at_all_are_refused(runner):
    _, program = runner(CORE, mm.Task("image text -> label"))
    with pytest.raises(ValueError, match="sample 1 has 0 tokens; wanted 1 to inf"):
        program.classify([{"image": None, "text": "a"}, {"image": None, "text": None}])


def test_vectors_of_texts_and_pictures(runner):
    model, program = runner(CORE, mm.Task("image <-> text", mm.Contrast(width=16)))
    for side, samples in (
        ("left", [{"image": picture} for picture in digits()]),
        ("right", [{"text": text} for text in TEXTS]),
    ):
        wanted = model.vectors("image <-> text", samples, side=side).numpy()
        np.testing.assert_allclose(program.vectors(side, samples), wanted, atol=1e-5)
