"""Training: it learns, it repeats itself bit for bit, it can be stopped anywhere and goes on as if it had not been."""

import copy
import json
import random
import re
import signal
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import multimodal as mm
from multimodal.data import Batches
from multimodal.data.sources import shares
from multimodal.shapes import CheckpointError, ConfigError, MediaError, TaskError
from multimodal.train.spikes import SpikeWatch
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

TASK = "text -> label"
PLAIN = {"steps": 20, "batch": 6, "lr": 3e-3, "precision": "float32", "device": "cpu", "quiet": True}
DROPPING = mm.Core(width=16, depth=2, heads=2, dropout=0.1, drop_path=0.2)
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]
DATA = [{"text": word, "label": "with a" if "a" in word else "without"} for word in WORDS]


def make(core: mm.Core = DROPPING, tasks=(TASK,), seed: int = 0) -> mm.Model:
    tokenizers = {
        "text": TextBytes(),
        "label": Labels(("with a", "without")),
        "image": ImagePatches(patch=4, channels=1),
    }
    return mm.Model(tokenizers, core, tasks, seed=seed)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stopping(list):
    """A list of samples during which something happens: at the `at`-th sample that is asked for."""

    def __init__(self, samples: list, at: int, happens) -> None:
        super().__init__(samples)
        self.at, self.happens = at, happens

    def __getitem__(self, index):
        self.at -= 1
        if self.at == 0:
            self.happens()
        return super().__getitem__(index)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def in_step(step: int) -> int:
    """The number of a sample in the middle of that step (the first is step 1)."""
    return (step - 1) * PLAIN["batch"] + 3


