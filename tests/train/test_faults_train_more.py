"""Training, the faults from 22 on: what is decayed and turned, what a run says, workers that die, refused values."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.layers import MLP, Gated, SelfAttention
from multimodal.shapes import ConfigError, StreamError
from multimodal.train import launch as launching
from multimodal.train.recipe import choose_device
from multimodal.zoo import TemporalConv
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

ROOT = Path(__file__).resolve().parents[2]
TASK, WRITE = "text -> label", "label -> text"
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]
DATA = [{"text": word, "label": "with a" if "a" in word else "without"} for word in WORDS]
PLAIN: dict[str, Any] = {"steps": 3, "batch": 6, "lr": 3e-3, "precision": "float32", "device": "cpu", "quiet": True}
TINY = mm.Core(width=16, depth=1, heads=2)


def make(tasks: Any = (TASK,), core: mm.Core = TINY) -> mm.Model:
    return mm.Model({"text": TextBytes(), "label": Labels(("with a", "without"))}, core, tasks)


# 22: what is decayed, and what is turned


def moved_by_decay_alone(model: mm.Model, **settings: Any) -> set[str]:
    """Names of the parameters that an optimiser moves whose gradients are all 0."""
    from multimodal.train.loop import make_optimizer

    optimizer = make_optimizer(model, mm.Recipe(lr=0.1, weight_decay=0.5, **settings), torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fault_22_only_what_multiplies_is_decayed(optimizer):
    core = mm.Core(
        width=32,
        depth=1,
        heads=2,
        prior=mm.attention.RelativeBias(4),
        block=(SelfAttention(score=mm.attention.Additive()), mm.layers.PersistentMemory(slots=8), MLP()),
    )
    model = mm.Model(
        {
            "image": ImagePatches(patch=4, channels=1, position="learned"),
            "text": TextBytes(),
            "label": Labels(("a", "b")),
        },
        core,
        ["image -> label", "text -> text", "image <-> text"],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # a zero cannot shrink
    names = {name for name, _ in model.named_parameters()}
    moved = moved_by_decay_alone(model, optimizer=optimizer)
    vectors = {
        n
        for n in names
        if n.rsplit(".", 1)[-1] in ("query", "grid_DYX", "table", "key_MGK", "value_MGK", "vector", "bias")
    }
    tables = {n for n in names if n.startswith("embeds.text")}
    additive = {n for n in names if ".score" in n and n.rsplit(".", 1)[-1] in ("query", "key")}
    assert len(vectors - additive) > 8
    assert tables
    assert additive
    assert moved & ((vectors - additive) | tables) == set()
    linear = {
        n for n in names if n.endswith(("qkv.weight", "out.weight", "gate_up.weight", "down.weight", "linear.weight"))
    }
    assert linear | additive <= moved


def test_fault_22a_muon_turns_each_part_of_a_fused_matrix(lively):
    from multimodal.train.loop import make_optimizer

    core = mm.Core(width=32, depth=1, heads=4, kv_heads=2, block=(SelfAttention(), MLP(), TemporalConv(filters=8)))
    model = lively(make(core=core)).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, mm.Recipe(optimizer="muon", lr=1.0, weight_decay=0.0), torch.device("cpu"))
    hidden = model.core.blocks[0].layers[1].body.down.in_features
    parts = {
        "core.blocks.0.layers.0.body.attention.qkv.weight": [32, 16, 16],
        "core.blocks.0.layers.1.body.gate_up.weight": [hidden, hidden],
        "core.blocks.0.layers.2.body.now.weight": [8, 8],
        "core.blocks.0.layers.0.body.attention.out.weight": [32],
    }
    named, draw = dict(model.named_parameters()), torch.Generator().manual_seed(1)
    for name, rows in parts.items():
        grads = []
        for number, count in enumerate(rows):  # gradients of values are often a thousand times those of queries
            u, s, v = torch.linalg.svd(torch.randn(count, named[name].shape[1], generator=draw), full_matrices=False)
            grads.append(1e3**number * (u * torch.linspace(0.2, 1, len(s))) @ v)
        named[name].grad = torch.cat(grads)
    optimizer.step()
    for name, rows in parts.items():
        for part in (before[name] - named[name].detach()).split(rows):
            values = torch.linalg.svdvals(part / (0.2 * max(part.shape) ** 0.5))
            assert 0.5 < values.min() <= values.max() < 1.5, (name, values)


def test_fault_22b_a_table_of_vectors_is_not_turned_as_a_matrix():
    core = mm.Core(width=16, depth=1, heads=8, prior=mm.attention.RelativeBias(8))
    model = make(core=core)
    mm.fit(model, {TASK: DATA}, **{**PLAIN, "optimizer": "muon", "lr": 1e-3, "warmup": 0.0, "steps": 1})
    (table,) = [p for name, p in model.named_parameters() if name.endswith("table")]
    size = table.detach().abs()[:, table.detach().abs().sum(0) > 0]
    assert float(size.median()) == pytest.approx(1e-3, rel=0.01)  # AdamW's first step
    assert float(size.max()) < 1.01e-3


# 42, 43, 51: what a run says


def test_fault_42_the_last_held_out_measures_are_printed(capsys):
    run = mm.fit(make(), {TASK: DATA}, **{**PLAIN, "quiet": False}, evaluation={TASK: DATA[:5]})
    last = run.history[-1]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"fit: held out: {TASK} loss {last[f'{TASK} loss']:.4f}, {TASK} exact {last[f'{TASK} exact']:.4f}"


def test_fault_43_a_stopped_run_says_what_its_user_can_do(capsys, tmp_path):
    stop = [lambda row: row["step"] == 1 and signal.raise_signal(signal.SIGINT)]
    loud = {**PLAIN, "quiet": False}
    mm.fit(make(), {TASK: DATA}, **loud, trackers=stop, folder=tmp_path / "a")
    assert "To go on: call fit(..., resume=True) with the same arguments" in capsys.readouterr().out
    mm.fit(make(), {TASK: DATA}, **loud, trackers=stop, folder=tmp_path / "b", go_on="press the green button")
    said = capsys.readouterr().out
    assert "To go on: press the green button" in said
    assert "resume=True" not in said
    mm.fit(make(), {TASK: DATA}, **loud, folder=tmp_path / "b")
    assert "b.1; resume=True would have gone on with it" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["train_image_classifier", "cross_modal_demo", "one_model_four_jobs"])
def test_fault_43a_examples_go_on_by_an_option(program):
    text = (ROOT / "examples" / f"{program}.py").read_text()
    assert '"--resume", action="store_true"' in text
    assert '"resume": args.resume' in text
    assert "--resume" in text.partition('"go_on": ')[2].partition("\n")[0]


def test_fault_51_a_run_shows_itself_in_one_line():
    run = mm.fit(make(), {TASK: DATA}, **{**PLAIN, "steps": 40}, evaluation={TASK: DATA[:5]})
    shown = repr(run)
    assert len(shown) < 200
    assert f"Run(40 steps, loss {run.last('loss'):.4f}, {TASK} loss " in shown
    assert repr(mm.fit(make(), {TASK: DATA}, **PLAIN)).startswith("Run(3 steps, loss ")


# 63, 82: data workers that are stuck or die


def stuck_run(folder: Path) -> tuple[subprocess.Popen, int]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tokenizers"))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / "programs" / "stuck.py"), str(folder)]
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < until, run.kill() or run.communicate()[0]
        time.sleep(0.05)
    time.sleep(1.0)
    return run, int((folder / "pid").read_text())


def gone(pid: int, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("way", ["Ctrl-C twice", "SIGTERM", "SIGKILL"])
def test_fault_63_a_stuck_data_worker_outlives_no_run(tmp_path, way):
    run, worker = stuck_run(tmp_path)
    try:
        if way == "Ctrl-C twice":
            run.send_signal(signal.SIGINT)
            time.sleep(1.0)
            run.send_signal(signal.SIGINT)
        else:
            run.send_signal(getattr(signal, way))
        said = run.communicate(timeout=60)[0]
        assert gone(worker)
        if way == "SIGTERM":  # a run that is asked once saves what it has
            assert re.search(r"fit: stopped after step [12] of 9; everything is saved in ", said)
            assert (tmp_path / "run" / "model" / "weights.safetensors").is_file()
    finally:
        run.kill()
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


class Deadly(list):
    """A sample that ends its process, as a library does that crashes."""

    def __init__(self, at: int, how: Any) -> None:
        super().__init__(DATA)
        self.at, self.how = at, how

    def __getitem__(self, index: Any) -> Any:
        if index == self.at:
            self.how()
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV"),
        (lambda: os._exit(7), "ended with exit code 7"),
        (lambda: os._exit(0), "ended with exit code 0"),
    ],
    ids=["killed", "crash", "exit", "exit 0"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_fault_82_a_worker_that_dies_names_its_sample(how, said, packed):
    settings = {**PLAIN, "steps": 200, "workers": 1}
    settings = {**settings, "batch": 64, "tokens": 40, "look_ahead": 6} if packed else settings
    start = time.monotonic()
    with pytest.raises(
        StreamError, match=rf"data worker 0 {said} while it was at sample 4 of task '{TASK}'\. With workers=0"
    ):
        mm.fit(make(), {TASK: Deadly(4, how)}, **settings)
    assert time.monotonic() - start < 30


def test_fault_82a_an_error_in_a_worker_is_the_one_that_is_raised_without_it():
    def said(workers: int) -> str:
        with pytest.raises(ValueError, match="has no field") as error:
            mm.fit(make(), {TASK: [*DATA[:5], {"text": "a"}]}, **{**PLAIN, "workers": workers, "steps": 4})
        return f"{error.type.__name__}: {error.value}"

    assert said(0) == said(1)
    assert "Traceback" not in said(1)


def test_fault_82b_nothing_is_left_after_a_fit_that_failed():
    before = set(threading.enumerate())
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    had = children.read_text() if children.exists() else ""
    for _ in range(2):
        with pytest.raises(StreamError):
            mm.fit(make(), {TASK: Deadly(4, lambda: os._exit(3))}, **{**PLAIN, "steps": 50, "workers": 2})
    until = time.monotonic() + 10
    while set(threading.enumerate()) != before and time.monotonic() < until:
        time.sleep(0.05)  # queues that are closed end their threads by themselves
    assert set(threading.enumerate()) == before
    assert (children.read_text() if children.exists() else "") == had


# 73: one number that gates a merge


@pytest.fixture(scope="module")
def gated(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gated")
    program("tests/programs/gated.py", folder / "one.pt", "ddp", ranks=1)
    program("tests/programs/gated.py", folder / "two.pt", "fsdp", ranks=2)
    return torch.load(folder / "one.pt"), torch.load(folder / "two.pt")


@pytest.mark.slow
def test_fault_73_gates_are_shared_out_with_the_gradients_of_one_process(gated):
    one, two = gated
    assert one.keys() <= two.keys()  # what nothing used has zeros there
    assert sum(name.endswith("gamma") and bool(grad.abs().sum() > 0) for name, grad in one.items()) == 4
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, atol=1e-6, rtol=0)


def test_fault_73a_gates_that_were_saved_without_an_axis_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    core = TINY.replace(block=(SelfAttention(merge=Gated()), MLP(merge=Gated())))
    settings = {**PLAIN, "steps": 4}
    whole = make(core=core)
    mm.fit(whole, {TASK: DATA}, **settings)
    stop = [lambda row: row["step"] == 2 and signal.raise_signal(signal.SIGINT)]
    mm.fit(make(core=core), {TASK: DATA}, **settings, trackers=stop, folder=tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-00000002"
    old = {
        n: t.reshape(()) if "gamma" in n and t.numel() == 1 else t
        for n, t in load_file(state / "state.safetensors").items()
    }
    save_file(old, state / "state.safetensors")
    from multimodal.train.state import write_manifest

    (state / "manifest.json").unlink()
    write_manifest(state)
    resumed = make(core=core)
    mm.fit(resumed, {TASK: DATA}, **settings, folder=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    before = {n: t.reshape(()) if n.endswith("gamma") else t for n, t in whole.state_dict().items()}
    again = make(core=core)
    again.load_state_dict(before)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


# 79: Windows


def test_fault_79_a_launcher_without_posix_signals(monkeypatch):
    monkeypatch.delattr(os, "killpg")
    command = [
        sys.executable,
        "-S",
        "-c",
        (
            "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
            "time.sleep(1 if os.environ['RANK'] == '1' else 60); raise SystemExit(3)"
        ),
    ]
    start = time.monotonic()
    assert launching.launch(command, 2, grace_s=0.2) == 3
    assert time.monotonic() - start < 30


# 84: values that no setting can have


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 2.5}, {"max_tokens": True}, {"max_tokens": "4"}, {"max_tokens": math.nan},
        {"temperature": "1"}, {"temperature": math.nan}, {"temperature": True},
        {"seed": 10**30}, {"seed": 1.5}, {"seed": -1}, {"seed": "0"},
        {"beams": 2.0}, {"beams": True}, {"guidance": "2"}, {"guidance": math.inf},
        {"length_penalty": "1"}, {"stop": 5}, {"stop": [5]}, {"batch": 2.5}, {"batch": "8"}, {"batch": True},
        {"length_penalty": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_fault_84_what_generate_cannot_take_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        make([WRITE]).generate(WRITE, [{"label": "without"}], **{"max_tokens": 2, **settings})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: mm.Recipe(seed=10**30),
        lambda: mm.Recipe(seed=-1),
        lambda: mm.Recipe(betas=(False, 0.9)),
        lambda: mm.Recipe(spike=0.5),
        lambda: mm.Recipe(steps=math.nan),  # type: ignore[arg-type]
        lambda: mm.Recipe(lr=math.nan),
        lambda: choose_device("meta"),
        lambda: choose_device(3),  # type: ignore[arg-type]
        lambda: mm.Temperature("1"),  # type: ignore[arg-type]
        lambda: mm.Temperature(True),
        lambda: mm.TopK(2.5),  # type: ignore[arg-type]
        lambda: mm.TopK(True),
        lambda: mm.TopP("0.5"),  # type: ignore[arg-type]
        lambda: mm.generate.MinP("0.5"),  # type: ignore[arg-type]
        lambda: mm.generate.Repetition(math.nan),
        lambda: mm.generate.Repetition("1"),  # type: ignore[arg-type]
        lambda: mm.generate.Repetition(last=1.5),  # type: ignore[arg-type]
        lambda: mm.NoRepeat(2.5),  # type: ignore[arg-type]
        lambda: mm.generate.AtLeast(-1),
        lambda: mm.generate.AtLeast("2"),  # type: ignore[arg-type]
        lambda: mm.generate.OneOf(5),  # type: ignore[arg-type]
        lambda: mm.generate.Only((5,)),  # type: ignore[arg-type]
        lambda: mm.Engine(make([WRITE]), rows=2.5),  # type: ignore[arg-type]
        lambda: mm.Engine(make([WRITE]), capacity="9"),  # type: ignore[arg-type]
        lambda: make().predict(TASK, [DATA[0]], batch=1.5),  # type: ignore[arg-type]
        lambda: mm.evaluate(make(), TASK, DATA, batch=0),
        lambda: mm.evaluate(make(), TASK, DATA, batch="8"),  # type: ignore[arg-type]
        lambda: mm.fit("model", {TASK: DATA}, **PLAIN),  # type: ignore[arg-type]
        lambda: mm.fit(make(), {TASK: DATA}, **PLAIN, folder=5),  # type: ignore[arg-type]
        lambda: mm.fit(make(), {TASK: DATA}, **PLAIN, trackers=5),  # type: ignore[arg-type]
        lambda: mm.fit(make(), {TASK: DATA}, **PLAIN, trackers=["x"]),  # type: ignore[list-item]
    ],
)  # fmt: skip
def test_fault_84a_other_values_are_refused_by_our_errors(wrong):
    with pytest.raises(ConfigError):
        wrong()


@pytest.mark.parametrize("cold", [1e-50, 5e-324])
def test_fault_84b_however_cold_the_likeliest_is_taken(lively, cold):
    model = lively(make([WRITE]))
    samples = [{"label": "without"}, {"label": "with a"}]
    plain = [a.value for a in model.generate(WRITE, samples, max_tokens=6)]
    found = model.generate(WRITE, samples, max_tokens=6, temperature=cold)
    assert [a.value for a in found] == plain
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0]])
    assert not mm.Temperature(cold)(logits, []).isnan().any()


# settings that would do nothing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packs": 2}, "packs=2 would do nothing beside tokens=0"),
        ({"look_ahead": 8}, "look_ahead=8 would do nothing beside tokens=0"),
        ({"tokens": 40}, "batch=6 would do nothing beside tokens=40"),
        ({"tokens": 40, "batch": 64, "accumulate": 2}, "accumulate=2 would do nothing beside tokens=40"),
        ({"keep": 3}, "keep=3 would do nothing beside no run folder"),
        ({"checkpoint_every": 2}, "checkpoint_every=2 would do nothing beside no run folder"),
        (
            {"best": f"{TASK} loss", "evaluation": {TASK: DATA}},
            "best='text -> label loss' would do nothing beside no run folder",
        ),
        ({"evaluate_every": 2}, "evaluate_every=2 would do nothing beside no held-out data"),
        ({"resume": True}, "resume=True resumes the run in a folder, and none was given"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_fault_19c_settings_that_would_do_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        mm.fit(make(), {TASK: DATA}, **{**PLAIN, **settings})
    assert message in str(error.value)


def test_fault_19d_defaults_are_never_refused(tmp_path):
    given = {f.name: f.default for f in dataclasses.fields(mm.Recipe)}
    assert mm.Recipe(**given) == mm.Recipe()
    mm.Recipe().check_use(folder=False, evaluation=False)
    mm.Recipe(keep=3, checkpoint_every=2, best="x").check_use(folder=True, evaluation=True)


def test_fault_19e_fit_again_and_in_a_thread_leaves_no_thread_behind(tmp_path):
    before = set(threading.enumerate())
    model = make()
    state = np.random.get_state()[1].tolist()
    for folder in ("a", "b"):
        mm.fit(model, {TASK: DATA}, **PLAIN, folder=tmp_path / folder)
    torch.manual_seed(123)
    drawn = torch.get_rng_state()
    thread = threading.Thread(target=lambda: mm.fit(model, {TASK: DATA}, **PLAIN, folder=tmp_path / "a"))
    thread.start()
    thread.join()
    assert set(threading.enumerate()) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert np.random.get_state()[1].tolist() == state
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.1", "b"]
