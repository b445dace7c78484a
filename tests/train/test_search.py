"""The search of settings: what it chooses, what it compares, and that it goes on after a stop as if there had been none."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import pytest

import multimodal as mm
from multimodal.shapes import CheckpointError, ConfigError
from multimodal.train.hyperparameters import JOURNAL, Range
from multimodal.train.settings import Setting, make_job
from multimodal_tokenizers import ImagePatches, Labels

optuna = pytest.importorskip("optuna", reason="the optional package optuna is not installed")

TASK, LOSS = "image -> label", "image -> label loss"
DATA = [
    {
        "image": np.random.default_rng(i).uniform(0.4 * (i % 2), 0.6 + 0.4 * (i % 2), (4, 4)).astype(np.float32),
        "label": "ab"[i % 2],
    }
    for i in range(16)
]
CALLBACKS: list[mm.train.Callback] = []


def make(scale: float = 1.0, shade: str = "light", flip: bool = False) -> mm.TrainingJob:
    kinds = {"image": ImagePatches(patch=4, channels=1), "label": Labels(("a", "b"))}
    model = mm.Model(kinds, mm.Core(width=8, depth=1, heads=2), [TASK])
    data = [{**sample, "image": scale * sample["image"]} for sample in DATA]
    recipe = mm.Recipe(steps=4, batch=8, precision="float32", device="cpu", evaluate_every=1)
    return mm.TrainingJob(model=model, data={TASK: data}, evaluation={TASK: DATA}, recipe=recipe, callbacks=CALLBACKS)


def find(folder: Path, ranges=("lr=1e-4..1e-1:log",), **given) -> mm.train.FoundSettings:
    return mm.train.search(make, ranges, folder=folder, **{"measure": LOSS, "trials": 3, "quiet": True, **given})


def choices(found: mm.train.FoundSettings) -> list[tuple]:
    return [(trial.number, dict(trial.settings), trial.state, trial.value) for trial in found.trials]


@pytest.fixture
def callbacks():
    yield CALLBACKS
    CALLBACKS.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, mm.train.FoundSettings]:
    """A search that was not stopped."""
    folder = tmp_path_factory.mktemp("whole") / "search"
    return folder, find(folder, ["lr=1e-4..1e-1:log", "core.depth=1,2"], trials=4)


def test_the_best_settings_give_the_value_that_the_search_says(whole, tmp_path):
    folder, found = whole
    logs = {path.parent.name: path.read_text().splitlines()[-1] for path in folder.glob("trial-*/log.jsonl")}
    values = {name: json.loads(line)[LOSS] for name, line in logs.items()}
    assert len(values) == len(found.trials) == 4
    assert found.best.folder.name == min(values, key=values.get)
    assert found.best.value == min(values.values())
    assert len(set(values.values())) > 1
    # trained again from the settings as they are printed
    run = make_job(make, found.settings, "make").run(tmp_path / "again", quiet=True)
    assert run.history[-1][LOSS] == found.best.value
    assert [trial.value for trial in found.ranked] == sorted(values.values())


def test_how_it_shows_itself(whole, tmp_path):
    _, found = whole
    assert repr(found).startswith(f"FoundSettings(lr={found.best.settings['lr']}, core.depth=")
    rows = found.table().splitlines()
    assert rows[0].split()[:3] == ["trial", "lr", "core.depth"]
    assert rows[1].startswith(found.best.folder.name)
    assert rows[-1] == "trials: 4 finished"
    found.save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert found._repr_html_().count("data:image/png;base64,") == 1


def test_a_measure_that_is_no_loss_is_made_large(tmp_path):
    found = find(tmp_path, ["lr=1e-6,0.1"], measure=f"{TASK} exact", trials=2)
    values = {trial.settings["lr"]: trial.value for trial in found.trials}
    assert values["0.1"] != values["1e-6"]
    assert found.best.value == max(values.values())


class Stop(mm.train.Callback):
    """Acts once, at a step of the n-th run."""

    def __init__(self, run: int, step: int, act) -> None:
        self.runs, self.run, self.step, self.act = 0, run, step, act

    def on_start(self, view):
        self.runs += 1

    def on_step(self, view):
        if (self.runs, view.step) == (self.run, self.step):
            self.runs = 99
            self.act()


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(whole, tmp_path, callbacks, capsys):
    ranges = ["core.depth=1,2", "lr=1e-4..1e-1:log"]  # their order does not matter
    callbacks.append(Stop(2, 2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    stopped = find(tmp_path / "s", ranges[::-1], trials=4, quiet=False, go_on="the same")
    assert not stopped.finished
    assert [trial.state for trial in stopped.trials] == ["finished", "unfinished"]
    out = capsys.readouterr().out
    assert out.endswith(f"search: stopped; everything is saved in {tmp_path / 's'}. To go on: the same\n")
    callbacks.clear()
    went_on = find(tmp_path / "s", ranges, trials=2)
    assert choices(went_on) == choices(whole[1])[:2]
    more = find(tmp_path / "s", ranges, trials=4)  # more trials of a search that went to its end
    assert choices(more) == choices(whole[1])
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("trial-*/*"))
    assert choices(find(tmp_path / "s", ranges, trials=4)) == choices(whole[1])
    assert before == sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("trial-*/*"))


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_search import CALLBACKS, Stop, find
import os, signal
from pathlib import Path
CALLBACKS.append(Stop(3, 2, lambda: os.kill(os.getpid(), signal.SIGKILL)))
find(Path(sys.argv[1]), ["lr=1e-4..1e-1:log", "core.depth=1,2"], trials=4)
"""


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(whole, tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], timeout=300)
    assert done.returncode == -signal.SIGKILL
    journal = tmp_path / "s" / JOURNAL
    assert journal.read_bytes().count(b'"state":1') == 2
    journal.write_bytes(journal.read_bytes() + b'{"op_code":6,"trial_id":2,"sta')  # what a kill may leave of a line
    found = find(tmp_path / "s", ["lr=1e-4..1e-1:log", "core.depth=1,2"], trials=4)
    assert choices(found) == choices(whole[1])