class Noisy:
    """Samples with an augmentation that draws from every global generator."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict:
        picture = torch.rand(4, 4) / 4 + float(np.random.rand()) / 4 + random.random() / 4 + index / 28
        return {"image": picture, "label": "without"}


def test_the_loss_goes_down_and_the_answers_become_right():
    model = make(mm.Core(width=32, depth=2, heads=2))
    run = mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 60, "lr": 1e-2}, evaluation={TASK: DATA})
    losses = [row["loss"] for row in run.history if "loss" in row]
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert run.finished
    assert run.last(f"{TASK} exact") == 1.0
    assert [model.predict(TASK, text=s["text"]).value for s in DATA] == [s["label"] for s in DATA]
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    def trained(seed: int) -> dict[str, Tensor]:
        model = make()
        torch.manual_seed(seed + 100)  # what the global generator held before must not matter
        mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 6, "seed": seed})
        return model.state_dict()

    first = trained(1)
    assert same(first, trained(1))
    assert not same(first, trained(2))


def test_workers_change_nothing():
    def trained(workers: int) -> dict[str, Tensor]:
        model = make(tasks=["image -> label"])
        mm.fit(model, {"image -> label": Noisy()}, **{**PLAIN, "steps": 5, "workers": workers})
        return model.state_dict()

    assert same(trained(0), trained(1))


def test_augmentation_is_a_function_of_seed_and_place():
    packer = make(tasks=["image -> label"]).packer

    def pictures(step: int, **kwargs) -> Tensor:
        batches = Batches(packer, {"image -> label": Noisy()}, **{"batch": 4, **kwargs})
        return batches[step].streams[0].content["image"]

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    third = pictures(3)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])  # making a batch leaves the global generators as they were
    random.seed(2)
    pictures(0)
    assert torch.equal(pictures(3), third)
    assert not torch.equal(pictures(3, seed=1), third)
    assert len({tuple(row.tolist()) for step in range(8) for row in pictures(step)}) == 32  # never the same twice


def saved_state(folder: Path) -> tuple[dict[str, Tensor], dict]:
    newest = max((folder / "checkpoints").glob("step-*"))
    return load_file(newest / "state.safetensors"), json.loads((newest / "state.json").read_text())


@pytest.mark.parametrize(
    ("way", "ema", "optimizer"),
    [("Ctrl-C", 0.9, "adamw"), ("Ctrl-C", 0.0, "muon"), ("killed", 0.0, "adamw"), ("killed", 0.9, "muon")],
)
def test_stopped_and_resumed_is_never_stopped(tmp_path, way, ema, optimizer):
    settings = {**PLAIN, "ema": ema, "optimizer": optimizer, "evaluation": {TASK: DATA[:4]}, "evaluate_every": 5}
    settings["checkpoint_every"] = 10 if way == "killed" else 0
    straight = make()
    whole = mm.fit(straight, {TASK: DATA}, **settings, folder=tmp_path / "straight")

    if way == "Ctrl-C":
        run = mm.fit(make(), {TASK: Stopping(DATA, in_step(10), press_ctrl_c)}, **settings, folder=tmp_path / "cut")
        assert not run.finished
        assert run.last("step") == 10
    else:

        def power_cut() -> None:
            raise OSError("the lights went out")

        with pytest.raises(MediaError, match="the lights went out"):
            mm.fit(make(), {TASK: Stopping(DATA, in_step(13), power_cut)}, **settings, folder=tmp_path / "cut")
    assert saved_state(tmp_path / "cut")[1]["step"] == 10

    torch.manual_seed(99)
    resumed = make(seed=5)  # other first weights: all of them come from the state
    run = mm.fit(resumed, {TASK: DATA}, **settings, folder=tmp_path / "cut", resume=True)
    assert run.finished
    assert same(resumed.state_dict(), straight.state_dict())
    (mine, facts), (other, other_facts) = saved_state(tmp_path / "cut"), saved_state(tmp_path / "straight")
    assert same(mine, other)
    assert any(name.startswith("ema/") for name in mine) == bool(ema)
    assert {name.split("/")[0] for name in mine} >= {"model", "optimizer"}
    assert facts == other_facts

    def without_times(history: list[dict]) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in history]

    assert without_times(run.history) == without_times(whole.history)
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert without_times(log) == without_times(whole.history)


def test_a_token_budget_is_resumed_exactly(tmp_path):
    settings = {**PLAIN, "batch": 64, "tokens": 40, "packs": 2, "look_ahead": 12}
    straight = make()
    mm.fit(straight, {TASK: DATA}, **settings)
    settings["checkpoint_every"] = 5

    def cut(row: dict) -> None:
        if row["step"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mm.fit(make(), {TASK: DATA}, **settings, folder=tmp_path, trackers=[cut])
    resumed = make(seed=5)
    run = mm.fit(resumed, {TASK: DATA}, **settings, folder=tmp_path, resume=True)
    assert same(resumed.state_dict(), straight.state_dict())
    assert len(run.history) == 20
    assert min(row["filled"] for row in run.history) > 0.85


def test_dropout_is_drawn_anew_in_every_step():
    core = DROPPING.replace(drop_path=0.0, dropout=0.5)
    run = mm.fit(make(core), {TASK: DATA[:1]}, **{**PLAIN, "batch": 1, "steps": 6, "lr": 1e-12})
    assert len({row["loss"] for row in run.history}) == 6


def test_dropout_and_averages_take_part_in_the_test_above():
    def trained(core: mm.Core, **changes) -> dict[str, Tensor]:
        model = make(core)
        mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 4, **changes})
        return model.state_dict()

    usual = trained(DROPPING)
    assert not same(usual, trained(DROPPING.replace(dropout=0.0, drop_path=0.0)))
    assert not same(usual, trained(DROPPING, ema=0.9))


def test_ctrl_c_leaves_a_model_a_state_and_the_old_handler(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    model = make()
    run = mm.fit(
        model,
        {TASK: Stopping(DATA, in_step(3), press_ctrl_c)},
        **{**PLAIN, "quiet": False, "ema": 0.9},
        folder=tmp_path / "run",
    )
    assert signal.getsignal(signal.SIGINT) is before
    assert (run.finished, run.last("step")) == (False, 3)
    assert same(mm.Model.load(tmp_path / "run" / "model").state_dict(), model.state_dict())
    assert saved_state(tmp_path / "run")[1]["step"] == 3
    said = capsys.readouterr().out
    assert "fit: stopped after step 3 of 20; everything is saved in " in said


@pytest.fixture
def ctrl_c_is_heard():
    """A process that was started in the background may ignore Ctrl-C from the start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once(ctrl_c_is_heard):
    before = signal.getsignal(signal.SIGINT)

    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        mm.fit(make(), {TASK: Stopping(DATA, in_step(2), press_twice)}, **PLAIN)
    assert signal.getsignal(signal.SIGINT) is before


