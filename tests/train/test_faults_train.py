"""Training, one test a fault: settings have an effect, state does not leak, processes agree, nothing hangs."""

import json
import logging
import math
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.check import verify
from multimodal.shapes import ConfigError
from multimodal_tokenizers import Labels, TextBytes

TASK, WRITE = "text -> label", "label -> text"
WORDS = ["ab", "cab", "dad", "abba", "bed", "face", "deaf", "bad", "a", "fed", "cafe"]
DATA = [{"text": word, "label": "with a" if "a" in word else "without"} for word in WORDS]
PLAIN: dict[str, Any] = {"steps": 3, "batch": 6, "lr": 3e-3, "precision": "float32", "device": "cpu", "quiet": True}


def make(tasks: Any = (TASK,), core: mm.Core | None = None) -> mm.Model:
    return mm.Model(
        {"text": TextBytes(), "label": Labels(("with a", "without"))},
        core or mm.Core(width=16, depth=1, heads=2, dropout=0.1),
        tasks,
    )


# 16: processes agree before the first step


@pytest.fixture(scope="module")
def disagreements(program, tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("agreeing")
    program("tests/programs/agreeing.py", folder, ranks=2, seconds=120)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("classes", "tokenizers.label.config.names[0] is 'yes' in process 0 and 'no' in process 1"),
        ("size", "data.text -> label is 6 in process 0 and 5 in process 1"),
        ("order", "samples.text -> label.sample 0 is "),
        ("rate", "recipe.lr is 0.001 in process 0 and 0.002 in process 1"),
        ("seed", "recipe.seed is 0 in process 0 and 1 in process 1"),
        ("weights", "weights.core.norm.weight is "),
        ("first weights", "seed is 0 in process 0 and 1 in process 1"),
        ("frozen", "trained.core.norm.weight is True in process 0 and False in process 1"),
        ("versions", "and '2.0.1' in process 1"),
        ("held out", "evaluation.text -> label is 3 in process 0 and 4 in process 1"),
        ("mix", "mix.text -> label is 1.0 in process 0 and 2.0 in process 1"),
    ],
)
def test_fault_16_processes_that_differ_say_in_what(disagreements, case, named):
    for said in disagreements:
        assert said[case]["said"].startswith("ConfigError: fit: the processes do not agree: ")
        assert named in said[case]["said"]
        assert said[case]["seconds"] < 30


def test_fault_16a_an_error_of_one_process_ends_the_others_and_what_may_differ_does(disagreements):
    first, second = disagreements
    assert first["one fails"]["said"] == (
        "ConfigError: fit: process 1 of 2 cannot begin: ConfigError: fit: the data of task 'text -> label' are empty"
    )
    assert second["one fails"]["said"] == "ConfigError: fit: the data of task 'text -> label' are empty"
    for said in disagreements:
        assert {said[case]["said"] for case in ("workers", "drawn anew", "alike")} == {"trained 2"}


# 18: the schedule


def rates(**settings: Any) -> list[float]:
    return [row["lr"] for row in mm.fit(make(), {TASK: DATA}, **{**PLAIN, "lr": 1e-3, **settings}).history]


def test_fault_18_the_rate_rises_from_the_first_step_and_ends_where_it_says():
    found = rates(steps=10, warmup=0.4, final_lr=0.1)
    assert found[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    falling = [1e-4 + 0.45e-3 * (1 + math.cos(math.pi * i / 6)) for i in range(1, 7)]
    assert found[4:] == pytest.approx(falling)
    assert found[-1] == pytest.approx(1e-4)


def test_fault_18a_one_step_learns_and_a_warm_up_of_all_steps_reaches_the_rate():
    assert rates(steps=1, warmup=1.0) == rates(steps=1, warmup=0.0) == [1e-3]
    assert rates(steps=4, warmup=1.0) == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    mm.fit(model, {TASK: DATA}, **{**PLAIN, "steps": 1, "warmup": 1.0})
    assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# 19: what a call finds in its process, it leaves as it was


def everything() -> dict[str, Any]:
    """What belongs to the whole process, as values that can be compared."""
    return {
        "random": random.getstate(),
        "numpy": str(np.random.get_state()[1].tolist()) + str(np.random.get_state()[2:]),
        "torch": torch.get_rng_state().tolist(),
        "autograd": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "hook": sys.excepthook,
        "filters": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
    }


class Disturbing(list):
    """Samples by a program that changes whatever it can; the last one fails where `fails`."""

    fails = False

    def __getitem__(self, index: Any) -> Any:
        random.random()
        np.random.rand()
        torch.rand(1)
        os.chdir("/")
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
        warnings.filterwarnings("ignore", message="nothing of ours")
        logging.root.setLevel(logging.ERROR)
        logging.disable(logging.INFO)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.fails:
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(2)
            raise OSError("the disk is gone")
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))