@pytest.mark.slow
def test_all_combinations_are_tried_once_and_then_it_ends(tmp_path, capsys):
    found = find(tmp_path, {"core.depth": [1, 2], "batch": "4..5"}, trials=30, quiet=False)
    assert found.finished
    assert "search: all 4 combinations of these values were tried\n" in capsys.readouterr().out
    tried = [(trial.settings["core.depth"], trial.settings["batch"]) for trial in found.trials]
    assert sorted(tried) == [(d, b) for d in "12" for b in "45"]
    assert len(list(tmp_path.glob("trial-*"))) == 4


def test_a_trial_that_fails_is_noted_and_the_search_goes_on(tmp_path, capsys):
    """Impossible beside heads=2; a loss that is not finite."""
    found = find(tmp_path, ["core.width=8,9", "lr=0.01,1e38"], trials=4, quiet=False)
    states = {(t.settings["core.width"], t.settings["lr"]): t.state for t in found.trials}
    assert states == {
        ("8", "0.01"): "finished",
        ("9", "0.01"): "failed",
        ("8", "1e38"): "failed",
        ("9", "1e38"): "failed",
    }
    assert found.settings == ["core.width=8", "lr=0.01"]
    assert "failed (and 1 more): ConfigError: Core: width=9 does not give heads=2 an even width each" in found.table()
    assert "failed: FloatingPointError: fit: step 2" in capsys.readouterr().out


def test_none_finishes(tmp_path):
    found = find(tmp_path, ["core.width=9,11"], trials=2)
    assert (found.best, found.settings, found.finished) == (None, [], True)
    assert repr(found) == "FoundSettings(no trial finished, 2 trials)"
    assert found.table().startswith("trials: 2 failed")
    with pytest.raises(ConfigError, match="no trial has finished, so there are no curves"):
        found.picture()


def test_other_errors_end_the_search_and_the_trial_is_trained_again(tmp_path, callbacks):
    def fail():
        raise OSError("the disk is full")

    callbacks.append(Stop(2, 2, fail))
    with pytest.raises(mm.train.CallbackError, match="the disk is full"):
        find(tmp_path)
    callbacks.clear()
    found = find(tmp_path)
    assert [(trial.number, trial.state) for trial in found.trials] == [(n, "finished") for n in range(3)]