def test_training_in_another_thread_works():
    runs = []
    thread = threading.Thread(target=lambda: runs.append(mm.fit(make(), {TASK: DATA}, **{**PLAIN, "steps": 2})))
    thread.start()
    thread.join()
    assert runs[0].finished


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    model = make()
    mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 4, "ema": 0.9}, folder=tmp_path)
    again = make(seed=3)
    run = mm.fit(again, {TASK: DATA}, **{**PLAIN, "steps": 4, "ema": 0.9}, folder=tmp_path, resume=True)
    assert run.finished
    assert len(run.history) == 4
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lr": 1e-2},
            r"other settings: recipe\.lr was .* and is 0\.01\. Resume with the same",
        ),
        ({"steps": 8}, r"other settings: recipe\.steps was 2 and is 8\."),
        (
            {"data": DATA[:5]},
            r"data\.text -> label was 11 and is 5",
        ),
        ({"core": mm.Core(width=32, depth=2, heads=2)}, r"core\.config\.width was 16 and is 32"),
        ({"core": mm.Core(width=16, depth=1, heads=2)}, r"core\.config\.depth was 2 and is 1"),
    ],
    ids=["lr", "steps", "data", "width", "depth"],
)
def test_resuming_another_run_is_refused(tmp_path, change, message):
    settings = {**PLAIN, "steps": 2}
    mm.fit(make(), {TASK: DATA}, **settings, folder=tmp_path)
    change = dict(change)
    data, core = change.pop("data", DATA), change.pop("core", DROPPING)
    with pytest.raises(CheckpointError, match=message):
        mm.fit(make(core), {TASK: data}, **{**settings, **change}, folder=tmp_path, resume=True)


def test_resume_without_a_state_starts_anew(tmp_path):
    run = mm.fit(make(), {TASK: DATA}, **{**PLAIN, "steps": 2}, folder=tmp_path / "new", resume=True)
    assert [row["step"] for row in run.history] == [1, 2]


def test_a_loss_that_is_not_finite_names_its_step_and_saves_its_batch(tmp_path):
    model = make()

    def poison() -> None:
        with torch.no_grad():
            model.core.norm.weight.fill_(float("nan"))

    wanted = (
        r"step 4: the loss is nan, the gradient norm nan; multimodal replay (\S+) shows its samples; lower lr=0\.003"
    )
    with pytest.raises(FloatingPointError, match=wanted) as caught:
        mm.fit(model, {TASK: Stopping(DATA, in_step(4), poison)}, **PLAIN, folder=tmp_path)
    place = Path(re.search(wanted, str(caught.value)).group(1))
    assert json.loads((place / "trouble-0.json").read_text())["names"][0][0].startswith("sample ")
    assert mm.Model.load(place / "model", finite=False).core.norm.weight.isnan().all()
    with pytest.raises(FloatingPointError, match="its batch is not saved"):
        mm.fit(model, {TASK: DATA}, **PLAIN)


def test_a_spike_is_left_out_and_saved(tmp_path, capsys, monkeypatch):
    """What a spike is, is for SpikeWatch to say; the gradient norm that it sees in step 30 is 10,000 times as large."""
    model, before = make(), {}
    seen = SpikeWatch.why
    monkeypatch.setattr(SpikeWatch, "why", lambda w, loss, norm: seen(w, loss, norm * (1e4 if w.seen == 30 else 1)))

    def remember(row: dict) -> None:
        before[row["step"]] = copy.deepcopy(model.state_dict())

    settings = {**PLAIN, "steps": 34, "spike": 8.0, "quiet": False}
    run = mm.fit(model, {TASK: DATA}, **settings, folder=tmp_path, trackers=[remember])
    assert [row["step"] for row in run.history if "left_out" in row] == [31]
    assert same(before[30], before[31])
    assert not same(before[31], before[32])
    assert "fit: step 31 is left out: " in capsys.readouterr().out
    assert (tmp_path / "trouble" / "step-0000031").is_dir()


