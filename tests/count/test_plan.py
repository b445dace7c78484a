"""The plan against a real training: memory by the profiler, FLOPs by PyTorch's counter, masks by brute force."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import multimodal as mm
from multimodal.count import GPUS, StreamStats, count_stream, find_gpu, plan, rank_memory, stream_of_length, token_flops
from multimodal.count.flops import embed_cost, parameters, saved_bytes, transformer
from multimodal.count.memory import FLOAT, layer_activations
from multimodal.count.planning import USABLE
from multimodal.count.streams import seen_pairs
from multimodal.network import without_weights
from multimodal.shapes import ConfigError
from multimodal.train.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan as bench  # noqa: E402

CASE = bench.Case(width=64, depth=3, batch=6, length=31, vocab=200)
CASES = [
    CASE,
    dataclasses.replace(CASE, checkpointing=True, kv_heads=2),
    dataclasses.replace(CASE, precision="bfloat16", rows=16),
    dataclasses.replace(CASE, accumulate=3, ema=0.9, optimizer="muon", depth=2),
    dataclasses.replace(CASE, vocab=4000, depth=2, batch=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.changes)
def test_memory_is_what_training_takes(case):
    model, data = case.model(), case.data()
    weights = sum(p.nbytes for p in model.parameters())
    taken = weights + bench.peak_bytes(lambda: mm.fit(model, data, case.recipe(), quiet=True))
    planned = case.planned()
    assert planned.total == pytest.approx(taken, rel=0.012)
    assert planned.parts["weights"] == weights
    assert not planned.unknown


@pytest.mark.parametrize("checkpointing", [True, False])
def test_copies_in_bfloat16_stay_to_the_end_of_the_forward_pass(checkpointing):
    case = bench.Case(width=256, depth=4, batch=1, length=7, precision="bfloat16", checkpointing=checkpointing)
    model = case.model().train()
    stream = model.pack(case.task, case.data()[case.task])
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        taken = bench.peak_bytes(lambda: losses.append(model.loss(stream)))
    planned = case.planned()
    always = planned.parts["weights"] + planned.parts["optimiser state"]
    assert planned.moments["end of the forward pass"] - always == pytest.approx(taken, rel=0.03)
    assert taken > 2 * parameters(model)["core"]


LONG_MASK = dataclasses.replace(CASE, rows=64, length=63, batch=1)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], LONG_MASK], ids=lambda case: case.changes)
def test_every_part_is_what_is_saved_for_the_backward_pass(case):
    saved = bench.saved_by_part(case)
    for part, size in bench.planned_by_part(case).items():
        assert size == pytest.approx(saved[f"saved {part}"], rel=0.01), part


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=lambda case: case.changes)
def test_flops_are_those_that_pytorch_counts(case):
    counted, planned = bench.counted_flops(case)
    assert counted > 1e6
    assert planned == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_is_what_the_optimiser_holds(optimizer):
    case = dataclasses.replace(CASE, optimizer=optimizer)
    model = case.model()
    optimiser = make_optimizer(model, case.recipe(), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    held = [t for entry in optimiser.state.values() for t in entry.values() if isinstance(t, torch.Tensor) and t.dim()]
    assert case.planned().parts["optimiser state"] == sum(t.nbytes for t in held)


@pytest.mark.parametrize("rows", [0, 5])
def test_context_is_how_many_tokens_the_mask_lets_see(rows):
    case = dataclasses.replace(CASE, rows=rows, length=6, batch=3)
    model, data = case.model(), case.data()
    stats = count_stream(model, data)
    written = case.length + 1
    # what is read is bidirectional; what is written sees all before it
    pairs = rows**2 + sum(rows + i for i in range(1, written + 1))
    assert stats.context == pytest.approx(pairs / (rows + written))
    assert stats.bidirectional == pytest.approx(rows / (rows + written))
    assert (stats.length, stats.samples, stats.runs) == (rows + written, 3, False)
    assert stats.rows["id_NextToken"] == pytest.approx(written / (rows + written))


def test_pairs_of_a_window_are_those_of_its_dense_mask():
    core = mm.Core(width=16, depth=1, heads=2, mask=mm.masks.Window(3) & mm.masks.Causal())
    model = mm.Model({"id": bench.Ids(9)}, core, [mm.Task("-> id", mm.NextToken())])
    stream = model.pack("-> id", [{"id": torch.zeros(n, dtype=torch.long)} for n in (4, 9, 9)])
    places = stream.layout.info
    dense = (core.mask.allows(places[:, None], places[None]) & (places.sample[:, None] == places.sample[None])).sum()
    assert seen_pairs(core.mask, stream.layout) == int(dense)


def test_samples_of_other_lengths_make_runs():
    model = CASE.model()
    data = {"-> id": [{"id": torch.zeros(n, dtype=torch.long)} for n in (4, 9)]}
    stats = count_stream(model, data)
    assert stats.runs
    assert (stats.length, stats.longest) == (7.5, 10)


def test_tasks_weigh_as_they_are_mixed_however_many_samples_they_have():
    model = mm.Model(
        {"id": bench.Ids(9), "row": bench.Rows()},
        mm.Core(width=16, depth=1, heads=2),
        [mm.Task("-> id", mm.NextToken()), "row -> id"],
    )
    ids, rows = (
        {"id": torch.zeros(4, dtype=torch.long)},
        {"id": torch.zeros(4, dtype=torch.long), "row": torch.zeros(10, 48)},
    )
    data = {"-> id": [ids] * 100, "row -> id": [rows] * 3}
    assert count_stream(model, data, samples=40).length == pytest.approx((5 + 15) / 2)
    assert count_stream(model, data, samples=40, mix={"-> id": 3}).length == pytest.approx((3 * 5 + 15) / 4)


def test_no_more_samples_are_read_than_asked_for():
    reported = []
    model = CASE.model()
    endless = iter(lambda: {"id": torch.zeros(4, dtype=torch.long)}, None)
    stats = count_stream(model, {"-> id": endless}, samples=40, progress=reported.append)
    assert stats.samples == sum(reported) == 40


def test_a_huge_model_is_planned_without_memory():
    with torch.device("meta"):
        model = mm.Model({"id": bench.Ids(1000)}, mm.Core.xxl_7b(), [mm.Task("-> id", mm.NextToken())])
    assert all(p.is_meta for p in model.parameters())
    assert parameters(model)["core"] == mm.Core.xxl_7b().parameters
    assert sum(parameters(model).values()) > 6.9e9


def test_only_weights_are_without_memory_and_only_inside():
    with without_weights():
        model, other = CASE.model(), torch.zeros(2)
    assert all(p.is_meta for p in model.parameters())
    assert not other.is_meta
    with pytest.raises(ConfigError), without_weights():
        mm.Model({"id": bench.Ids(9)}, mm.Core(width=8, depth=1, heads=2), ["id -> nothing"])
    assert not next(CASE.model().parameters()).is_meta


def test_counts_without_memory_are_those_with_it():
    case = CASES[2]
    with without_weights():
        without = case.model()
    stats = count_stream(case.model(), case.data())
    assert count_stream(without, case.data()) == stats
    assert parameters(without) == parameters(case.model())
    assert rank_memory(without, stats, case.work(stats.length)) == case.planned()


BLOCKS = [
    (mm.layers.SelfAttention(), mm.layers.PersistentMemory(slots=8), mm.layers.MLP()),
    (mm.layers.Recurrent(), mm.layers.MLP()),
    (mm.layers.SelfAttention(mask=mm.masks.Window(4)), mm.layers.MLP()),
    (mm.layers.SelfAttention(score=mm.attention.Additive()), mm.layers.MLP()),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "+".join(type(layer).__name__ for layer in block))
def test_other_layers_are_measured(block):
    core = mm.Core(width=32, depth=1, heads=4, block=block)
    model = mm.Model({"id": bench.Ids(50)}, core, [mm.Task("-> id", mm.NextToken())])
    samples = [{"id": torch.zeros(47, dtype=torch.long)} for _ in range(3)]
    stats = count_stream(model, {"-> id": samples})
    stream = model.train().pack("-> id", samples)
    planned = sum(
        sum(layer_activations(layer, core, stats, half=False, cuda=False).parts.values())
        for layer in transformer(model).sublayers()
    )
    with saved_bytes([*model.parameters(), *stream.content.values()]) as saved:
        states = model(stream)
        taken = saved()
    ends = 2 * FLOAT * core.width + FLOAT * core.head_width  # the last norm and its output; the rotations
    assert (planned + ends) * len(stream) == pytest.approx(taken, rel=0.1)
    del states


def test_layers_too_large_to_be_measured_are_reported():
    core = mm.Core(width=8192, depth=1, heads=64, block=(mm.layers.SelfAttention(), mm.layers.Recurrent()))
    with torch.device("meta"):
        model = mm.Model({"id": bench.Ids(50)}, core, [mm.Task("-> id", mm.NextToken())])
    found = plan(model, mm.Recipe(), length=100)
    assert found.memory.unknown == ("what Recurrent saves",)
    assert any("lower bound: what Recurrent saves" in line for line in found.assumptions)


def test_an_embedding_that_cannot_be_run_without_memory_is_marked_unknown():
    class ReadsContent(torch.nn.Linear):
        def forward(self, content):
            return super().forward(content) * content.sum().item()

    @dataclasses.dataclass(frozen=True)
    class Odd(bench.Rows):
        def embed(self, width):
            return ReadsContent(self.feature_size, width)

    cost, usual = embed_cost(Odd(), 16, False), embed_cost(bench.Rows(), 16, False)
    assert (cost.known, usual.known) == (False, True)
    assert cost.forward == usual.forward == 2 * 48 * 16
    assert usual.training == 4 * 48 * 16  # no gradient of its input


def seven_billion() -> mm.Model:
    with torch.device("meta"):
        return mm.Model({"id": bench.Ids(32000)}, mm.Core.xxl_7b(), [mm.Task("-> id", mm.NextToken())])


def test_what_would_make_it_fit_does():
    model = seven_billion()
    recipe = mm.Recipe(batch=64)
    found = plan(model, recipe, length=2048, gpus=8, gpu="b200")
    assert not found.fits
    assert found.memory.total > USABLE * found.gpu.memory
    settings = next(line for line in found.repairs if "parallel=fsdp" in line)
    changed = dataclasses.replace(
        recipe, parallel="fsdp", activation_checkpointing="activation_checkpointing" in settings
    )
    assert plan(model, changed, length=2048, gpus=8, gpu="b200").fits
    worse = plan(model, changed, length=2048, gpus=8, gpu="rtx4090")
    assert not worse.fits
    assert all("rtx4090" not in line for line in worse.repairs)


def test_long_samples_want_context_parallel():
    with torch.device("meta"):
        model = mm.Model({"id": bench.Ids(256)}, mm.Core.xxl_7b(), [mm.Task("-> id", mm.NextToken())])
    recipe = mm.Recipe(batch=64, parallel="fsdp", activation_checkpointing=True)
    long = {"length": 131072, "gpus": 64, "gpu": "h100"}
    found = plan(model, recipe, **long)
    assert not found.fits
    (line,) = found.repairs
    assert line == "context_parallel=2, with 131,072 tokens a micro-batch"
    divided = dataclasses.replace(recipe, context_parallel=2, batch=32)
    again = plan(model, divided, **long)
    assert again.fits
    assert again.step_tokens == found.step_tokens / 2 == 32 * 131072
    # the inputs of blocks are divided and the weights of a process are the same; tensor parallel is the other way round
    one, other = found.memory.parts, again.memory.parts
    assert (other["block inputs"], other["weights"]) == (one["block inputs"] / 2, one["weights"])
    each = plan(model, dataclasses.replace(recipe, tensor_parallel=8, batch=8), **long).memory.parts
    assert each["block inputs"] == one["block inputs"]
    assert each["gathered weights"] < one["gathered weights"] / 4


def test_what_cannot_be_divided_is_refused():
    recipe = mm.Recipe(parallel="fsdp", tensor_parallel=16)
    with pytest.raises(
        ConfigError, match="plan: tensor_parallel=16: SelfAttention: 16 processes do not divide its kv_heads=8"
    ):
        plan(seven_billion(), recipe, length=2048, gpus=64)
    with pytest.raises(ConfigError, match="plan: tensor_parallel=16 need a multiple of 16 processes, and there are 24"):
        plan(seven_billion(), recipe, length=2048, gpus=24)


def test_smaller_micro_batches_are_found():
    with torch.device("meta"):
        model = bench.Case(width=512, depth=8, heads=8, kv_heads=8, batch=1, length=1, vocab=30000).model()
    recipe = mm.Recipe(batch=256, precision="bfloat16")
    found = plan(model, recipe, length=512, gpu="rtx4090")
    assert not found.fits
    line = next(line for line in found.repairs if "micro-batches of" in line)
    parts = int(line.split("(")[1].split()[0])
    assert plan(model, dataclasses.replace(recipe, accumulate=parts), length=512, gpu="rtx4090").fits
    assert not plan(model, dataclasses.replace(recipe, accumulate=parts // 2), length=512, gpu="rtx4090").fits


def test_steps_tokens_and_flops_agree():
    model = seven_billion()
    recipe = mm.Recipe(batch=1024, accumulate=2, steps=500, parallel="fsdp", activation_checkpointing=True)
    found = plan(model, recipe, length=4096, gpus=64, gpu="h200")
    assert found.step_tokens == 1024 * 4096
    assert (found.work.tokens, found.work.micro_batches) == (8 * 4096, 2)
    assert found.step_flops == found.token_flops * 1024 * 4096
    assert found.run_flops == 500 * found.step_flops
    assert plan(model, recipe, length=4096, gpus=64, gpu="h200", train_tokens=2e12).steps == -(
        -(2 * 10**12) // (1024 * 4096)
    )
    packs = dataclasses.replace(recipe, batch=64, accumulate=1, tokens=8192, packs=128)
    assert plan(model, packs, length=4096, gpus=64, gpu="h200").work.micro_batches == 2
    once, again = (dataclasses.replace(recipe, activation_checkpointing=x) for x in (False, True))
    first, second = (plan(model, r, length=4096, gpus=64, gpu="h200") for r in (once, again))
    spared = 2 * 4096 * 14336 * 32  # the last product of each block
    more = second.token_flops - first.token_flops
    assert more == pytest.approx(first.flops.forward["core"] - spared)
    assert second.memory.total < first.memory.total


def test_gpus_without_work_are_reported():
    found = plan(CASE.model(), mm.Recipe(batch=48), length=64, gpus=1024, gpu="h200")
    assert found.busy == 48
    assert found.warnings == (
        "batch=48 gives work to only 48 of 1024 GPUs, which `fit` refuses; try --set batch=1024 or more",
    )


def test_a_given_length_stands_for_a_causal_text():
    case = dataclasses.replace(CASE, length=63)
    given, counted = stream_of_length(case.model(), 64), count_stream(case.model(), case.data())
    assert given.context == counted.context == 32.5
    assert given.rows == counted.rows
    assert given.content == pytest.approx(counted.content, rel=0.2)


def test_a_given_length_of_a_pair_has_the_kinds_of_both_sides():
    model = mm.Model({"a": bench.Ids(20), "b": bench.Ids(30)}, mm.Core.tiny(), ["a <-> b"])
    given = stream_of_length(model, 16)
    assert given.kinds == {"a": 0.5, "b": 0.5}
    assert given.rows == {model.packer.head_key("a <-> b"): 1 / 16}


PALM = mm.Core(
    width=18432,
    depth=118,
    heads=48,
    kv_heads=1,
    mlp_width=73728,
    block=(mm.layers.SelfAttention(key_width=256, value_width=256), mm.layers.MLP()),
)
GPT3 = mm.Core(width=12288, depth=96, heads=96, mlp_width=32768)  # a plain MLP of 4 D is a gated one of 8/3 D


@pytest.mark.parametrize(
    ("core", "vocab", "published"),
    [
        pytest.param(GPT3, 50257, 3.14e23 / 300e9, id="GPT-3 175B"),  # Brown et al. 2020, table D.1
        # Chowdhery et al. 2022, section 4.1: 46.2 % of 6144 TPU v4 of 275 TFLOP/s at 238.3 thousand tokens/s
        pytest.param(PALM, 256000, 0.462 * 6144 * 275e12 / 238.3e3, id="PaLM 540B"),
    ],
)
def test_flops_of_a_token_are_those_published(core, vocab, published):
    with torch.device("meta"):
        model = mm.Model({"id": bench.Ids(vocab)}, core, [mm.Task("-> id", mm.NextToken())])
    assert token_flops(model, stream_of_length(model, 2048)).training == pytest.approx(published, rel=0.03)


def test_every_gpu_has_a_memory_and_a_source():
    assert set(GPUS) >= {"a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx4090", "t4"}
    for name, card in GPUS.items():
        assert "data sheet" in card.source or "white paper" in card.source
        assert 16e9 <= card.memory < 1e12
        assert card.bfloat16 == (name != "t4")
    assert find_gpu("H200") is GPUS["h200"]
    assert find_gpu("cpu").memory > 1e9


def simple(**changes) -> dict:
    return {"model": CASE.model(), "recipe": mm.Recipe(), "length": 64, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "h20"}, "plan: GPU 'h20' is unknown; there are a100-40, .*did you mean 'h200'"),
        ({"gpus": 0}, "plan: gpus=0 must be a whole number, 1 or more"),
        ({"gpus": 1.5}, r"plan: gpus=1\.5 must be a whole number"),
        ({"length": 0}, "length=0 must be at least 1 token"),
        ({"tokens": -1}, "tokens=-1 must be a whole number"),
        ({"length": None}, "give the recipe's data, or a length"),
        ({"length": None, "data": {"-> id": []}}, "hold no samples to count"),
        (
            {"gpu": "t4", "recipe": mm.Recipe(precision="bfloat16")},
            "t4 has no hardware for bfloat16; use precision=float32",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(**simple(**changes))


def test_two_cores_are_refused():
    core = mm.Core(width=16, depth=1, heads=2)
    model = mm.Model(
        {"id": bench.Ids(9)}, mm.EncoderDecoder(reader=core, writer=core), [mm.Task("id -> id", mm.NextToken())]
    )
    with pytest.raises(ConfigError, match="EncoderDecoder is not modelled"):
        plan(model, mm.Recipe(), length=4)


def test_stats_may_be_given():
    stats = StreamStats(samples=0, length=10, longest=10, context=5.5, kinds={"id": 1.0}, rows={"id_NextToken": 1.0})
    found = plan(CASE.model(), mm.Recipe(batch=2), stats=stats)
    assert found.stats is stats
    assert found.work.tokens == 20


RECIPE = """
import multimodal as mm
from multimodal_tokenizers import TextBytes

