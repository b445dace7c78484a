"""`quick`: look at the data, divide them, choose by rules, measure the speed, train, measure the result, leave a folder."""

import copy
import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.augment import Augmented
from multimodal.data import MissingCells
from multimodal.declare import override
from multimodal.files import check_fields, read_json, write_atomic
from multimodal.measures import Evaluation
from multimodal.model import Model
from multimodal.progress import progress_bar
from multimodal.shapes import CheckpointError, ConfigError, check_number, check_seed
from multimodal.start.code import program
from multimodal.start.data_report import DataReport
from multimodal.start.division import PARTS, divide, strata_of
from multimodal.start.gather import gather
from multimodal.start.parts import Chosen, read_part, write_parts
from multimodal.start.rules import EVALUATIONS, FEWEST, FOLDS, Choice, choose, may_be_linear, with_steps
from multimodal.start.survey import survey
from multimodal.start.trained import trained
from multimodal.task import Task
from multimodal.texts import as_json, shortened
from multimodal.train import Run, TrainingJob, evaluate, fit
from multimodal.train.run_folder import MODEL, check_folder
from multimodal.train.run_report import Record
from multimodal.train.settings import make_job
from multimodal_tokenizers import Labels

STATE = "quick.json"
SCRIPT, REPORT = "script.py", "report"
VECTORS = "vectors"  # of an encoder with trained weights
WRITTEN = (*(f"{part}.jsonl" for part in PARTS), *PARTS, "data.json", "data.html", SCRIPT, REPORT, VECTORS)
"""What the quick path writes into the folder of a run, beside the files of the run."""
PROBE, SETTLED = 8, 3  # steps that measure the speed, of which so many are not counted
FOR_TRAINING = 0.9  # of the minutes; the rest is for looking and measuring
CHECKPOINT_S = 30.0
RESAMPLES = 200
FEWEST_ROWS = 10  # in each fold of a comparison
SIZES = 2  # by how many a core may be smaller for the time


@dataclass
class Quick:
    """What `quick` made. `print` shows it, and so does a notebook.

    model: the trained model.
    run: the training run, with its history.
    report: what was seen of the data.
    evaluation: the measures of the test part, with intervals and the worst answers; None: the run was stopped.
    folder: where everything is saved; None: nowhere.
    says: what was chosen, a line each.
    parts: the samples of each part: train, held_out, test.
    """

    model: Model
    run: Run
    report: DataReport
    evaluation: Evaluation | None
    folder: Path | None
    says: list[str]
    parts: dict[str, Any]

    def __repr__(self) -> str:
        (task,) = self.model.tasks
        figures = (
            [f"{name} {figure}" for name, figure in self.evaluation.figures.items()] if self.evaluation else ["stopped"]
        )
        where = [] if self.folder is None else [str(self.folder)]
        shown = [repr(task), f"{self.report.parts['train']:,} samples", *figures[:3], *where]
        return f"Quick({', '.join(shown)})"

    def _repr_html_(self) -> str:
        """For notebooks: the measures, the data, the choices."""
        parts = [f"<b>{escape(repr(self))}</b>"]
        if self.evaluation is not None:
            parts.append(self.evaluation._repr_html_())
        parts += [self.report._repr_html_(), "<br>".join(map(escape, self.says)), self.run._repr_html_()]
        return "".join(parts)

    @property
    def next_commands(self) -> list[str]:
        """Commands that use the model."""
        if self.folder is None:
            return []
        run, reads = shlex.quote(str(self.folder)), " ".join(_typed(self.report, name) for name in self.report.fields)
        verb = "generate" if self.report.answer["kind"] == "text" else "predict"
        lines = [f"multimodal {verb} {run} {reads}", f"multimodal look {run} {reads}"]
        test = self.folder / "test.jsonl"
        lines.append(f"multimodal evaluate {run} {shlex.quote(str(test if test.is_file() else self.folder / 'test'))}")
        lines += [f"multimodal serve {run}", f"python {shlex.quote(str(self.folder / SCRIPT))}"]
        return lines


