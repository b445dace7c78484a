"""Steps that go wrong: detected, saved, and traced to the sample that caused them."""

import importlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.cli import main
from multimodal.heads.contrast import Contrast
from multimodal.heads.each_row import EachRow
from multimodal.heads.flow import FlowMatching
from multimodal.heads.masked import Masked
from multimodal.heads.pointer import Pointer
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.stream import Stream
from multimodal.tokenizer import Tokenizer, Tokens, at_times
from multimodal.train.spikes import (
    SavedStep,
    SpikeWatch,
    load_spike,
    load_stream,
    replay,
    samples_of,
    save_spike,
    save_stream,
)
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes


@dataclass(frozen=True)
class Points(Tokenizer):
    causal: bool = False
    feature_size = 2

    def encode(self, value: Any) -> Tokens:
        return Tokens(torch.tensor(value, dtype=torch.float32), at_times(torch.arange(len(value))))

    def decode(self, tokens: Tokens) -> list[list[float]]:
        return tokens.content.tolist()


TASKS = [
    "image text -> label",
    "text -> out:story",
    mm.Task("sound -> text", mm.CTC()),
    mm.Task("points -> hull:points", Pointer()),
    mm.Task("text -> points", FlowMatching(width=16, depth=1), weight=0.5),
    mm.Task("text -> other:text", EachRow()),
    mm.Task("image -> image", Masked(0.5)),
    mm.Task("image <-> text", Contrast()),
]
TOKENIZERS = {
    "image": ImagePatches(patch=4, channels=1),
    "text": TextBytes(),
    "story": TextBytes(causal=True),
    "sound": AudioFrames(rate_hz=8000, mels=8, stack=2),
    "label": Labels(("circle", "square", "star")),
    "points": Points(),
}


def model_of(**settings: Any) -> mm.Model:
    return mm.Model(TOKENIZERS, mm.Core(width=16, depth=2, heads=2, **settings), TASKS)


def sample(values: Any, number: int) -> dict[str, Any]:
    points = torch.rand(4 + number % 3, 2, generator=torch.Generator().manual_seed(number)).tolist()
    made = {**values(number), "points": points, "hull": points[::-2]}
    made |= {"out": made["story"], "text": f"t{number}", "other": "ab"}
    made["sound"] = (torch.linspace(-1, 1, 1500 + 100 * number).numpy(), 8000)
    return made


def batch_of(values: Any, model: mm.Model, count: int = 2) -> list[tuple[str, dict[str, Any]]]:
    tasks = list(model.tasks)
    return [(tasks[i % len(tasks)], sample(values, i)) for i in range(count * len(tasks))]