def recipe(width: int = 64):
    model = mm.Model({"text": TextBytes()}, mm.Core(width=width, depth=2, heads=2), [mm.Task("-> text", mm.NextToken())])
    return {"model": model, "data": {"-> text": [{"text": "so it is"}] * 20}, "recipe": mm.Recipe(batch=16, steps=10)}
"""


def planned_by_command(tmp_path: Path, *options: str, text: str = RECIPE) -> int:
    pytest.importorskip("cyclopts")
    from multimodal.cli import main

    name = f"planned_{tmp_path.name}"  # modules stay in sys.modules, so that each test needs a name of its own
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    try:
        return main(["plan", str(tmp_path / f"{name}.py"), *options])
    finally:
        sys.modules.pop(name, None)


def test_the_command_prints_a_plan(tmp_path, capsys):
    assert planned_by_command(tmp_path, "--gpus", "8", "--gpu", "h200") == 0
    out = capsys.readouterr().out
    for text in ("8 x h200", "parameters", "FLOPs a token", "optimiser state", "fits in 141 GB", "10 steps, "):
        assert text in out
    assert "lengths: of 20 samples of the recipe's data, packed" in out
    assert "only those of CPUs were measured" in out
    assert not any(word in out for word in ("seconds", "tokens/s", "days"))


def test_the_command_gives_json(tmp_path, capsys):
    assert planned_by_command(tmp_path, "--json", "--samples", "5", "--set", "steps=7", "--set", "core.depth=3") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stream"]["samples"] == 5
    assert found["steps"] == 7
    assert found["flops"]["run"] == 7 * found["flops"]["step"]
    assert found["memory_bytes"]["total"] == pytest.approx(sum(found["memory_bytes"]["parts"].values()))
    assert found["parameters"]["core"] == mm.Core(width=64, depth=3, heads=2).parameters


def test_the_command_reports_what_does_not_fit(tmp_path, capsys):
    assert (
        planned_by_command(tmp_path, "--gpu", "rtx4090", "--set", "width=16384", "--length", "4096", "--tokens", "4096")
        == 1
    )
    assert "does not fit in 24 GB" in capsys.readouterr().out


def test_a_file_without_a_recipe_is_refused(tmp_path, capsys):
    assert planned_by_command(tmp_path, text="def recipes(): ...") == 2
    assert "defines no function recipe(); did you mean 'recipes'?" in capsys.readouterr().err
