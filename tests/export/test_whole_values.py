"""Programs of embeddings that read a whole value: learned tokens and positions at any size, convolved sound, towers."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.export import compare, programs
from multimodal.export.formats import FORMATS
from multimodal.heads import First, FirstAndMean
from multimodal.layers import Recurrent, SelfAttention
from multimodal.tower import Connector, Dropped, Linear, MLPConnector, PixelShuffle, Pooled
from multimodal_tokenizers import ClassTokens, ImagePatches, Labels, SpectrogramPatches, TextBytes, WhisperFrames

CLOSE = 1e-5
CORE = mm.Core(width=32, depth=2, heads=4, kv_heads=2)
INNER = mm.Core(width=24, depth=2, heads=2)
PATCHES = ImagePatches(patch=4, channels=1)
KINDS = {"text": TextBytes(), "label": Labels(("circle", "square", "star"))}
SOUND = WhisperFrames(mels=8, pad_seconds=None)
POOLED = mm.Task("image -> label", mm.Classify(pool=FirstAndMean(1)))


@pytest.fixture
def difference(lively):
    """Of the programs of a task with one more kind, run as modules, from the packed model."""

    def measure(kind: str, tokenizer: mm.Tokenizer, task: str | mm.Task, core: Any = CORE) -> float:
        model = lively(mm.Model({kind: tokenizer, **KINDS}, core, [task]))
        (pattern,) = model.tasks
        made = {program.name: program for program in programs.programs_of(model, pattern)}
        with torch.no_grad():
            return compare.largest_difference(
                model, pattern, list(made.values()), lambda name, inputs: made[name](inputs)
            )

    return measure


@pytest.mark.parametrize("resample", ["bicubic", "antialiased", "bilinear", "nearest"])
def test_learned_positions_at_any_size(difference, resample):
    for table, (count, placed) in itertools.product([(5, 7), (2, 2), (1, 9)], [(0, 0), (1, 1), (5, 1)]):
        kind = ClassTokens(PATCHES, count, placed, table, resample)
        assert difference("image", kind, POOLED) <= CLOSE, kind


def test_learned_tokens_without_a_table(difference):
    assert difference("image", ClassTokens(PATCHES, 2, turns=2.0), "image -> label") <= CLOSE
    assert difference("image", ClassTokens(PATCHES, 2, placed=1), "image <-> text") <= CLOSE


@pytest.mark.parametrize("resample", ["bicubic", "antialiased", "bilinear", "nearest"])
def test_shares_of_a_table_are_those_of_a_resized_one(resample):
    """Beside PyTorch's own interpolation, without a core: larger and smaller grids, and a value of none."""
    kind = ClassTokens(PATCHES, 1, 1, (6, 4), resample)
    module = kind.embed(8)
    sizes = [(9, 5), (2, 3), (6, 4), (1, 1)]
    values = [torch.randn(1 + rows * columns, 18) for rows, columns in sizes]
    index = [torch.arange(rows * columns) for rows, columns in sizes]
    positions = [
        torch.cat([torch.zeros(1, 3), torch.stack([i * 0 + 1, i // columns, i % columns], -1).float()])
        for i, (_, columns) in zip(index, sizes, strict=True)
    ]
    places = mm.tokenizer.Places.of([mm.Tokens(x, p) for x, p in zip(values, positions, strict=True)], (1.0, 1.0, 1.0))
    wanted = module(torch.cat(values), places).split([len(x) for x in values])

    def padded(parts: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([*parts, torch.zeros(0, parts[0].shape[1])], batch_first=True)

    length_B = torch.tensor([*map(len, values), 0])
    found = module.padded(padded(values), padded(positions), length_B)
    assert bool(found.isfinite().all())
    for row, rows in zip(found, wanted, strict=False):
        torch.testing.assert_close(row[: len(rows)], rows, atol=2e-6, rtol=0)


def test_sounds(difference):
    assert difference("audio", SOUND, mm.Task("audio -> text", mm.CTC())) <= CLOSE
    two = mm.EncoderDecoder(reader=CORE, writer=CORE)
    assert difference("audio", SOUND, "audio text -> other:text", two) <= CLOSE
    patches = ClassTokens(SpectrogramPatches(frames=64, mels=32), 2, 2, (2, 5))
    assert difference("audio", patches, mm.Task("audio -> label", mm.Classify(pool=First(2)))) <= CLOSE


CONNECTORS: dict[str, tuple[int, Connector]] = {
    "linear": (0, Linear()),
    "mlp with learned tokens": (2, MLPConnector()),
    "pixel shuffle": (0, PixelShuffle(2)),
    "dropped": (3, Dropped(3, MLPConnector())),
    "dropped and shuffled": (1, Dropped(1, PixelShuffle(2))),
    "pooled": (1, Pooled(40, FirstAndMean(1))),
    "pooled, few": (1, Pooled(5)),
}


@pytest.mark.parametrize("name", CONNECTORS)
def test_towers(difference, name):
    learned, connector = CONNECTORS[name]
    tower = mm.Tower(ClassTokens(PATCHES, learned, 0, (3, 4)), INNER, connector)
    assert difference("image", tower, "image -> label") <= CLOSE
    assert difference("image", tower, "image text -> other:text") <= CLOSE


def test_towers_of_texts_and_sounds(difference):
    words = mm.Tower(TextBytes(causal=True), INNER, causal=True)
    assert difference("words", words, "words text -> label") <= CLOSE
    assert difference("audio", mm.Tower(SOUND, INNER), "audio -> text") <= CLOSE


class Neighbours(torch.nn.Module):
    """An embedding of one's own that reads places, and does not say how it embeds padded values."""

    reads_places = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(18, width)

    def forward(self, content: Tensor, places: Any) -> Tensor:
        return self.linear(content)


@dataclass(frozen=True)
class Own(ImagePatches):
    def embed(self, width: int) -> torch.nn.Module:
        return Neighbours(width)


def test_what_cannot_be_padded_is_refused_by_name(difference):
    message = r"embedding of 'image' \({}: Neighbours\) depends on where .* write `padded` of its module"
    own = Own(patch=4, channels=1)
    with pytest.raises(mm.ConfigError, match=message.format("Own")):
        difference("image", own, "image -> label")
    with pytest.raises(mm.ConfigError, match=message.format("Tower")):
        difference("image", mm.Tower(own, INNER), "image -> label")
    carries = INNER.replace(block=(SelfAttention(), Recurrent()))
    with pytest.raises(mm.ConfigError, match="Recurrent carries a state from token to token"):
        difference("image", mm.Tower(PATCHES, carries), "image -> label")


def planted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One fault in how padded values are embedded."""
    stem, learned = type(SOUND.embed(8)), type(ClassTokens(PATCHES, 1).embed(8))
    if name == "padding is heard":
        of = stem.padded
        monkeypatch.setattr(stem, "padded", lambda self, x, p, length_B: of(self, x + 1, p, length_B * 0 + x.shape[1]))
    elif name == "rows are columns":
        of_places = learned.padded
        monkeypatch.setattr(learned, "padded", lambda self, x, p, n: of_places(self, x, p[..., [0, 2, 1]], n))
    elif name == "slots are in the order of the stream":
        scatter = Tensor.scatter
        monkeypatch.setattr(
            Tensor, "scatter", lambda self, axis, index, source: scatter(self, axis, index.sort(axis)[0], source)
        )
    else:
        raise AssertionError(name)


@pytest.mark.parametrize("name", ["padding is heard", "rows are columns", "slots are in the order of the stream"])
def test_a_planted_fault_is_found(difference, monkeypatch, name):
    tower = mm.Tower(ClassTokens(PATCHES, 1, 0, (3, 4)), INNER, Dropped(1, PixelShuffle(2)))
    cases = {
        "padding is heard": ("audio", SOUND, mm.Task("audio -> text", mm.CTC())),
        "rows are columns": ("image", ClassTokens(PATCHES, 1, 1, (5, 7)), POOLED),
        "slots are in the order of the stream": ("image", tower, "image -> label"),
    }
    assert difference(*cases[name]) <= CLOSE
    planted(monkeypatch, name)
    assert difference(*cases[name]) > 1e-3


def test_a_dinov2_classifier_is_that_of_transformers_at_three_sizes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from multimodal.pretrained import pretrained
    from tests.pretrained.compared import saved
    from tests.pretrained.pictured import LABELS, normalised, pictures, tokens

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(**small, id2label=LABELS)
    theirs = transformers.Dinov2WithRegistersForImageClassification(config)
    loaded = pretrained(saved(theirs, tmp_path / "theirs"))
    model, values = loaded.model(), pictures([(16, 16), (20, 12), (8, 32)])
    (program,) = programs.programs_of(model, "image -> label")
    samples = [{"image": tokens(loaded, x)} for x in values]
    with torch.inference_mode():
        found = program(compare.padded_inputs(model, program.fields, samples))["logits"]
        wanted = torch.cat([theirs(normalised(x)).logits for x in values])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_whisper_is_that_of_transformers_prefill_and_steps(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from multimodal.pretrained import pretrained
    from tests.pretrained.test_whisper import IDS, START, WRITING, build, given, waves

    torch.manual_seed(0)
    theirs = build()
    loaded = pretrained(given(theirs, tmp_path / "theirs", **WRITING))
    model, task, ids = loaded.model(), "audio -> text", IDS[0]
    made = {program.name: program for program in programs.programs_of(model, task)}
    wave = waves()[1]
    heard = model.packer.tokenizers["audio"]((wave, 16000))
    starts = [START, 72, 74, 76]
    assert model.packer.heads[task].start_ids == tuple(starts)  # type: ignore[attr-defined]
    place_NA = model.packer.answer_tokenizers[task].places(len(ids))
    frames = heard.content.view(len(heard), 2, -1).flatten(0, 1).T[None]
    with torch.inference_mode():
        wanted = theirs(frames, decoder_input_ids=torch.tensor([[*starts, *ids]])).logits[0, len(starts) - 1 :]
        out = made["prefill"](compare.padded_inputs(model, made["prefill"].fields, [{"audio": heard}]))
        found, state = [out["logits"]], {}
        for token, place_A in zip(ids, place_NA, strict=True):
            state |= {name.removesuffix(programs.NEXT): x for name, x in out.items() if name.endswith(programs.NEXT)}
            out = made["step"]({"token": torch.tensor([token]), "token.place": place_A[None], **state})
            found.append(out["logits"])
    torch.testing.assert_close(torch.cat(found), wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_all_of_them_in_one_program_as_it_is_written(lively, tmp_path, to):
    for name in FORMATS[to].needs:
        pytest.importorskip(name, reason="the extra `export` is not installed")
    eye = ClassTokens(PATCHES, 1, 0, (3, 4), "antialiased")
    tower = mm.Tower(eye, INNER.replace(depth=1), Dropped(1, PixelShuffle(2)))
    model = lively(mm.Model({"eye": tower, "audio": SOUND, **KINDS}, CORE.replace(depth=1), ["eye audio -> label"]))
    model.export(to, tmp_path / "out")  # which compares it with the model