def test_a_trial_in_which_the_process_dies_again_and_again_is_noted_as_failed(tmp_path, callbacks):
    callbacks.append(Stop(1, 2, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert not find(tmp_path, trials=1).finished
    callbacks.clear()
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL))
    storage = optuna.storages.JournalStorage(backend)
    assert storage.get_trial(0).user_attrs["begun"] == [0, 0]  # it was stopped, and has not died
    storage.set_trial_user_attr(0, "begun", [2, 5])
    (trial,) = find(tmp_path, trials=1).trials
    assert (trial.state, trial.reason) == (
        "failed",
        "ConfigError: the process died 5 times while it trained, each time at the same place",
    )


@pytest.mark.slow
def test_a_pruned_trial_was_worse_than_the_median(tmp_path):
    rates = "0.1,0.09,0.08,0.07,0.06,0.05,1e-9,1e-8,1e-7,1e-6"
    found = find(tmp_path, [f"lr={rates}"], trials=10)
    pruned = [trial for trial in found.trials if trial.state == "pruned"]
    assert pruned
    logs = {
        trial.number: [json.loads(line) for line in (trial.folder / "log.jsonl").read_text().splitlines()]
        for trial in found.trials
    }
    for trial in pruned:
        rows = [row for row in logs[trial.number] if LOSS in row and "loss" in row]
        step, best = rows[-1]["step"], min(row[LOSS] for row in rows)
        assert trial.reason == f"at step {step}, as others were better"
        earlier = [t.number for t in found.trials if t.number < trial.number and t.state == "finished"]
        others = [row[LOSS] for n in earlier for row in logs[n] if row["step"] == step and "loss" in row]
        assert len(others) >= 5
        assert best > median(others)
        assert step < 4
    assert all(trial.state == "finished" for trial in find(tmp_path / "all", [f"lr={rates}"], prune=False).trials)