def quick(
    data: Any,
    *,
    read: Sequence[str] = (),
    write: str | None = None,
    test: Any = None,
    group: str | None = None,
    time: str | None = None,
    folder: str | Path | None = None,
    minutes: float = 5.0,
    seed: int = 0,
    augment: bool = True,
    start: str | None = None,
    encoding: str | None = None,
    settings: Sequence[str] = (),
    resume: bool = False,
    trackers: Sequence[Any] = (),
    quiet: bool = False,
    command: str | None = None,
) -> Quick:
    """Train on a folder, a table or a data set, with everything chosen by the rules of docs/quick.md, and measure the result.

    data: a folder with a sub-folder of pictures or sounds for each class, a .csv, .tsv, .jsonl, .parquet or .xlsx file, hf:NAME, a
    DataFrame, or samples with a length and [index].
    read: columns that are read, "column" or "field=column"; unless given, all that say something. write: the column that is
    answered; unless given, the one called label, class or target.
    test: the test part, of the same form as `data`; unless given, the one that the data name (folders, a column split), else a
    fifth.
    group: a column; samples of one group lie in one part. time: a column; the latest fifth is the test part.
    folder: where model, curves, reports and script.py are saved; None: nowhere. A run there that was stopped goes on.
    minutes: the time that training may take. seed: of parts, weights and order.
    augment: whether pictures, sounds and series are changed at random in training, where the rules say so.
    start: trained weights to begin from, as of `mm.pretrained`: a name on the Hugging Face hub, such as "facebook/dinov2-small", or
    a folder. Its encoder is not trained further, and with `folder` each value passes it once.
    encoding: of a text file that is not UTF-8. settings: changes as of `multimodal train --set`, such as "steps=500".
    resume: take a run that went to its end as it is. trackers: as of `fit`. quiet: print nothing. command: what started it, for
    script.py and messages.

    Raises:
        ConfigError: data that cannot be used, or settings that do not fit; the message says what was found and what to do.
        CheckpointError: the folder holds the run of other data or settings.

    Examples:
        >>> found = mm.quick(samples, read=["image"], write="label", settings=["steps=5"], quiet=True)
        >>> found.evaluation["exact"] >= 0
        True
    """
    _check(read, settings, minutes, seed, augment)
    run = None if folder is None else Path(folder)
    options = {
        "read": list(read), "write": write, "group": group, "time": time, "minutes": float(minutes), "seed": seed,
        "augment": augment, "encoding": encoding, "settings": list(settings), **({"start": start} if start else {}),
    }  # fmt: skip
    named = shortened(data, 200) if isinstance(data, (str, os.PathLike)) else type(data).__name__
    command = command or _call(data, options)
    say = (lambda text: None) if quiet else print
    rows = gather(data, test=test, encoding=encoding, quiet=quiet)
    about = json.loads(as_json({"options": options, "data": rows.about}))
    state = _begun(run, about, resume)
    if run is not None and state is not None:
        report, shards = DataReport.load(run), bool(state["shards"])
        parts = {part: read_part(run, part, shards) for part in PARTS}
        say(f"the data, parts and choices are those of the run in {run}")
    else:
        if run is not None:
            _make_folder(run)
        report, chosen = _looked(rows, named, options, quiet)
        shards = False
        parts: dict[str, Any] = chosen
        if run is not None:
            write_atomic(run / STATE, as_json({**about, "ready": False}, 1) + "\n")  # from here on the files are ours
            report.save(run)
            shards = write_parts(run, chosen, quiet)
            parts = {part: read_part(run, part, shards) for part in PARTS}
    say(str(report))
    if not parts["train"] or not len(parts["test"]):
        raise ConfigError("there is nothing to train on or to test on")
    # the speed is measured once, and choices are compared once, so that a run that goes on does the same
    choice, job, measured = _job(report, parts, options, state, run, quiet)
    if run is not None:
        job = _saving(job, float(measured["step_s"]))
    if run is not None and state is None:
        state = {
            **about,
            "shards": shards,
            **measured,
            "steps": job.recipe.steps,
            "done": False,
        }
        write_atomic(run / SCRIPT, _script(command, run, shards, report, choice, job))
        write_atomic(run / STATE, as_json(state, 1) + "\n")
    for line in choice.says:
        say(f"{'chosen' if line is choice.says[0] else '':<10}{line}")
    go_on = f"{command} again" if command else "the same call"
    (task,) = job.model.tasks
    if run is None:
        trained = fit(job.model, job.data, job.recipe, evaluation=job.evaluation, trackers=trackers, quiet=quiet)
    else:
        trained = job.run(run, resume=True, trackers=trackers, quiet=quiet, go_on=go_on)
        if trained.finished:  # a run that was finished before has its weights in the folder
            job = replace(job, model=Model.load(run / MODEL, device=next(job.model.parameters()).device))
    found = Quick(job.model, trained, report, None, run, choice.says, parts)
    if not trained.finished:
        return found
    found.evaluation = evaluate(job.model, task, parts["test"], resamples=RESAMPLES, quiet=quiet)
    if run is not None and state is not None:
        found.evaluation.save(run / REPORT)
        write_atomic(run / STATE, as_json({**state, "done": True}, 1) + "\n")
    say(str(found.evaluation))
    return found


