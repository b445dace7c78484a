"""The plan against a real training: memory by the profiler, FLOPs by PyTorch's counter, masks and rings by brute force."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import multimodal as mm
from multimodal.count import GPUS, StreamFacts, Work, count_stream, find_gpu, given_stream, outlined, plan, rank_memory
from multimodal.count.parts import embed_cost, kept_bytes, layer_kept, parameters, transformer
from multimodal.count.planning import ROOM
from multimodal.count.speed import FLOAT, bus_bandwidth, sent_bytes, step_time, utilisation
from multimodal.count.streams import seen_pairs
from multimodal.shapes import ConfigError
from multimodal.train.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan as bench  # noqa: E402
from plan_published import RUNS  # noqa: E402

CASE = bench.Case(width=64, depth=3, batch=6, length=31, vocab=200)
CASES = [
    CASE,
    dataclasses.replace(CASE, checkpointing=True, kv_heads=2),
    dataclasses.replace(CASE, precision="bfloat16", rows=16),
    dataclasses.replace(CASE, accumulate=3, ema=0.9, optimizer="muon", depth=2),
    dataclasses.replace(CASE, vocab=4000, depth=2, batch=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.said)
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


@pytest.mark.parametrize("case", [CASES[0], CASES[2], LONG_MASK], ids=lambda case: case.said)
def test_every_part_is_what_is_kept_for_the_gradient(case):
    kept = bench.kept_by_part(case)
    for part, size in bench.planned_by_part(case).items():
        assert size == pytest.approx(kept[f"kept {part}"], rel=0.01), part


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=lambda case: case.said)
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
    facts = count_stream(model, data)
    written = case.length + 1
    pairs = rows**2 + sum(
        rows + i for i in range(1, written + 1)
    )  # who is read sees who is read; who is written, all before
    assert facts.context == pytest.approx(pairs / (rows + written))
    assert facts.free == pytest.approx(rows / (rows + written))
    assert (facts.length, facts.samples, facts.runs) == (rows + written, 3, False)
    assert facts.rows["id_NextToken"] == pytest.approx(written / (rows + written))


def test_pairs_of_a_window_are_those_of_its_dense_mask():
    core = mm.Core(width=16, depth=1, heads=2, mask=mm.masks.Window(3) & mm.masks.Causal())
    model = mm.Model({"id": bench.Ids(9)}, core, [mm.Task("-> id", mm.NextToken())])
    stream = model.pack("-> id", [{"id": torch.zeros(n, dtype=torch.long)} for n in (4, 9, 9)])
    places = stream.layout.places
    dense = (core.mask.allows(places[:, None], places[None]) & (places.sample[:, None] == places.sample[None])).sum()
    assert seen_pairs(core.mask, stream.layout) == int(dense)


def test_samples_of_other_lengths_make_runs():
    model = CASE.model()
    data = {"-> id": [{"id": torch.zeros(n, dtype=torch.long)} for n in (4, 9)]}
    facts = count_stream(model, data)
    assert facts.runs
    assert (facts.length, facts.longest) == (7.5, 10)


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


def test_only_as_many_samples_are_read_as_asked_for():
    told = []
    model = CASE.model()
    endless = iter(lambda: {"id": torch.zeros(4, dtype=torch.long)}, None)
    facts = count_stream(model, {"-> id": endless}, samples=40, progress=told.append)
    assert facts.samples == sum(told) == 40


def test_a_huge_model_is_planned_without_memory():
    with outlined():
        model = mm.Model({"id": bench.Ids(1000)}, mm.Core.xxl_7b(), [mm.Task("-> id", mm.NextToken())])
    assert all(p.is_meta for p in model.parameters())
    assert parameters(model)["core"] == mm.Core.xxl_7b().parameters
    assert sum(parameters(model).values()) > 6.9e9
    with pytest.raises(ConfigError), outlined():
        mm.Model({"id": bench.Ids(9)}, mm.Core(width=8, depth=1, heads=2), ["id -> nothing"])
    assert not next(CASE.model().parameters()).is_meta


def test_counts_without_memory_are_those_with_it():
    case = CASES[2]
    with outlined():
        without = case.model()
    facts = count_stream(case.model(), case.data())
    assert count_stream(without, case.data()) == facts
    assert parameters(without) == parameters(case.model())
    assert rank_memory(without, facts, case.work(facts.length)) == case.planned()


BLOCKS = [
    (mm.layers.SelfAttention(), mm.layers.PersistentMemory(slots=8), mm.layers.MLP()),
    (mm.layers.Recurrent(), mm.layers.MLP()),
    (mm.layers.SelfAttention(score=mm.attention.Additive()), mm.layers.MLP()),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "+".join(type(layer).__name__ for layer in block))
def test_other_layers_are_measured(block):
    core = mm.Core(width=32, depth=1, heads=4, block=block)
    model = mm.Model({"id": bench.Ids(50)}, core, [mm.Task("-> id", mm.NextToken())])
    samples = [{"id": torch.zeros(47, dtype=torch.long)} for _ in range(3)]
    facts = count_stream(model, {"-> id": samples})
    stream = model.train().pack("-> id", samples)
    planned = sum(
        sum(layer_kept(layer, core, facts, half=False, cuda=False).parts.values())
        for layer in transformer(model).sublayers()
    )
    with kept_bytes([*model.parameters(), *stream.content.values()]) as kept:
        states = model(stream)
        taken = kept()
    ends = 2 * FLOAT * core.width + FLOAT * core.head_width  # the last norm and what it gives; the turns
    assert (planned + ends) * len(stream) == pytest.approx(taken, rel=0.1)
    del states


def test_what_is_too_large_to_be_measured_is_said():
    core = mm.Core(width=8192, depth=1, heads=64, block=(mm.layers.SelfAttention(), mm.layers.Recurrent()))
    with outlined():
        model = mm.Model({"id": bench.Ids(50)}, core, [mm.Task("-> id", mm.NextToken())])
    found = plan(model, mm.Recipe(), length=100)
    assert found.memory.unknown == ("what Recurrent keeps",)
    assert any("lower bound: what Recurrent keeps" in line for line in found.assumptions)


def test_an_embedding_that_cannot_be_run_without_memory_is_said_so():
    class Looking(torch.nn.Linear):
        def forward(self, content):
            return super().forward(content) * content.sum().item()

    @dataclasses.dataclass(frozen=True)
    class Odd(bench.Rows):
        def embed(self, width):
            return Looking(self.feature_size, width)

    cost, usual = embed_cost(Odd(), 16, False), embed_cost(bench.Rows(), 16, False)
    assert (cost.known, usual.known) == (False, True)
    assert cost.forward == usual.forward == 2 * 48 * 16
    assert usual.training == 4 * 48 * 16  # no gradient of its input


@pytest.mark.parametrize("count", [2, 5, 8])
def test_what_a_ring_sends_is_what_its_steps_send(count):
    sent = [0.0] * count
    chunk = 4.0 / count
    for _ in range(2):  # reduce-scatter, then all-gather: each passes on a chunk count - 1 times
        for _ in range(count - 1):
            for rank in range(count):
                sent[rank] += chunk
    work = Work(tokens=1.0, processes=count)
    assert sent_bytes(work, 1, 1) == pytest.approx(sent[0])
    shared = dataclasses.replace(work, parallel="fsdp", micro_batches=3)
    # outside the blocks 1 of 2 parameters: gathered once, the other twice, in each of three micro-batches; gradients of both once
    assert sent_bytes(shared, 2, 1) == pytest.approx((3 * (1 + 2) + 2) * sent[0] / 2)


def test_a_gpu_alone_sends_nothing_and_a_ring_is_as_fast_as_its_slowest_hop():
    assert sent_bytes(Work(tokens=1.0), 10, 5) == 0
    card = GPUS["h100"]
    assert bus_bandwidth(card, 8) == 0.75 * card.link
    assert bus_bandwidth(card, 16) == 0.75 * 8 * 50e9
    assert bus_bandwidth(GPUS["rtx4090"], 16) == 0.75 * 8 * 1.56e9


def test_the_step_is_no_faster_than_any_of_its_parts():
    card = GPUS["a100-80"]
    work = Work(tokens=4096.0, processes=8, half=True, cuda=True)
    time = step_time(card, work, 1_000_000_000, 10_000_000, 24, 6e9)
    used = utilisation(card, 1_000_000_000, True)
    assert time.products.best == pytest.approx(6e9 * 4096 / (312e12 * used.best))
    assert time.total.best >= max(time.products.best, time.sending, time.launching.best)
    assert time.total.worst >= time.products.worst + time.sending + time.update
    tiny = step_time(card, dataclasses.replace(work, processes=1), 1000, 100, 24, 6000.0)
    assert tiny.total.best == pytest.approx(tiny.launching.best, rel=1e-3)


def seven_billion() -> mm.Model:
    with outlined():
        return mm.Model({"id": bench.Ids(32000)}, mm.Core.xxl_7b(), [mm.Task("-> id", mm.NextToken())])


def test_what_would_make_it_fit_does():
    model = seven_billion()
    recipe = mm.Recipe(batch=64)
    found = plan(model, recipe, length=2048, gpus=8, gpu="b200")
    assert not found.fits
    assert found.memory.total > ROOM * found.gpu.memory
    settings = next(line for line in found.repairs if "parallel=fsdp" in line)
    changed = dataclasses.replace(
        recipe, parallel="fsdp", activation_checkpointing="activation_checkpointing" in settings
    )
    assert plan(model, changed, length=2048, gpus=8, gpu="b200").fits
    worse = plan(model, changed, length=2048, gpus=8, gpu="rtx4090")
    assert not worse.fits
    assert all("rtx4090" not in line for line in worse.repairs)


def test_smaller_micro_batches_are_found():
    with outlined():
        model = bench.Case(width=512, depth=8, heads=8, kv_heads=8, batch=1, length=1, vocab=30000).model()
    recipe = mm.Recipe(batch=256, precision="bfloat16")
    found = plan(model, recipe, length=512, gpu="rtx4090")
    assert not found.fits
    line = next(line for line in found.repairs if "micro-batches of" in line)
    parts = int(line.split("(")[1].split()[0])
    assert plan(model, dataclasses.replace(recipe, accumulate=parts), length=512, gpu="rtx4090").fits
    assert not plan(model, dataclasses.replace(recipe, accumulate=parts // 2), length=512, gpu="rtx4090").fits


def test_steps_tokens_and_days_agree():
    model = seven_billion()
    recipe = mm.Recipe(batch=1024, accumulate=2, steps=500, parallel="fsdp", activation_checkpointing=True)
    found = plan(model, recipe, length=4096, gpus=64, gpu="h200")
    assert found.step_tokens == 1024 * 4096
    assert (found.work.tokens, found.work.micro_batches) == (8 * 4096, 2)
    assert found.days.best < found.days.worst
    assert found.days.best * 86400 * found.tokens_a_second.best == pytest.approx(500 * found.step_tokens)
    assert plan(model, recipe, length=4096, gpus=64, gpu="h200", train_tokens=2e12).steps == -(
        -(2 * 10**12) // (1024 * 4096)
    )
    packs = dataclasses.replace(recipe, batch=64, accumulate=1, tokens=8192, packs=128)
    assert plan(model, packs, length=4096, gpus=64, gpu="h200").work.micro_batches == 2
    once, again = (dataclasses.replace(recipe, activation_checkpointing=x) for x in (False, True))
    first, second = (plan(model, r, length=4096, gpus=64, gpu="h200") for r in (once, again))
    spared = 2 * 4096 * 14336 * 32  # the last product of each block
    more = second.flops_a_token - first.flops_a_token
    assert more == pytest.approx(first.flops.forward["core"] - spared)
    assert second.memory.total < first.memory.total


def test_gpus_without_work_are_told_of():
    found = plan(CASE.model(), mm.Recipe(batch=48), length=64, gpus=1024, gpu="h200")
    assert found.busy == 48
    assert found.warnings == (
        "batch=48 gives work to only 48 of 1024 GPUs, which `fit` refuses; try --set batch=1024 or more",
    )


def test_a_given_length_stands_for_a_causal_text():
    case = dataclasses.replace(CASE, length=63)
    given, counted = given_stream(case.model(), 64), count_stream(case.model(), case.data())
    assert given.context == counted.context == 32.5
    assert given.rows == counted.rows
    assert given.content == pytest.approx(counted.content, rel=0.2)


@pytest.mark.parametrize("run", [run for run in RUNS if run.flops or run.mfu], ids=lambda run: run.name)
def test_published_flops_and_utilisation_are_met(run):
    (row,) = run.rows(run.model(bench.Ids))
    assert row.planned[0] == pytest.approx(row.published, rel=0.03)


def test_every_gpu_is_plausible():
    assert set(GPUS) >= {"a100-40", "a100-80", "h100", "h200", "b200", "l40s", "rtx4090", "t4"}
    for card in GPUS.values():
        assert "data sheet" in card.source or "white paper" in card.source
        assert card.bf16 is None or card.fp32 < card.bf16 < 1e16
        assert card.network <= card.link < card.bandwidth
    assert find_gpu("H200") is GPUS["h200"]
    cpu = find_gpu("cpu")
    assert 1e9 < cpu.fp32 < 1e14
    assert cpu.memory > 1e9


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


def test_facts_may_be_given():
    facts = StreamFacts(samples=0, length=10, longest=10, context=5.5, kinds={"id": 1.0}, rows={"id_NextToken": 1.0})
    found = plan(CASE.model(), mm.Recipe(batch=2), facts=facts)
    assert found.facts is facts
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

    name = f"planned_{tmp_path.name}"  # a module keeps its name, and each test has its own
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    try:
        return main(["plan", str(tmp_path / f"{name}.py"), *options])
    finally:
        sys.modules.pop(name, None)


def test_the_command_prints_a_plan(tmp_path, capsys):
    assert planned_by_command(tmp_path, "--gpus", "8", "--gpu", "h200") == 0
    out = capsys.readouterr().out
    for said in ("8 x h200", "parameters", "FLOPs a token", "optimiser state", "fits in 141 GB", "days for 10 steps"):
        assert said in out
    assert "lengths: of 20 samples of the recipe's data, packed" in out
    assert "not measured here" in out


def test_the_command_gives_json(tmp_path, capsys):
    assert planned_by_command(tmp_path, "--json", "--samples", "5", "--set", "steps=7", "--set", "core.depth=3") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stream"]["samples"] == 5
    assert found["steps"] == 7
    assert found["memory_bytes"]["total"] == pytest.approx(sum(found["memory_bytes"]["parts"].values()))
    assert found["parameters"]["core"] == mm.Core(width=64, depth=3, heads=2).parameters


def test_the_command_says_what_does_not_fit(tmp_path, capsys):
    assert (
        planned_by_command(tmp_path, "--gpu", "rtx4090", "--set", "width=16384", "--length", "4096", "--tokens", "4096")
        == 1
    )
    assert "does not fit in 24 GB" in capsys.readouterr().out


def test_a_file_without_a_recipe_is_refused(tmp_path, capsys):
    assert planned_by_command(tmp_path, text="def recipes(): ...") == 2
    assert "defines no function recipe(); did you mean 'recipes'?" in capsys.readouterr().err
