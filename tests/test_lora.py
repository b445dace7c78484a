"""Adapters: the model computes the same with them as after they are merged, they learn alone, and no save loses them."""

import copy
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal import lora
from multimodal.heads import cross_entropy
from multimodal.look.parameter_count import count_parameters, value_map
from multimodal.lora import LoRA
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.train.settings import make_job
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

LABEL, WRITE = "image -> label", "image -> text"
CORE = mm.Core(width=32, depth=2, heads=4, kv_heads=2)
CORES = {
    "core": CORE,
    "two cores": mm.EncoderDecoder(reader=CORE, writer=CORE),
    "memory": CORE.replace(block=(mm.layers.SelfAttention(), mm.layers.PersistentMemory(slots=4), mm.layers.MLP())),
}
SAMPLES = [
    {
        "image": torch.rand(1, 8 + 4 * (i % 3), 12, generator=torch.Generator().manual_seed(i)),
        "label": "ab"[i % 2],
        "text": "ab",
    }
    for i in range(5)
]
DATA = {LABEL: SAMPLES, WRITE: SAMPLES}
PLAIN = {"steps": 6, "batch": 4, "lr": 1e-2, "precision": "float32", "device": "cpu", "quiet": True}


def make(core: Any = CORE, seed: int = 0) -> mm.Model:
    tokenizers = {"image": ImagePatches(patch=4, channels=1), "label": Labels(("a", "b")), "text": TextBytes()}
    return mm.Model(tokenizers, core, [LABEL, WRITE], seed=seed).eval()


def adapted(core: Any = CORE, seed: int = 0, **settings: Any) -> mm.Model:
    """A model with adapters that change what it computes: peft begins with B = 0."""
    pytest.importorskip("peft", reason="adapters are made by peft: pip install 'multimodal-stream[finetune]'")
    model = make(core)
    LoRA(**{"rank": 3, "alpha": 6.0, **settings}).attach(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: mm.Model, **options: Any) -> dict[str, Tensor]:
    with model.inference_mode():
        return {task: model.logits(model.pack(task, SAMPLES), **options)[task] for task in (LABEL, WRITE)}


def close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(one[task], other[task], atol=atol, rtol=0) for task in one)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_linear_layer_of_the_parts_gets_one_and_nothing_changes_at_first():
    pytest.importorskip("peft", reason="adapters are made by peft")
    model, plain = make(), make()
    LoRA(rank=3, alpha=6.0, parts=("core[1]", "image")).attach(model)
    linear = {name for name, module in plain.named_modules() if type(module) is torch.nn.Linear}
    wanted = {name for name in linear if name.startswith(("core.blocks.1.", "embeds.image."))}
    assert len(wanted) == 5
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.lora_{x}.default.weight" for name in wanted for x in "AB"}
    assert not any(module.training for module in model.modules())
    assert count_parameters(model).total == model.parameter_counts()["all"] > plain.parameter_counts()["all"]
    assert close(logits(model), logits(plain), atol=1e-6)


def test_removed_adapters_leave_the_model_as_it_was():
    model, plain = adapted(parts=("core", "image")), make()
    assert not close(logits(model), logits(plain), atol=1e-2)
    lora.remove(model)
    assert same(model.state_dict(), plain.state_dict())
    assert same(logits(model), logits(plain))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.adapters is None


@pytest.mark.parametrize("backend", ["auto", "dense"])
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_logits_with_adapters_are_those_after_merging(core, backend):
    model, plain = adapted(core, parts=("core", "image", "head:image -> label")), make(core)
    stream = model.pack(LABEL, SAMPLES)
    rows, _ = stream.narrowed()
    assert 4 * len(rows) <= len(stream)  # few enough rows for the narrowed queries
    found = logits(model, backend=backend)
    assert not close(found, logits(plain), atol=1e-2)
    # the merged weights, computed here: W + alpha / rank B A
    state = model.state_dict()
    for name, weight in plain.state_dict().items():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in state:
            a, b = (state[f"{stem}.lora_{x}.default.weight"] for x in "AB")
            weight += 6.0 / 3 * b @ a
    assert close(found, logits(plain, backend=backend))
    lora.merge(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-6, rtol=0)
    assert close(logits(model, backend=backend), found)
    assert all(type(m) is not torch.nn.Linear or p.requires_grad for m in model.modules() for p in m.parameters())


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_a_layer_with_a_hook_is_called_when_queries_and_keys_come_of_other_tokens(core):
    """The oracle: a hook that adds what the adapter adds."""
    model, plain = adapted(core), make(core)
    adapters = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, layer in adapters.items():

        def add(module: Any, inputs: Any, out: Tensor, layer: Any = layer) -> Tensor:
            return out + 2.0 * layer.lora_B["default"](layer.lora_A["default"](inputs[0]))

        plain.get_submodule(name).register_forward_hook(add)
    assert close(logits(model), logits(plain))


