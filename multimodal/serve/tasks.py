"""Describes the tasks of a model to clients, and chooses a task for a request."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from multimodal.composite import Composite
from multimodal.model import Model
from multimodal.pattern import Field
from multimodal.serve.errors import ApiError, bad
from multimodal.serve.values import CLASS, takes
from multimodal.shapes import did_you_mean
from multimodal.texts import shortened
from multimodal.tokenizer import Tokenizer
from multimodal.transcription import transcription_tasks
from multimodal.transcription.recordings import TranscriptionTask


@dataclass(frozen=True)
class Input:
    """A field that a task reads.

    name: of the field. kind: the name of its tokenizer. takes: the form of its values, see `values.takes`.
    classes: for CLASS, the class names. several: for CLASS, whether a value is a list of classes.
    many: whether it takes a list of any number of values, "image*".
    turns: whether it is a conversation, as the messages of a chat are.
    """

    name: str
    kind: str
    takes: str
    classes: tuple[str, ...] = ()
    several: bool = False
    many: bool = False
    turns: bool = False

    @classmethod
    def of(cls, field: Field, tokenizer: Tokenizer) -> "Input":
        """A field of a pattern."""
        name, kind, many = field.name, field.kind, field.many
        found = takes(tokenizer)
        names, several = getattr(tokenizer, "names", ()), getattr(tokenizer, "several", False)
        if found == CLASS:
            return cls(name, kind, found, tuple(names), bool(several), many)
        return cls(name, kind, found, many=many, turns=isinstance(tokenizer, Composite) and tokenizer.said is not None)

    def json(self) -> dict[str, Any]:
        """The field, for `/v1/tasks`."""
        classes = {"classes": list(self.classes), "several": self.several} if self.takes == CLASS else {}
        many = {"list": True} if self.many else {}
        return {"field": self.name, "kind": self.kind, "takes": self.takes, **classes, **many}


@dataclass(frozen=True)
class TaskView:
    """A task as clients see it.

    task: its pattern.
    reads: the fields that it reads; for a pair, those of both sides.
    writes: the form of its answers; None: the task is a pair.
    token_by_token: whether answers are generated token by token, with options; otherwise in one forward pass.
    left: for a pair, the number of fields of the left side.
    """

    task: str
    reads: tuple[Input, ...]
    writes: str | None
    token_by_token: bool
    left: int = 0

    def side(self, side: str) -> tuple[Input, ...]:
        """The fields of one side of a pair, "left" or "right"."""
        return self.reads[: self.left] if side == "left" else self.reads[self.left :]


def task_views(model: Model) -> dict[str, TaskView]:
    """{pattern: task} of a model."""
    packer, found = model.packer, {}
    for task, pattern in packer.patterns.items():
        reads = tuple(Input.of(f, packer.tokenizers[f.kind]) for f in pattern.reads)
        writes = None if pattern.written is None else takes(packer.tokenizers[pattern.writes.kind])
        left = len(pattern.reads) - len(pattern.right) if pattern.pair else 0
        found[task] = TaskView(task, reads, writes, packer.heads[task].autoregressive, left)
    return found


def described(model: Model, name: str) -> list[dict[str, Any]]:
    """The tasks of a model as JSON, for `/v1/tasks`."""
    transcribes = {task: TranscriptionTask.of(model, task) for task in transcription_tasks(model)}
    timed = {task for task, spec in transcribes.items() if spec.ctc or spec.timing is not None}
    return [
        {
            "task": view.task,
            "model": name,
            "reads": [field.json() for field in view.reads],
            "writes": view.writes,
            "pair": view.writes is None,
            "token_by_token": view.token_by_token,
            "transcribes": view.task in transcribes,
            "word_times": view.task in timed,
        }
        for view in task_views(model).values()
    ]


def named_task(views: dict[str, TaskView], wanted: str) -> TaskView:
    """The task of this pattern; extra spaces do not matter.

    Raises:
        ApiError: 404, there is no such task.
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
    """The task of the pattern `wanted`, or the only task that fits.

    what: what a fitting task does, for errors, such as "writes text from one text".

    Raises:
        ApiError: no task or several tasks fit, or the named one does not.
    """
    if wanted is not None:
        view = named_task(views, wanted)
        if not fits(view):
            raise bad(f"task {view.task!r} does not fit: wanted a task that {what}", "task")
        return view
    fitting = [view for view in views.values() if fits(view)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = _listed(view.task for view in fitting)
        raise bad(
            f"several tasks of this model {what.replace('s ', ' ', 1)}; choose one with the parameter task: {several}",
            "task",
        )
    raise bad(f"this model has no task that {what}; it has {_listed(views)}", "model", "no_such_task")


def _listed(tasks: Iterable[str]) -> str:
    return ", ".join(map(repr, tasks))
