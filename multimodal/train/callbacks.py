"""Callbacks: objects that `fit` calls during a run, at its start and end, after each step and after each evaluation."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multimodal.data import Samples, as_samples
from multimodal.model import Model
from multimodal.process_state import preserved_state
from multimodal.shapes import ConfigError, check_whole
from multimodal.texts import shortened
from multimodal.train.recipe import Recipe

MOMENTS = ("on_start", "on_step", "on_evaluation", "on_end")
MOST_VALUES = 2**20  # of a histogram; of more, every n-th is taken


class CallbackError(RuntimeError):
    """A callback has raised an error, which is the cause of this one; the run has ended, and everything is saved."""


@dataclass
class View:
    """A run as its callbacks see it.

    model: the model in training, with the gradients of the step; in `on_evaluation` and `on_end` the one that was measured (with
        `ema` the averaged weights).
    recipe: the settings, with the steps that epochs are.
    folder: the run folder; None: there is none.
    quiet: whether nothing should be printed.
    step: the number of steps that are done.
    row: the last row of the log.
    finished: in `on_end`, whether the run has ended by itself.
    """

    model: Model
    recipe: Recipe
    folder: Path | None = None
    quiet: bool = False
    step: int = 0
    row: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    asked: str = ""
    trackers: list[Any] = field(default_factory=list, repr=False)

    def stop(self, why: str = "") -> None:
        """End the run after this step, or the first one (with several processes after the next one); it is then finished.

        why: what the run says about it.
        """
        self.asked = self.asked or why or "a callback asked for it"

    def histogram(self, name: str, values: Tensor) -> bool:
        """Give numbers to the trackers that draw histograms; whether there is one."""
        takers = [tracker.histogram for tracker in self.trackers if hasattr(tracker, "histogram")]
        for take in takers:
            take(name, values, self.step)
        return bool(takers)

    def text(self, name: str, text: str) -> bool:
        """Give a text to the trackers that show texts; whether there is one."""
        takers = [tracker.text for tracker in self.trackers if hasattr(tracker, "text")]
        for take in takers:
            take(name, text, self.step)
        return bool(takers)


class Callback:
    """Called during a run: `fit(..., callbacks=[MyCallback()])`. Override what you need.

    It is called in the first process only. If it raises an error, the run ends after this step, everything is saved, and
    `fit` raises a CallbackError with its name. What a resumed run has to know goes through `state_dict`.

    Examples:
        >>> class StopAt(mm.train.Callback):
        ...     def on_step(self, view):
        ...         if view.row["loss"] < 10:
        ...             view.stop("the loss is low")
        >>> run = mm.fit(model, {"image -> label": samples}, steps=5, batch=4, callbacks=[StopAt()], quiet=True)
        >>> run.finished, run.ended, run.history[-1]["step"]
        (True, 'the loss is low', 1)
    """

    def on_start(self, view: View) -> None:
        """Called before the first step, also of a resumed run."""

    def on_step(self, view: View) -> None:
        """Called after each step. `view.row` is its row of the log, with what was measured after this step."""

    def on_evaluation(self, view: View) -> None:
        """Called after held-out data were measured, and after `on_step` of the same step. At the end of a finished run `view.row`
        is a row of its own, without "loss"."""

    def on_end(self, view: View) -> None:
        """Called when the run has ended and everything is saved, also if it was stopped; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What is saved in each checkpoint, JSON values; {}: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; called before `on_start` of a resumed run."""


class RowTracker(Callback):
    """A callback that is called with each row of the log, a dict with "step".

    write: the function; a class may override `__call__` instead.
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], Any]) -> None:
        self.write = write

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.write(row)

    def on_step(self, view: View) -> None:
        self(view.row)

    def on_evaluation(self, view: View) -> None:
        if "loss" not in view.row:  # else `on_step` has written it
            self(view.row)


class Histograms(Callback):
    """Histograms of weights and gradients by part of the model, for trackers that draw them, such as TensorBoard.

    every: number of steps between them.
    """

    def __init__(self, every: int = 100) -> None:
        check_whole("Histograms", least=1, every=every)
        self.every = every

    def on_start(self, view: View) -> None:
        if not any(hasattr(tracker, "histogram") for tracker in view.trackers):
            raise ConfigError(
                "Histograms: no tracker of this run draws histograms; give one, such as TensorBoard(folder)"
            )
        if any(hasattr(p, "full_tensor") for p in view.model.parameters()):
            raise ConfigError(
                "Histograms: the weights are sharded (parallel='fsdp'), and one process has only a part of them"
            )

    def on_step(self, view: View) -> None:
        if view.step % self.every:
            return
        parts: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in view.model.named_parameters():
            parts.setdefault(part_of(name), []).append(parameter)
        for part, parameters in parts.items():
            view.histogram(f"weights/{part}", _some([p.detach() for p in parameters]))
            if gradients := [p.grad for p in parameters if p.grad is not None]:
                view.histogram(f"gradients/{part}", _some(gradients))