@pytest.mark.parametrize("switch", [{"activation_checkpointing": True}, {"accumulate": 2}, {"tokens": 0, "workers": 1}])
def test_switches_that_change_no_result(switch):
    def losses(**changes) -> list[float]:
        core = DROPPING if "accumulate" not in switch else DROPPING.replace(dropout=0.0, drop_path=0.0)
        run = mm.fit(make(core), {TASK: DATA}, **{**PLAIN, "steps": 5, **changes})
        return [row["loss"] for row in run.history]

    exact = "accumulate" not in switch
    assert losses(**switch) == (losses() if exact else pytest.approx(losses(), abs=1e-5))


def test_the_run_folder_has_everything(tmp_path):
    run = mm.fit(
        make(),
        {TASK: DATA},
        **{**PLAIN, "steps": 4, "evaluate_every": 2},
        evaluation={TASK: DATA[:3]},
        folder=tmp_path / "a" / "b",
    )
    everything = {"checkpoints", "config.json", "curves.png", "environment.json", "log.csv", "log.jsonl", "model"}
    assert {p.name for p in run.folder.iterdir()} - {".lock"} == everything
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log == run.history
    assert [row["step"] for row in log] == [1, 2, 3, 4, 4]
    assert [f"{TASK} loss" in row for row in log] == [False, True, False, False, True]
    with Image.open(run.folder / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 440
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is drawn
    facts = json.loads((run.folder / "config.json").read_text())
    assert facts["data"] == {TASK: 11}
    assert facts["recipe"]["steps"] == 4


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mm.fit(make(), {TASK: DATA}, **{**PLAIN, "steps": 2}).folder is None
    assert list(tmp_path.iterdir()) == []


def test_quiet_is_quiet_and_otherwise_it_says_what_it_does(capsys):
    mm.fit(make(), {TASK: DATA}, **{**PLAIN, "steps": 2})
    assert capsys.readouterr().out == ""
    model = make()
    mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 2, "quiet": False})
    out = capsys.readouterr().out
    parameters = sum(p.numel() for p in model.parameters())
    assert f"fit: {parameters:,} parameters, 2 steps of 6 samples on cpu" in out
    assert "in float32 (as asked)" in out
    assert "step 2/2" in out


def test_bfloat16_trains_without_a_warning_and_keeps_float32_weights():
    model = make(mm.Core(width=32, depth=1, heads=2))
    run = mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 25, "lr": 1e-2, "precision": "bfloat16"})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    losses = [row["loss"] for row in run.history]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_micro_batches_change_memory_not_results():
    core = mm.Core(width=16, depth=2, heads=2)

    def losses(accumulate: int) -> list[float]:
        run = mm.fit(make(core), {TASK: DATA}, **{**PLAIN, "steps": 5, "accumulate": accumulate})
        return [row["loss"] for row in run.history]

    assert losses(3) == pytest.approx(losses(1), rel=1e-3)


def test_the_learning_rate_rises_and_falls_as_the_recipe_says():
    run = mm.fit(make(), {TASK: DATA}, **{**PLAIN, "steps": 20, "lr": 1e-3, "warmup": 0.25, "final_lr": 0.1})
    rates = [row["lr"] for row in run.history]
    for t, rate in enumerate(rates):
        cosine = 1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + np.cos(np.pi * (t - 4) / 15))
        assert rate == pytest.approx((t + 1) / 5 * 1e-3 if t < 5 else cosine, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("error", "data", "settings", "message"),
    [
        (ConfigError, {TASK: DATA}, {"step": 3}, r"Recipe has no setting 'step'.*did you mean 'steps'"),
        (ConfigError, {TASK: []}, {}, r"fit: the data of task 'text -> label' are empty"),
        (ConfigError, {}, {}, r"fit: no data were given; give samples by task"),
        (TaskError, {"text -> lable": DATA}, {}, r"there is no task 'text -> lable'.*did you mean 'text -> label'"),
        (TaskError, {TASK: [{"text": "a"}]}, {}, r"task 'text -> label': the sample has no field 'label'"),
        (ConfigError, {TASK: DATA}, {"batch": 6, "accumulate": 4}, r"batch=6 is not a multiple of accumulate=4"),
        (ConfigError, {TASK: DATA}, {"steps": 0}, r"steps=0 must be a whole number, 1 or more"),
        (ConfigError, {TASK: DATA}, {"lr": 0.0}, r"lr=0\.0 must be positive"),
        (ConfigError, {TASK: DATA}, {"precision": "half"}, r"precision='half' is none of auto, float32, bfloat16"),
        (ConfigError, {TASK: DATA}, {"device": "quantum"}, r"device 'quantum' is not there"),
        (TaskError, {TASK: DATA}, {"evaluation": {"image -> lable": DATA}}, r"there is no task 'image -> lable'"),
    ],
    ids=lambda x: "" if isinstance(x, (type, dict)) else x[:40],
)
def test_what_cannot_be_trained_is_named(error, data, settings, message):
    with pytest.raises(error, match=message):
        mm.fit(make(), data, **{**PLAIN, **settings})