@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_what_is_written_with_adapters_is_what_is_written_after_merging(core):
    model, plain = adapted(core), make(core)
    images = [{"image": sample["image"]} for sample in SAMPLES]

    def written(model: mm.Model) -> list[tuple[list[int], float]]:
        found = model.generate(WRITE, images, max_tokens=6)
        return [(answer.tokens.content.tolist(), round(answer.confidence, 4)) for answer in found]

    before = written(model)
    assert before != written(plain)
    lora.merge(model)
    assert written(model) == before


def test_the_loss_in_chunks_calls_an_adapted_head(monkeypatch):
    model = adapted(parts=("head:image -> text",))
    stream = model.pack(WRITE, SAMPLES)
    wanted = float(model.loss(stream).detach())
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    assert float(model.loss(stream).detach()) == pytest.approx(wanted, rel=1e-5)
    lora.merge(model)
    assert float(model.loss(stream).detach()) == pytest.approx(wanted, rel=1e-5)


def test_what_a_head_adds_to_the_stream_is_read_with_its_adapter():
    model = adapted()
    attention = model.core.blocks[0].layers[0].body.attention
    with torch.no_grad():
        before = value_map(attention, 1)
        lora.merge(model)
        after = value_map(model.core.blocks[0].layers[0].body.attention, 1)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_learn_and_all_else_stays(optimizer):
    model = adapted(learn=("head:image -> label",), dropout=0.1)
    before = copy.deepcopy(model.state_dict())
    run = mm.fit(model, {LABEL: SAMPLES}, **{**PLAIN, "steps": 60}, optimizer=optimizer)
    assert run.last("loss") < 0.7 * run.history[0]["loss"]
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {n for n in before if ".lora_" in n or n.startswith("readouts.label_Classify.")}


def test_adapters_are_saved_and_loaded_alone(tmp_path: Path):
    model = adapted(learn=("head:image -> label",))
    mm.fit(model, DATA, **PLAIN)
    folder = lora.save(model, tmp_path / "adapters")
    assert {path.name for path in folder.iterdir()} == {"adapters.json", "adapters.safetensors"}
    weights = sum(t.numel() for t in model.state_dict().values())
    assert (folder / "adapters.safetensors").stat().st_size < 4 * weights / 2
    other = make()
    lora.load(other, folder)
    assert same(other.state_dict(), model.state_dict())
    assert other.adapters == model.adapters
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
    # again over the old ones, and not over a file of somebody else
    mm.fit(model, DATA, **PLAIN)
    lora.save(model, folder)
    lora.remove(other)
    assert other.state_dict().keys() == make().state_dict().keys()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapters.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match="in the way"):
        lora.save(model, tmp_path / "mine")


def test_adapters_of_other_weights_or_damaged_ones_change_nothing(tmp_path: Path):
    folder = lora.save(adapted(), tmp_path / "adapters")
    other = make(seed=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="trained with other weights than this model has"):
        lora.load(other, folder)
    assert same(other.state_dict(), before)
    assert other.adapters is None
    lora.load(other, folder, any_base=True)
    lora.remove(other)
    assert same(other.state_dict(), before)
    with pytest.raises(CheckpointError, match="do not fit"):
        lora.load(make(CORE.replace(mlp_width=80)), folder, any_base=True)

    weights = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(weights[:-4] + b"\0\1\2\3")
    with pytest.raises(CheckpointError, match="checksum"):
        lora.load(make(), folder)
    (folder / "adapters.safetensors").write_bytes(weights)
    text = (folder / "adapters.json").read_text()
    for was, now, wanted in [
        ("multimodal.lora:LoRA", "os:system", "'os:system' is not installed"),
        ("multimodal.lora:LoRA", "multimodal.train.recipe:Recipe", "Recipe has no setting"),
        ('"rank": 3', '"rank": 0', "rank=0 must be a whole number, 1 or more"),
        ('"rank": 3', '"rank": 2', "do not fit"),
        ('"format": 1', '"format": 2', "this version reads 1"),
    ]:
        assert was in text
        (folder / "adapters.json").write_text(text.replace(was, now))
        model = make()
        with pytest.raises(CheckpointError, match=wanted):
            lora.load(model, folder)
        assert model.adapters is None


