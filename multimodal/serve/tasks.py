"""What a client must know of each task of a model, and which task is meant where it names none."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from multimodal.model import Model
from multimodal.serve.errors import ApiError, bad
from multimodal.serve.values import takes
from multimodal.shapes import did_you_mean
from multimodal.texts import shortened
from multimodal.transcription import transcription_tasks


@dataclass(frozen=True)
class Input:
    """A field that a task reads.

    name: of the field. kind: the name of its tokenizer. takes: what its values are made of, as `values.takes` says.
    """

    name: str
    kind: str
    takes: str


@dataclass(frozen=True)
class TaskView:
    """A task, as far as its clients see it.

    task: its pattern.
    reads: the fields that it reads; of a pair, those of both sides.
    writes: what its answers are made of; None: a pair.
    token_by_token: whether its answers are written token by token, with options; else they are answered at once.
    left: of a pair, how many of the fields are those of the left side.
    """

    task: str
    reads: tuple[Input, ...]
    writes: str | None
    token_by_token: bool
    left: int = 0

    def side(self, side: str) -> tuple[Input, ...]:
        """The fields of a pair's side, "left" or "right"."""
        return self.reads[: self.left] if side == "left" else self.reads[self.left :]


def task_views(model: Model) -> dict[str, TaskView]:
    """By pattern, each task of a model."""
    packer, found = model.packer, {}
    for task, pattern in packer.patterns.items():
        reads = tuple(Input(f.name, f.kind, takes(packer.tokenizers[f.kind])) for f in pattern.reads)
        writes = None if pattern.written is None else takes(packer.tokenizers[pattern.writes.kind])
        left = len(pattern.reads) - len(pattern.right) if pattern.pair else 0
        found[task] = TaskView(task, reads, writes, packer.heads[task].autoregressive, left)
    return found


def described(model: Model, name: str) -> list[dict[str, Any]]:
    """The tasks of a model as JSON, for `/v1/tasks`."""
    transcribes = set(transcription_tasks(model))
    return [
        {
            "task": view.task,
            "model": name,
            "reads": [{"field": i.name, "kind": i.kind, "takes": i.takes} for i in view.reads],
            "writes": view.writes,
            "pair": view.writes is None,
            "token_by_token": view.token_by_token,
            "transcribes": view.task in transcribes,
        }
        for view in task_views(model).values()
    ]


def named_task(views: dict[str, TaskView], wanted: str) -> TaskView:
    """The task of this pattern, however it is spaced.

    Raises:
        ApiError: 404, there is none.
    """
    for task, view in views.items():
        if task.split() == wanted.split():
            return view
    raise ApiError(
        404,
        f"there is no task {shortened(repr(wanted), 100)}; there are {_listed(views)}{did_you_mean(wanted, views)}",
        param="task",
        code="task_not_found",
    )


def choose_task(
    views: dict[str, TaskView], wanted: str | None, fits: Callable[[TaskView], bool], what: str
) -> TaskView:
    """The task that is named, or the only one that fits.

    what: what a fitting task does, for errors: "writes text from one text".

    Raises:
        ApiError: none or several fit, or the named one does not.
    """
    if wanted is not None:
        view = named_task(views, wanted)
        if not fits(view):
            raise bad(f"task {view.task!r} is none that {what}", "task")
        return view
    fitting = [view for view in views.values() if fits(view)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = _listed(view.task for view in fitting)
        raise bad(
            f"several tasks of this model {what.replace('s ', ' ', 1)}; say which by the parameter task: {several}",
            "task",
        )
    raise bad(f"this model has no task that {what}; it has {_listed(views)}", "model", "no_such_task")


def _listed(tasks: Iterable[str]) -> str:
    return ", ".join(map(repr, tasks))