def _check(read: Any, settings: Any, minutes: Any, seed: Any, augment: Any) -> None:
    for name, value in (("read", read), ("settings", settings)):
        if isinstance(value, str) or not all(isinstance(one, str) for one in value):
            raise ConfigError(
                f"quick: {name}={value!r}: give a list of texts, such as {name}=[{'image' if name == 'read' else 'steps=500'!r}]"
            )
    check_number("quick", minutes=minutes)
    if not 0 < minutes < math.inf:
        raise ConfigError(f"quick: minutes={minutes} must be more than 0")
    check_seed("quick", seed)
    if not isinstance(augment, bool):
        raise ConfigError(f"quick: augment={augment!r} must be True or False")


def _call(data: Any, options: dict[str, Any]) -> str:
    """The call as it is written in Python."""
    usual = {"minutes": 5.0, "seed": 0, "augment": True}
    given = [f"{name}={value!r}" for name, value in options.items() if value not in (None, [], usual.get(name))]
    first = repr(os.fspath(data)) if isinstance(data, (str, os.PathLike)) else "samples"
    return f"mm.quick({', '.join([first, *given])})"


def _make_folder(run: Path) -> None:
    """Make the folder of a run.

    Raises:
        ConfigError: it cannot be made, or holds files of others that would be overwritten.
    """
    check_folder(run)
    there = [name for name in WRITTEN if os.path.lexists(run / name)]
    if there and not (run / STATE).is_file():
        raise ConfigError(
            f"{run} holds {', '.join(there)}, which the quick path did not write; choose another --folder"
        )
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{run} cannot be made: {error.strerror or error}; choose another --folder") from error