def part_of(name: str) -> str:
    """The part of a parameter: its kind, block of the core, or head."""
    first, *rest = name.split(".")
    if "blocks" in rest:
        return ".".join([first, *rest[: rest.index("blocks") + 2]])
    return f"{first}.{rest[0]}" if first in ("embeds", "readouts") and rest else first


def _some(tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    return flat[:: -(-len(flat) // MOST_VALUES)].cpu()


class Answers(Callback):
    """The answers to some held-out samples after each evaluation: printed, and given to trackers that show texts.

    task: the task. samples: a few samples, with what the task reads. most: the longest answer that is shown, in characters.
    """

    def __init__(self, task: str, samples: Samples, *, most: int = 200) -> None:
        self.task, self.most = task, most
        samples = as_samples(samples)
        self.samples = [samples[i] for i in range(len(samples))]
        if not self.samples:
            raise ConfigError("Answers: no samples were given")

    def on_start(self, view: View) -> None:
        view.model.packer.check_task(self.task, answers=True)

    @preserved_state()
    def on_evaluation(self, view: View) -> None:
        written = view.model.packer.patterns[self.task].answer
        lines = []
        for i, answer in enumerate(view.model.predict(self.task, self.samples)):
            line = f"{i}: {shortened(repr(answer.value), self.most)}"
            if self.samples[i].get(written) is not None:
                line += f" (wanted {shortened(repr(self.samples[i][written]), self.most)})"
            lines.append(line)
        view.text(f"answers/{self.task}", "\n".join(lines))
        if not view.quiet:
            print(
                "\n".join([f"step {view.step}, answers of {self.task}:", *(f"  {line}" for line in lines)]), flush=True
            )


def as_callbacks(trackers: Any, callbacks: Any) -> list[Callback]:
    """Trackers, that is functions of a row, and callbacks as one list of callbacks.

    Raises:
        ConfigError: something else.
    """
    found: list[Any] = []
    for name, given in (("trackers", trackers), ("callbacks", callbacks)):
        if not isinstance(given, Iterable) or isinstance(given, (str, bytes)):
            raise ConfigError(f"fit: {name} is {type(given).__name__}; give a list")
        for one in given:
            if isinstance(one, type):
                raise ConfigError(f"fit: {name} has the class {one.__name__}; give an object, {one.__name__}(..)")
            if isinstance(one, Callback) or any(callable(getattr(one, moment, None)) for moment in MOMENTS):
                found.append(one)
            elif name == "trackers" and callable(one):
                found.append(RowTracker(one))
            else:
                wanted = "trackers are called with each row of the log; give a list of functions"
                if name == "callbacks":
                    wanted = f"callbacks are objects with {', '.join(MOMENTS)}; a function of a row goes into trackers="
                raise ConfigError(f"fit: {wanted}")
    return found


class Callbacks:
    """The callbacks of a run: each is called until it raises an error, the first of which is noted.

    failed: (name of the callback, of its method, the error); None: there was none.
    """

    def __init__(self, callbacks: Sequence[Any], view: View) -> None:
        self.view, self.failed = view, None
        self.callbacks = list(callbacks)
        # what a function is attached to may draw histograms as well
        view.trackers = [*callbacks, *(one.write for one in callbacks if hasattr(one, "write"))]
        self.saved: list[Any] = []

    def call(self, moment: str, **values: Any) -> None:
        """Call a method of all callbacks, after putting these values into the view."""
        for name, value in values.items():
            setattr(self.view, name, value)
        for one in list(self.callbacks):
            method = getattr(one, moment, None)
            if method is not None:
                self._try(one, moment, lambda method=method: method(self.view))

    def state(self) -> list[dict[str, Any]]:
        """The states of all callbacks, as JSON values."""
        found = []
        for one in self.callbacks:
            state = self._try(one, "state_dict", lambda one=one: json.loads(json.dumps(one.state_dict())))
            if state:
                found.append({"name": _name(one), "state": state})
        return found

    def restore(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Give each callback its saved state: the first of a name the first one, and so on."""
        left = [(str(saved["name"]), saved["state"]) for saved in states]
        for one in self.callbacks:
            at = next((i for i, (name, _) in enumerate(left) if name == _name(one)), None)
            if at is not None:
                state = left.pop(at)[1]
                self._try(one, "load_state_dict", lambda one=one, state=state: one.load_state_dict(state))

    def raise_failed(self, saved: str) -> None:
        """Raise the noted error.

        Raises:
            CallbackError: there is one.
        """
        if self.failed is not None:
            name, moment, error = self.failed
            raise CallbackError(
                f"fit: the callback {name} failed in {moment} after step {self.view.step}: {type(error).__name__}: {error}{saved}"
            ) from error

    def _try(self, one: Any, moment: str, call: Callable[[], Any]) -> Any:
        if moment in ("state_dict", "load_state_dict") and not hasattr(one, moment):
            return None
        try:
            return call()
        except Exception as error:
            self.callbacks.remove(one)
            self.failed = self.failed or (_name(one), moment, error)
            return None


def _name(callback: Any) -> str:
    write = getattr(callback, "write", None)
    return str(getattr(write, "__name__", None) or type(callback if write is None else write).__name__)