VERBS: dict[str, Callable[[mm.Model, Any], Any]] = {
    "fit": lambda model, samples: mm.fit(model, {TASK: samples}, **PLAIN),
    "evaluate": lambda model, samples: mm.evaluate(model, TASK, samples),
    "predict": lambda model, samples: model.predict(TASK, samples),
    "generate": lambda model, samples: model.generate(WRITE, samples, max_tokens=3),
    "verify": lambda model, samples: verify(model, {TASK: samples}),
}


@pytest.fixture
def quiet_process():
    """Puts back what the code before leaves behind, so that other tests go on."""
    before = everything()
    flags, folder = torch.backends.cudnn.benchmark, os.getcwd()
    yield before
    os.chdir(folder)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(before["precision"])
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = flags
    warnings.filters[:] = before["filters"]  # type: ignore[index]
    logging.root.setLevel(before["logging"][0])
    logging.disable(before["logging"][2])
    signal.signal(signal.SIGTERM, before["signals"][1])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_fault_19_a_verb_leaves_the_process_as_it_was(quiet_process, verb, fails):
    model, samples = make([TASK, WRITE]), Disturbing(DATA)
    samples.fails = fails
    before = everything()
    with pytest.raises((OSError, ValueError)) if fails else nullcontext():
        VERBS[verb](model, samples)
    after = everything()
    assert [name for name in before if before[name] != after[name]] == []


def test_fault_19a_draws_between_fits_go_on_as_without_them():
    torch.manual_seed(5)
    wanted = [float(torch.rand(())) for _ in range(3)]
    torch.manual_seed(5)
    found = []
    for _ in range(3):
        found.append(float(torch.rand(())))
        mm.fit(make(), {TASK: DATA}, **PLAIN)
    assert found == wanted


def test_fault_19b_a_fit_that_fails_leaves_the_model_in_its_mode():
    model = make().eval()
    with pytest.raises(ValueError, match="the sample has no field 'label'"):
        mm.fit(model, {TASK: [*DATA[:1], *[{"text": "a"}] * 20]}, **PLAIN)
    assert not any(module.training for module in model.modules())


# 20: answers are given as samples are read


class Counting:
    """Samples with a length and [index], which count how many are alive before the first answer."""

    def __init__(self, count: int, sample: dict) -> None:
        self.count, self.sample, self.read = count, sample, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.read += 1
        return dict(self.sample)


@pytest.mark.parametrize(("task", "lazy"), [(TASK, True), (TASK, False), (WRITE, True), (WRITE, False)])
def test_fault_20_samples_are_read_a_batch_ahead_of_the_answers(lively, monkeypatch, task, lazy):
    model = lively(make([TASK, WRITE]))
    samples = Counting(200, {"text": "ab", "label": "without"})
    read_before_pass: list[int] = []
    model.core.register_forward_pre_hook(lambda *_: read_before_pass.append(samples.read))
    given = samples if lazy else (samples[i] for i in range(200))
    options = {"max_tokens": 2} if task == WRITE else {}
    answers = model.generate(task, given, batch=8, **options) if task == WRITE else model.predict(task, given, batch=8)
    assert len(answers) == 200
    assert read_before_pass[0] <= 9
    assert samples.read == 200


def test_fault_20a_answers_come_in_order_and_are_those_of_one_alone(lively):
    model = lively(make([TASK, "text -> out:text"]))
    random_lengths = [{"text": "abcdefgh"[: 1 + i * 5 % 8] * (1 + i % 4)} for i in range(23)]
    for sort in (False, True):  # rising lengths: none fits where the one before did
        texts = sorted(random_lengths, key=lambda s: len(s["text"])) if sort else random_lengths
        many = model.generate("text -> out:text", texts, batch=3, max_tokens=4)
        assert [a.value for a in many] == [
            model.generate("text -> out:text", [s], max_tokens=4)[0].value for s in texts
        ]
        found = model.predict(TASK, iter(texts), batch=3)
        assert [a.value for a in found] == [model.predict(TASK, [s])[0].value for s in texts]
    tickets = [p.ticket for p in model.stream("text -> out:text", iter(texts), batch=2, max_tokens=3) if p.prediction]
    assert sorted(tickets) == list(range(23))


def test_fault_20b_what_gives_no_samples_is_refused():
    model = make([TASK, WRITE])
    for wrong in (3, "ab", b"ab"):
        with pytest.raises(ConfigError, match=r"samples is (int|str|bytes); give a list of samples"):
            model.predict(TASK, wrong)  # type: ignore[arg-type]
    assert model.predict(TASK, iter([])) == []
    with pytest.raises(ConfigError, match="begins has 2 values for more samples; give one for each"):
        model.generate(WRITE, iter([{"label": "without"}] * 3), begin=["a", "b"], max_tokens=2)
    with pytest.raises(ConfigError, match="begins has 2 values for 1 samples; give one for each"):
        model.generate(WRITE, iter([{"label": "without"}]), begin=["a", "b"], max_tokens=2)