def _begun(run: Path | None, about: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The state of a run of the quick path in this folder; None: there is none.

    Raises:
        ConfigError: it is finished, or the folder holds another sort of run. CheckpointError: it is of other data or settings.
    """
    if run is None or not run.is_dir():
        return None
    if not (run / STATE).is_file():
        if Record.read(run).step is not None:
            raise ConfigError(f"{run} holds a training run that the quick path did not begin; choose another --folder")
        return None
    state = read_json(run / STATE, CheckpointError)
    if state.get("ready") is False:  # it was stopped while it looked at the data
        return None
    kinds = {
        "options": dict,
        "data": dict,
        "shards": bool,
        "step_s": (int, float),
        "smaller": int,
        "steps": int,
        "done": bool,
    }
    kinds |= {"losses": list} if "losses" in state else {}  # runs of earlier versions have none
    check_fields(run / STATE, state, kinds, CheckpointError)
    if state["data"] != about["data"]:
        raise CheckpointError(f"{run} holds a run with other data; choose another --folder, or delete it")
    before, now = state["options"], about["options"]
    if wrong := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        was = f"another {wrong[0]} ({before.get(wrong[0])!r})"
        raise CheckpointError(f"{run} holds a run with {was}; choose another --folder, or delete it")
    if state["done"] and not resume:
        raise ConfigError(
            f"{run} holds a training run that went to its end; choose another folder (--folder), or delete it (--resume takes it "
            "as it is)"
        )
    return state


def _looked(rows: Any, named: str, options: dict[str, Any], quiet: bool) -> tuple[DataReport, dict[str, Chosen]]:
    """Look at all samples, and divide them."""
    found = survey(
        rows, read=options["read"], write=options["write"], group=options["group"], time=options["time"], quiet=quiet
    )
    used, kind = found.used, found.answer.kind
    strata = strata_of(kind, used, found.answers)
    if kind == "label" and len(set(strata.values())) < 2:
        only = shortened(next(iter(strata.values())), 60)
        raise ConfigError(
            f"all {len(used):,} samples that can be used are of one class, {only!r}; there is nothing to tell apart{_lost(rows)}"
        )
    groups = (
        None
        if found.group is None
        else {row: found.group.cells[row] if found.group.cells[row] is not None else ("alone", row) for row in used}
    )
    divided = divide(
        used,
        strata=strata,
        keys=found.key,
        given={row: rows.given[row] for row in used},
        groups=groups,
        times=None if found.time is None else {row: found.time[row] for row in used},
        seed=options["seed"],
        repeats=found.repeats,
    )
    for row, reason in divided.left_out.items():
        rows.leave(reason, rows.names[row])
    found.measured(divided.parts["train"])
    classes = _classes(kind, divided.parts, found.answers)
    train_only = [name for name, counts in classes.items() if not counts.get("train")]
    if train_only:
        found.findings.append(
            f"classes without a training sample: {', '.join(map(repr, train_only[:10]))}; they cannot be learned"
        )
    report = DataReport(
        source=named,
        saw=rows.saw,
        fields={seen.name: {"kind": seen.kind, **seen.facts} for seen in found.fields},
        answer={"name": found.answer.name, "kind": kind, "column": found.answer.columns[0], "classes": list(classes)},
        parts={part: len(some) for part, some in divided.parts.items()},
        classes=classes,
        split=divided.says,
        findings=found.findings,
        left_out=rows.left_out,
    )
    # a report that was saved and one that was not are the same
    report = DataReport(**json.loads(as_json(report.to_json())))
    return report, {part: Chosen(found.samples, some) for part, some in divided.parts.items()}


def _lost(rows: Any) -> str:
    return "".join(
        f"; {reason}: {len(names):,} ({shortened(names[0], 160)})" for reason, names in rows.left_out.items()
    )


def _classes(kind: str, parts: dict[str, list[int]], answers: Sequence[Any]) -> dict[str, dict[str, int]]:
    """By class, its number of samples in each part, in the order of its id."""
    if kind not in ("label", "labels"):
        return {}
    counts: dict[str, dict[str, int]] = {}
    for part, some in parts.items():
        for row in some:
            for name in [answers[row]] if kind == "label" else dict.fromkeys(answers[row]):
                of = counts.setdefault(str(name), {})
                of[part] = of.get(part, 0) + 1
    return {name: counts[name] for name in Labels.from_data(list(counts)).names} if counts else {}


def _job(
    report: DataReport,
    parts: dict[str, Any],
    options: dict[str, Any],
    state: dict[str, Any] | None,
    run: Path | None,
    quiet: bool,
) -> tuple[Choice, TrainingJob, dict[str, Any]]:
    """The choice and the job, and what was measured for them: the seconds of a step, by how many sizes the core is smaller for
    the time, and the losses of a model with and without blocks."""
    seconds = 60 * FOR_TRAINING * options["minutes"]
    named = {text.partition("=")[0].strip().removeprefix("recipe.") for text in options["settings"]}
    fixed = "steps" in named
    source = options.get("start")
    encoder = trained(source, report.fields, parts["train"]) if source else None
    found: dict[str, Any] = {"step_s": 0.0, "smaller": 0, "losses": []}
    found |= {name: state[name] for name in found if name in state} if state else {}

    def chosen(linear: bool) -> Choice:
        more = {"seed": options["seed"], "smaller": int(found["smaller"]), "augment": options["augment"]}
        choice = choose(report, parts["train"], **more, linear=linear, start=encoder)
        if encoder and run is not None:
            choice.recipe = override(choice.recipe, cache=str(run / VECTORS))
        return choice

    while True:
        choice = chosen(False)
        fit_in = wanted = choice.recipe.steps
        if fixed:
            break
        if not state:
            found["step_s"] = _speed(_made(choice, parts, options))
        fit_in = max(1, int(seconds / max(float(found["step_s"]), 1e-6)))
        if fit_in >= FEWEST * wanted or found["smaller"] >= SIZES or state:
            break
        found["smaller"] += 1
    # what the user says about core or tokens is not compared with something else, and folds would cut groups and times
    own = any(name.partition(".")[0] in ("core", "tokenizers") for name in named) or options["group"] or options["time"]
    fits = fixed or (2 * FOLDS + 1) * wanted * float(found["step_s"]) <= seconds
    if not state and may_be_linear(report) and fits and not own and len(parts["train"]) >= FOLDS * FEWEST_ROWS:
        found["losses"] = _compared([chosen(False), chosen(True)], parts["train"], report, options, quiet)
    if found["losses"]:
        deep, linear = found["losses"]
        better = linear < deep
        choice = chosen(better)
        choice.says.append(
            f"{'no blocks' if better else 'blocks'}: the loss in {FOLDS}-fold cross-validation of the training part is {deep:.4f} "
            f"with blocks and {linear:.4f} without"
        )
    if not fixed:
        steps = min(wanted, fit_in)
        choice.recipe = with_steps(choice, steps)
        about = (
            f"{steps:,} steps"
            if steps == wanted
            else f"{steps:,} of {wanted:,} steps, which fit in {options['minutes']:g} minutes"
        )
        step_s = float(found["step_s"])
        choice.says.append(
            f"training: {about}; a step takes {1000 * step_s:.0f} ms here, so about {_minutes(steps * step_s)}"
        )
    return choice, _made(choice, parts, options), found


def _compared(
    choices: Sequence[Choice], train: Any, report: DataReport, options: dict[str, Any], quiet: bool
) -> list[float]:
    """The mean loss of each choice in cross-validation of the training part, whose folds have equal shares of the answers."""
    samples = [train[i] for i in range(len(train))]
    mixed = np.random.default_rng(options["seed"]).permutation(len(samples)).tolist()
    answer = report.answer["name"]
    key = float if report.answer["kind"] == "number" else str
    order = sorted(mixed, key=lambda i: key(samples[i][answer]))
    losses = [0.0] * len(choices)
    with progress_bar("comparing with and without blocks", FOLDS * len(choices), quiet=quiet) as bar:
        for fold in range(FOLDS):
            left_out = set(order[fold::FOLDS])
            parts = {"train": [x for i, x in enumerate(samples) if i not in left_out], "held_out": []}
            rest = [samples[i] for i in sorted(left_out)]
            for number, choice in enumerate(choices):
                job = _made(replace(choice, recipe=override(choice.recipe, patience=0)), parts, options)
                # many steps that the user sets are not done 7 times
                _fitted(job, min(job.recipe.steps, choice.recipe.steps))
                (task,) = job.model.tasks
                losses[number] += evaluate(job.model, task, rest, measures=[])["loss"] * len(rest) / len(samples)
                bar.advance(1)
    return losses


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _made(choice: Choice, parts: dict[str, Any], options: dict[str, Any]) -> TrainingJob:
    """The job of a choice, with the settings that the user changes."""
    train: Any = MissingCells(parts["train"], "row", choice.gaps) if choice.gaps else parts["train"]
    if choice.changes:
        train = Augmented(train, choice.changes)
    held_out = parts["held_out"]

    def recipe() -> TrainingJob:
        model = Model(choice.tokenizers, choice.core, [Task(choice.task, choice.head)], seed=options["seed"])
        evaluation = {choice.task: held_out} if len(held_out) else None
        every = max(1, choice.recipe.steps // EVALUATIONS) if evaluation else 0
        return TrainingJob(
            model=model,
            data={choice.task: train},
            evaluation=evaluation,
            recipe=override(choice.recipe, evaluate_every=every),
        )

    return make_job(recipe, options["settings"], "quick")


def _saving(job: TrainingJob, step_s: float) -> TrainingJob:
    """The job with a checkpoint every half minute or so."""
    if job.recipe.checkpoint_every:
        return job
    every = round(CHECKPOINT_S / step_s) if step_s else job.recipe.steps // 10
    return replace(job, recipe=override(job.recipe, checkpoint_every=max(10, min(every, job.recipe.steps))))


def _speed(job: TrainingJob) -> float:
    """Seconds of a training step of this job, measured with a copy of its model."""
    history = _fitted(replace(job, model=copy.deepcopy(job.model)), PROBE).history
    if job.recipe.cache:  # once more: now the vectors of these samples are kept, as in most steps
        history = _fitted(replace(job, model=copy.deepcopy(job.model)), PROBE).history
    return (history[-1]["seconds"] - history[SETTLED - 1]["seconds"]) / (PROBE - SETTLED)


def _fitted(job: TrainingJob, steps: int) -> Run:
    """So many steps of a job, of which nothing is saved or measured.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    recipe = override(job.recipe, steps=steps, evaluate_every=0, checkpoint_every=0, best="", patience=0)
    run = fit(job.model, job.data, recipe, quiet=True)
    if not run.finished:  # the signal was taken by `fit`
        raise KeyboardInterrupt
    return run


def _script(command: str, run: Path, shards: bool, report: DataReport, choice: Choice, job: TrainingJob) -> str:
    """The program that trains the same."""
    (task,), model = job.model.tasks, job.model
    made = {
        # an expression makes the same tokenizer of the training part; one that the user changed is written out
        kind: choice.code[kind] if tokenizer == choice.tokenizers[kind] else tokenizer
        for kind, tokenizer in model.packer.tokenizers.items()
    }
    return program(
        command=command.replace('"""', "'''").replace("\\", "/"),
        folder=str(run),
        shards=shards,
        parts=report.parts,
        tokenizers=made,
        core=model.core.core,
        head=model.packer.head(task),
        task=task,
        seed=model.seed,
        recipe=job.recipe,
        gaps=choice.gaps,
        changes=choice.changes_code,
    )


def _typed(report: DataReport, name: str) -> str:
    """An option with an example for a field, as a command line has it."""
    kind = report.fields[name]["kind"]
    if kind == "row":
        cells: dict[str, Any] = {
            column: about.get("middle", "...") for column, about in report.fields[name]["columns"].items()
        }
        return f"--{name} {shlex.quote(json.dumps(cells, ensure_ascii=False))}"
    example = {"image": "picture.jpg", "audio": "sound.wav", "series": "series.npy", "text": shlex.quote("some words")}
    return f"--{name} {example[kind]}"