@pytest.mark.parametrize("core", [CORES["core"], CORES["two cores"]])
def test_a_saved_model_has_its_adapters(tmp_path: Path, core):
    model = adapted(core, learn=("head:image -> label",))
    loaded = mm.Model.load(model.save(tmp_path / "model"))
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.adapters == model.adapters
    assert close(logits(loaded), logits(model), atol=0)
    lora.merge(loaded)
    merged = mm.Model.load(loaded.save(tmp_path / "merged"))
    assert merged.adapters is None
    assert "adapters" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert close(logits(merged), logits(model))


def test_a_config_with_a_larger_rank_is_refused_before_it_takes_memory(tmp_path: Path):
    folder = adapted().save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["adapters"]["config"]["rank"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the weights do not fit the config"):
        mm.Model.load(folder)


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"optimizer": "muon", "layer_decay": 0.8}], ids=["ema", "muon"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, settings):
    settings = {**PLAIN, **settings}
    straight, cut, resumed = (adapted(dropout=0.2) for _ in range(3))
    mm.fit(straight, DATA, **settings, folder=tmp_path / "straight")
    stop = [lambda row: row["step"] == 3 and signal.raise_signal(signal.SIGINT)]
    assert not mm.fit(cut, DATA, **settings, folder=tmp_path / "cut", trackers=stop).finished
    with pytest.raises(CheckpointError, match=r"other settings: adapters\.config\.dropout was 0\.2 and is 0\.1"):
        mm.fit(adapted(dropout=0.1), DATA, **settings, folder=tmp_path / "cut", resume=True)
    with pytest.raises(CheckpointError, match=r"adapters was .*multimodal\.lora:LoRA.* and is None"):
        mm.fit(make(), DATA, **settings, folder=tmp_path / "cut", resume=True)
    assert mm.fit(resumed, DATA, **settings, folder=tmp_path / "cut", resume=True).finished
    assert same(resumed.state_dict(), straight.state_dict())
    loaded = mm.Model.load(tmp_path / "cut")
    assert loaded.adapters is not None
    assert same(loaded.state_dict(), straight.state_dict())


def test_what_would_lose_adapters_is_refused():
    model = adapted()
    with pytest.raises(ConfigError, match="has adapters, which the new one would lose"):
        model.extended(tasks=["text -> label"])
    with pytest.raises(ConfigError, match="without the adapters"):
        make_job(lambda: mm.TrainingJob(model=model, data=DATA), ["core.depth=3"], "recipe()")


def test_mistakes_are_refused():
    model = adapted()
    with pytest.raises(ConfigError, match="has adapters already"):
        LoRA().attach(model)
    plain = make()
    for verb in (lora.merge, lora.remove, lambda m: lora.save(m, "x")):
        with pytest.raises(ConfigError, match="has no adapters"):
            verb(plain)
    with pytest.raises(ConfigError, match=r"LoRA: 'cor' is no part .* did you mean 'core'"):
        LoRA(parts=("cor",)).attach(plain)
    with pytest.raises(ConfigError, match=r"parts=\('queries',\) have no linear layer"):
        LoRA(parts=("queries",)).attach(plain)
    assert all(p.requires_grad for p in plain.parameters())
    for settings in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"parts": "core"}):
        with pytest.raises(ConfigError):
            LoRA(**settings)


def test_a_model_with_adapters_is_not_exported(tmp_path):
    model = make()
    model.adapters = LoRA()
    with pytest.raises(ConfigError, match=r"export: .*adapters; call lora\.merge first"):
        model.export("hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"package peft .*pip install 'multimodal-stream\[finetune\]'"):
        LoRA().attach(make())