TWO = {TASK: DATA, "image -> label": [{"image": torch.full((4, 4), i / 5), "label": "without"} for i in range(5)]}


def counted(batches: Batches, step: int) -> Counter:
    """Samples of each task in a step."""
    return Counter(p for stream in batches[step].streams for p, r in stream.readings.items() for _ in r.samples)


def test_tasks_share_a_batch_in_the_ratio_of_the_mix():
    packer = make(tasks=list(TWO)).packer
    for mix, expected in [(None, (6, 6)), ({TASK: 3.0}, (9, 3)), ({"image -> label": 1000.0}, (1, 11))]:
        batches = Batches(packer, TWO, batch=12, mix=mix)
        for step in (0, 7):
            assert tuple(counted(batches, step)[p] for p in TWO) == expected


@pytest.mark.parametrize("batch", [5, 7, 64])
def test_shares_are_whole_numbers_that_sum_up(batch):
    weight = {"a": 1.0, "b": 2.5, "c": 0.01, "d": 1.0, "e": 3.0}
    share = shares(batch, weight)
    assert sum(share.values()) == batch
    assert min(share.values()) >= 1
    exact = {k: batch * w / sum(weight.values()) for k, w in weight.items()}
    assert all(abs(share[k] - exact[k]) <= 1 or share[k] == 1 for k in weight)
    assert shares(10, {"a": 1.0, "b": 1.0, "c": 1.0}) == {"a": 4, "b": 3, "c": 3}


def test_too_small_a_batch_for_its_tasks_is_refused():
    packer = make(tasks=list(TWO)).packer
    with pytest.raises(
        ConfigError, match="batch=1 must hold at least one sample of each of the 2 tasks, and one for each of 2 micro"
    ):
        Batches(packer, TWO, batch=1, accumulate=2)


def test_every_sample_comes_once_each_time_round_in_a_new_order():
    batches = Batches(make().packer, {TASK: DATA}, batch=4)
    seen = []
    for step in range(11):  # 44 samples: four times round
        stream = batches[step].streams[0]
        r, spans = stream.readings[TASK], stream.layout.spans
        texts = [bytes(t.tolist()).decode() for t in stream.content["text"].split([s.total - 1 for s in spans])]
        seen += [text for _, text in sorted(zip(r.samples, texts, strict=True))]
    rounds = [tuple(seen[i : i + 11]) for i in range(0, 44, 11)]
    assert all(sorted(one) == sorted(WORDS) for one in rounds)
    assert len(set(rounds)) == 4


def test_micro_batches_are_the_batch_cut_up():
    packer = make(tasks=list(TWO)).packer
    whole, parts = Batches(packer, TWO, batch=12), Batches(packer, TWO, batch=12, accumulate=3)
    assert [len(parts[s].streams) for s in range(3)] == [3, 3, 3]
    for step in range(3):
        assert counted(parts, step) == counted(whole, step) == dict.fromkeys(TWO, 6)
        assert [stream.samples for stream in parts[step].streams] == [4, 4, 4]
        letters = [
            sorted(torch.cat([s.content["text"] for s in b[step].streams if "text" in s.content]).tolist())
            for b in (whole, parts)
        ]
        assert letters[0] == letters[1]