def differences(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Where two values differ, bit for bit, types and order of keys too."""
    if type(one) is not type(other):
        yield f"{name}: {type(one)} {type(other)}"
    elif isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one, other):
            yield name
    elif is_dataclass(one):
        for f in fields(one):
            yield from differences(getattr(one, f.name), getattr(other, f.name), f"{name}.{f.name}")
    elif isinstance(one, dict):
        if list(one) != list(other):
            yield f"{name}: keys {list(one)} {list(other)}"
        else:
            for key in one:
                yield from differences(one[key], other[key], f"{name}[{key}]")
    elif isinstance(one, tuple):
        if len(one) != len(other):
            yield f"{name}: {len(one)} {len(other)}"
        for i, (x, y) in enumerate(zip(one, other, strict=False)):
            yield from differences(x, y, f"{name}[{i}]")
    elif one != other:
        yield f"{name}: {one} {other}"


def test_a_stream_of_every_head_survives(tmp_path: Path, values) -> None:
    model = model_of()
    stream = model.packer(batch_of(values, model))
    assert set(stream.readings) == set(model.tasks)
    assert stream.order_T is not None
    points = stream.readings["points -> hull:points"]
    assert points.key_N is not None
    assert points.pointed_lengths
    save_stream(tmp_path / "a.safetensors", stream)
    again = load_stream(tmp_path / "a.safetensors")
    assert list(differences(stream, again)) == []
    assert list(differences(stream, model.packer(batch_of(values, model, 1)))) != []
    torch.manual_seed(0)
    losses = model.losses(stream)
    torch.manual_seed(0)
    assert all(torch.equal(losses[task], loss) for task, loss in model.losses(again).items())
    # of one kind after the other already, with -1 for nothing
    alone = model.packer([("text -> out:story", sample(values, 1))])
    save_stream(tmp_path / "a.safetensors", alone)
    assert list(differences(alone, load_stream(tmp_path / "a.safetensors"))) == []


def test_a_damaged_stream_is_refused(tmp_path: Path, values) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*no stream"):
        load_stream(path)
    model = model_of()
    save_stream(path, model.packer(batch_of(values, model)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        load_stream(path)


def test_a_sample_cut_out_is_what_the_packer_makes_of_it_alone(values) -> None:
    model = model_of()
    batch = batch_of(values, model, 3)
    stream = model.packer(batch)
    found = {number: (task, alone) for task, number, alone in samples_of(stream)}
    assert sorted(found) == list(range(len(batch)))
    for number, (task, alone) in found.items():
        assert task == batch[number][0]
        assert list(differences(alone, model.packer([batch[number]]))) == [], number


def formula(norms: list[float], spike: float, decay: float, warmup: int) -> list[bool]:
    """The same from its definition: all norms before, each capped when it came, weighed by decay ** age."""
    capped: list[float] = []
    found = []
    for norm in norms:
        if not math.isfinite(norm):
            found.append(True)
            continue
        weights = [decay ** (len(capped) - 1 - i) for i in range(len(capped))]
        most = math.inf
        if len(capped) >= warmup and capped:
            most = spike * sum(w * x for w, x in zip(weights, capped, strict=True)) / sum(weights)
        found.append(norm > most)
        capped.append(min(norm, most))
    return found


def test_spikes_are_those_of_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    norms = (torch.randn(300, generator=draw).exp() * torch.linspace(1, 5, 300)).tolist()
    norms[3], norms[10], norms[50], norms[100], norms[200] = 1e6, 1e9, math.inf, 90.0, math.nan
    for settings in ({"spike": 4.0, "decay": 0.9, "warmup": 10}, {"spike": 6.0, "decay": 0.98, "warmup": 0}):
        watch = SpikeWatch(**settings)
        found = [watch.why(1.0, norm) for norm in norms]
        assert [why is not None for why in found] == formula(norms, **settings)
        assert 4 < sum(why is not None for why in found) < 60
        assert "times the mean of those before" in str(found[100])
        assert "gradient norm nan" in str(found[200])


def test_only_what_is_not_finite_is_found_without_a_spike() -> None:
    watch = SpikeWatch(spike=0)
    assert [watch.why(1.0, x) is None for x in (*[1.0] * 30, 1e9, math.nan)] == [*[True] * 31, False]
    assert watch.why(math.inf, 1.0) is not None
    with pytest.raises(ConfigError, match=r"spike=0\.5 must be above 1"):
        SpikeWatch(spike=0.5)


def test_norms_that_rise_for_good_are_followed() -> None:
    watch = SpikeWatch()
    found = [watch.why(1.0, 1.0 if step < 100 else 50.0) is not None for step in range(200)]
    assert not any(found[:100])
    assert 5 < sum(found) < 40
    assert not any(found[150:])


def test_the_watch_resumes_exactly_after_json() -> None:
    norms = torch.randn(120, generator=torch.Generator().manual_seed(0)).exp().mul(3).tolist()
    one = SpikeWatch(spike=3.0, warmup=5)
    for norm in norms[:60]:
        one.why(0.1, norm)
    other = SpikeWatch(spike=3.0, warmup=5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other == one
    assert [one.why(0.1, norm) for norm in norms[60:]] == [other.why(0.1, norm) for norm in norms[60:]]
    assert one.state_dict() == other.state_dict()


def tidy(model: mm.Model, values: Any, count: int = 6) -> list[tuple[str, dict[str, Any]]]:
    tasks = ("image text -> label", "text -> out:story")
    return [(tasks[i % 2], sample(values, i)) for i in range(count)]


def save(tmp_path: Path, model: mm.Model, streams: list[Stream], **options: Any) -> Path:
    place = save_spike(tmp_path, 123, streams, "the norm is too large", model, **options)
    assert place == tmp_path / "trouble" / "step-0000123"
    return place


def loaded(place: Path) -> tuple[mm.Model, SavedStep]:
    return mm.Model.load(place / "model", finite=False), load_spike(place)


def test_replay_finds_a_planted_nan(tmp_path: Path, values, monkeypatch, capsys) -> None:
    model = model_of(dropout=0.3)
    batch = tidy(model, values)
    streams = [model.packer(batch[:4]), model.packer(batch[4:])]
    bad = next(alone for _, number, alone in samples_of(streams[0]) if number == 2).content["image"]
    image = streams[0].content["image"]
    image[(image[:, None] == bad).all(-1).any(1)] = torch.nan
    names = [[f"round 0, sample {i}" for i in part] for part in ((10, 11, 12, 13), (14, 15))]
    place = save(tmp_path, model, streams, names=names)
    found = replay(*loaded(place))
    assert [row.finite for row in found.batches] == [False, True]
    worst = found.samples[0]
    assert (worst.sample, worst.name, worst.first) == (2, "round 0, sample 12", "content of image")
    assert not worst.finite
    assert any(name.startswith("core.blocks.0.") for name in worst.parameters)
    assert all(row.finite for row in found.samples[1:])
    assert found.notes == found.weights == ()

    monkeypatch.chdir(tmp_path)
    importlib.import_module("multimodal.cli.train")
    assert main(["replay", str(place), "--device", "cpu", "--rows", "2"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("step 123: the norm is too large\n")
    table = text.split("\n\n")[2].splitlines()
    assert "sample 12" in table[1]
    assert "content of image" in table[1]
    assert len(table) == 4
    assert table[3] == "4 more samples (--rows)"
    assert main(["replay", str(place), "--device", "cpu", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["samples"][0]["name"] == "round 0, sample 12"
    assert facts["samples"][0]["loss"] == "nan"


def test_replay_names_the_layer_where_it_began(tmp_path: Path, values) -> None:
    """Weights so large that one layer overflows, and weights that were broken before the step."""
    model = model_of()
    stream = model.packer(tidy(model, values))
    with torch.no_grad():
        model.core.blocks[1].layers[1].body.gate_up.weight.mul_(1e3)  # pyright: ignore
        model.core.blocks[1].layers[1].body.down.weight.fill_(3e38)  # pyright: ignore
    found = replay(*loaded(save(tmp_path, model, [stream])))
    assert {row.first for row in found.samples} == {"core.blocks.1.layers.1.body.down"}
    assert found.weights == ()
    with torch.no_grad():
        model.core.blocks[0].layers[0].body.attention.out.weight[0, 0] = torch.nan  # pyright: ignore
    found = replay(*loaded(save(tmp_path, model, [stream])))
    assert {row.first for row in found.samples} == {"core.blocks.0.layers.0.body.attention.out"}
    assert found.weights == ("core.blocks.0.layers.0.body.attention.out.weight",)


def test_replay_ranks_a_huge_sample_first_and_measures_gradients(tmp_path: Path, values) -> None:
    """A label that is nearly impossible under the weights; norms against autograd on packs of one sample."""
    model = model_of(dropout=0.4).eval()
    batch = tidy(model, values)
    readout = model.readout("image text -> label")
    with torch.no_grad():
        readout.linear.bias.copy_(torch.tensor([0.0, 0.0, -300.0]))
    assert batch[2][1]["label"] == "star"
    streams = [model.packer(batch[:3]), model.packer(batch[3:])]
    found = replay(*loaded(save(tmp_path, model, streams)))
    assert found.samples[0].sample == 2
    assert found.samples[0].file.startswith("stream-0-000")
    assert found.samples[0].loss > 250
    assert all(row.finite for row in found.samples)
    assert found.notes == ()
    counts = {task: sum(s.readings[task].count for s in streams) for task in streams[0].readings}
    for row in found.samples:
        number = row.sample + 3 * row.file.startswith("stream-0-001")  # pyright: ignore
        stream = model.packer([batch[number]])
        model.zero_grad()
        model.loss(stream, counts=counts).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(row.norm, float(norm), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(row.loss, float(model.loss(stream).detach()), rtol=1e-4, atol=1e-6)
    total = sum(row.loss for row in found.batches)
    torch.testing.assert_close(
        total, sum(float(model.loss(s, counts=counts).detach()) for s in streams), rtol=1e-4, atol=0
    )


def test_a_loss_across_samples_is_said(tmp_path: Path, values) -> None:
    model = model_of()
    pairs = [("image <-> text", sample(values, i)) for i in range(4)]
    (note,) = replay(*loaded(save(tmp_path, model, [model.packer(pairs)]))).notes
    assert "goes across samples" in note


def test_the_number_of_saved_steps_is_bounded_and_dropped_ones_are_listed(tmp_path: Path, values) -> None:
    model = model_of()
    stream = model.packer(tidy(model, values, 2))
    places = [save_spike(tmp_path, step, [stream], f"why {step}", model, most=2) for step in (5, 9, 9, 11, 12)]
    assert [place and place.name for place in places] == ["step-0000005", "step-0000009", "step-0000009", None, None]
    lines = (tmp_path / "trouble" / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 11, "why": "why 11"}, {"step": 12, "why": "why 12"}]


def test_every_process_saves_its_own_part(tmp_path: Path, values) -> None:
    model = model_of()
    streams = [model.packer(tidy(model, values, n)) for n in (2, 3, 4)]
    counts = {"image text -> label": 50, "text -> out:story": 70}
    for process, mine in enumerate((streams[:1], streams[1:])):
        save_spike(
            tmp_path,
            7,
            mine,
            "too large",
            model if process == 0 else None,
            counts=counts,
            precision="bfloat16",
            process=process,
            most=1,
        )
    saved = load_spike(tmp_path / "trouble" / "step-0000007")
    assert (saved.step, saved.why, saved.precision, saved.counts) == (7, "too large", "bfloat16", counts)
    assert [(b.process, b.file) for b in saved.batches] == [
        (0, "stream-0-000.safetensors"),
        (1, "stream-1-000.safetensors"),
        (1, "stream-1-001.safetensors"),
    ]
    for batch, stream in zip(saved.batches, streams, strict=True):
        assert list(differences(batch.stream, stream)) == []
    with pytest.raises(CheckpointError, match="no step is saved here"):
        load_spike(tmp_path)
    (tmp_path / "trouble" / "step-0000007" / "trouble-1.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trouble-1\.json: damaged"):
        load_spike(tmp_path / "trouble" / "step-0000007")