@pytest.mark.parametrize(
    ("text", "kind", "wanted"),
    [
        ("1e-4..1e-2", float, (1e-4, 1e-2, False, ())),
        ("1e-4 .. 1e-2:log", float, (1e-4, 1e-2, True, ())),
        ("-1..1", float, (-1.0, 1.0, False, ())),
        ("2..8", int, (2, 8, False, ())),
        ("2..8:log", int | None, (2, 8, True, ())),
        ("1..2", int | float, (1.0, 2.0, False, ())),
        ("2, 4,6", int, (0.0, 0.0, False, ("2", "4", "6"))),
        ("adamw,muon", str, (0.0, 0.0, False, ("adamw", "muon"))),
        ("../a,../b", str, (0.0, 0.0, False, ("../a", "../b"))),
        ("none,3", int | None, (0.0, 0.0, False, ("none", "3"))),
        ("yes,no", bool, (0.0, 0.0, False, ("yes", "no"))),
        ("(0.9,0.99),(0.9,0.95)", tuple[float, float], (0.0, 0.0, False, ("(0.9,0.99)", "(0.9,0.95)"))),
    ],
)
def test_ranges(text, kind, wanted):
    found = Range.of(Setting.parse(f"x={text}", "--range"), kind)
    assert (found.low, found.high, found.log, found.choices) == wanted
    assert type(found.low) is type(wanted[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "--range lr: wanted name=value"),
        ("lr=", "--range lr=: a value is empty"),
        ("lr=,", "a value is empty"),
        ("stpes=1,2", "--range stpes=1,2: Recipe has no setting 'stpes'"),
        ("core.dept=1..3", "--range core.dept=1..3: Core has no setting 'dept'"),
        ("nothing.depth=1,2", "--range nothing.depth=1,2: there is no 'nothing'"),
        ("core=1,2", "core is Core, which is chosen in the file"),
        ("lr=a..b", "--range lr=a..b: 'a' is no float"),
        ("lr=1,b", "'b' is no float"),
        ("batch=1.5..3", "'1.5' is no int"),
        ("lr=1e-2..1e-4", "1e-2 must be below 1e-4"),
        ("lr=1..1", "1 must be below 1; one value is given by --set"),
        ("lr=0..1:log", "on a logarithmic scale a range must begin above 0"),
        ("lr=nan..1", "the ends of a range must be finite"),
        ("lr=0..inf", "the ends of a range must be finite"),
        ("lr=-1e308..1e308", "the ends of a range must be finite"),
        ("batch=1..1e30", "--range batch=1..1e30: whole numbers beyond 9007199254740992 cannot be drawn"),
        ("lr=1e-3", "one value leaves nothing to choose"),
        ("lr=0.1,0.10", "the value 0.1 comes twice"),
        ("lr=1e-3,1e-2:log", ":log is for numbers from .. to"),
        ("flip=0..1", "from .. to is for numbers, and this is a bool; give a list"),
        ("betas=0.1..0.2", "this is a tuple"),
    ],
)
def test_ranges_that_are_refused(text, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        find(tmp_path / "s", [text])
    assert message in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"measure": "image -> label F2"}, "'image -> label F2' is no measure of the held-out data; there are 'image"),
        ({"measure": "image -> lable exact"}, "did you mean 'image -> label exact'?"),
        ({"ranges": []}, "no range is given"),
        ({"ranges": "lr=1,2"}, "ranges is str"),
        ({"ranges": ["lr=1,2", "recipe.lr=3,4"]}, "both change one setting"),
        ({"settings": ["lr=1"]}, "--range lr=1e-4..1e-1:log and --set lr=1: both change one setting"),
        ({"trials": 0}, "trials=0 must be a whole number, 1 or more"),
        ({"seed": -1}, "seed"),
    ],
)
def test_calls_that_are_refused(given, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        find(tmp_path / "s", **given)
    assert message in str(caught.value)


def test_a_job_instead_of_a_function_and_no_held_out_data(tmp_path):
    with pytest.raises(ConfigError, match="TrainingJob cannot be called; give a function"):
        mm.train.search(make(), ["lr=1,2"], measure=LOSS, folder=tmp_path)

    def bare():
        return {"model": make().model, "data": make().data}

    with pytest.raises(ConfigError, match="the job has no held-out data"):
        mm.train.search(bare, ["lr=1,2"], measure=LOSS, folder=tmp_path)


def test_a_folder_with_something_else_is_refused(whole, tmp_path):
    folder, ranges = whole[0], ["lr=1e-4..1e-1:log", "core.depth=1,2"]
    for changed, message in (
        ({"ranges": ["lr=1e-4..1e-2:log", "core.depth=1,2"]}, "ranges.lr was '1e-4..1e-1:log', now '1e-4..1e-2:log'"),
        ({"measure": f"{TASK} exact"}, "measure was 'image -> label loss', now 'image -> label exact'"),
        ({"settings": ["core.width=16"]}, "core.width was 8, now 16"),
        ({"seed": 1}, "seed was 0, now 1"),
    ):
        with pytest.raises(ConfigError, match="holds another search: ") as caught:
            find(folder, **{"ranges": ranges, **changed})
        assert message in str(caught.value)
    with pytest.raises(ConfigError, match="trial-000 holds a run or a model"):
        find(folder / "trial-000")
    (tmp_path / "a" / "trial-000").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds trial-000, but no search\.jsonl"):
        find(tmp_path / "a")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/inside", "n" * 300):
        with pytest.raises(ConfigError, match="cannot be written"):
            find(tmp_path / place)
    for data in (b"no json\n{}\n", b'{"op_code":99}\n', b'{"op_code":4,"study_id":5}\n[]\n', b"\x00\xff\n"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / JOURNAL).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"search\.jsonl: damaged, or not of a search"):
            find(tmp_path / "b")
        assert (tmp_path / "b" / JOURNAL).read_bytes() == data


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_two_searches_in_one_folder(tmp_path):
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, 2); print('held', flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process trains here"):
            find(tmp_path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert find(tmp_path, trials=1).finished


def test_optuna_is_as_before_and_names_what_to_install(tmp_path, monkeypatch, capsys):
    before = optuna.logging.get_verbosity()
    find(tmp_path / "s", trials=1)
    assert optuna.logging.get_verbosity() == before
    assert capsys.readouterr() == ("", "")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'multimodal-stream\[search\]'"):
        find(tmp_path / "other")


def test_the_seed_decides_what_is_chosen(tmp_path):
    one, two = (find(tmp_path / str(seed), trials=1, seed=seed) for seed in (0, 1))
    assert one.trials[0].settings != two.trials[0].settings
    assert 1e-4 <= float(one.trials[0].settings["lr"]) <= 1e-1