def test_evaluate_is_a_count_by_hand(lively):
    model = lively(make(mm.Core(width=16, depth=2, heads=2)))
    found = mm.evaluate(model, TASK, DATA, batch=4)
    right, loss = 0, 0.0
    for sample in DATA:
        answer = model.predict(TASK, text=sample["text"])
        right += answer.value == sample["label"]
        loss -= np.log(answer.probability[sample["label"]])
    assert found["exact"] == right / len(DATA)
    assert 0 < right < len(DATA)
    assert found["loss"] == pytest.approx(loss / len(DATA), rel=1e-4)


def test_evaluate_looks_once_at_what_is_answered_at_once(lively):
    """Figures and order of the two calls that it stands for, though the packer sorts samples by length."""
    model = lively(make(mm.Core(width=16, depth=2, heads=2)))
    texts, labels = ["much longer", "a", "bc", "ten of them"], []
    for i, answer in enumerate(model.predict(TASK, [{"text": text} for text in texts])):
        labels.append(answer.value if i % 2 else next(name for name in answer.probability if name != answer.value))
    samples = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    stream = model.pack(TASK, samples)
    assert stream.readings[TASK].samples != (0, 1, 2, 3)
    with model.inference_mode():
        loss = float(model.losses(stream)[TASK]) / 4
    passes: list[int] = []
    with model.core.register_forward_hook(lambda *_: passes.append(1)):
        found = mm.evaluate(model, TASK, samples, measures=())
    assert found == {"loss": loss, "exact": 0.5}
    assert len(passes) == 1


def test_evaluate_counts_written_tokens_for_the_loss_and_whole_answers_for_exact(lively):
    model = lively(make(mm.Core(width=16, depth=1, heads=2), tasks=["label -> text"]))
    samples = [{"label": "without", "text": t} for t in ("a", "much longer")]
    found = mm.evaluate(model, "label -> text", samples)
    with torch.no_grad():
        sums = [float(model.losses(model.pack("label -> text", [s]))["label -> text"]) for s in samples]
    assert found["loss"] == pytest.approx(sum(sums) / (2 + 12), rel=1e-5)
    assert found["exact"] == 0.0
    written = model.generate("label -> text", label="without", max_tokens=3)
    assert (
        mm.evaluate(model, "label -> text", [{"label": "without", "text": "zz" + str(written.value)}])["exact"] == 0.0
    )


def test_evaluate_compares_sets_of_labels_not_their_order():
    names = ("a", "b", "c")
    model = mm.Model(
        {"text": TextBytes(), "tags": Labels(names, several=True)},
        mm.Core(width=16, depth=1, heads=2),
        ["text -> tags"],
    )
    with torch.no_grad():
        model.readout("text -> tags").linear.weight.zero_()
        model.readout("text -> tags").linear.bias.copy_(torch.tensor([1.0, -5.0, 4.0]))  # a and c, c surer
    found = mm.evaluate(
        model,
        "text -> tags",
        [{"text": "x", "tags": ["a", "c"]}, {"text": "y", "tags": ["c", "a"]}, {"text": "z", "tags": ["a"]}],
    )
    assert found["exact"] == pytest.approx(2 / 3)


def test_evaluating_nothing_is_refused():
    with pytest.raises(ConfigError, match="evaluate: the data of task 'text -> label' are empty"):
        mm.evaluate(make(), TASK, [])


def test_averaged_weights_are_the_formula_and_become_the_model(tmp_path):
    """timm's warm-up: decay 1 - (1 + k)^(-2/3) after the k-th step but one, never more than the recipe's."""
    model = make(mm.Core(width=16, depth=1, heads=2))
    seen: list[Tensor] = []
    model.core.register_forward_pre_hook(lambda *_: seen.append(model.core.norm.weight.detach().clone()))
    mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 4, "ema": 0.5, "lr": 1e-2}, folder=tmp_path)
    weights = [*seen, saved_state(tmp_path)[0]["model/core.norm.weight"]]
    assert len(weights) == 5
    mean = weights[0]
    for k, weight in enumerate(weights[1:]):
        decay = min(0.5, 1 - (1 + k) ** (-2 / 3))
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(model.core.norm.weight.detach(), mean)
    assert (mean - weights[-1]).abs().max() > 1e-4
