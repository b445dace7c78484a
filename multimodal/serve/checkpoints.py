"""The models of a service by name, and how they are reloaded while requests run."""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from weakref import WeakSet

from multimodal.model import Model
from multimodal.serve.errors import ApiError
from multimodal.serve.logs import log
from multimodal.serve.scheduler import Scheduler
from multimodal.serve.settings import Settings
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.texts import shortened


class Checkpoint:
    """A model of a service.

    name: the name that clients use.
    load: makes the model, at the start and at each reload.
    created: when it was loaded, in seconds since 1970.

    Raises:
        The errors of `load`. ConfigError: the memory does not suffice for the rows.
    """

    def __init__(self, name: str, load: Callable[[], Model], settings: Settings) -> None:
        self.name, self.settings = name, settings
        self._load = load
        self._reloading = threading.Lock()
        self.scheduler = Scheduler(load().eval(), name, settings)
        self.created = int(time.time())
        self.retired: WeakSet[Scheduler] = WeakSet()  # old schedulers that finish their requests and are then freed

    def reload(self) -> None:
        """Reload the model. Open requests finish with the old model; if loading fails, the old model stays.

        Raises:
            ApiError: 409, a reload is running already. Otherwise the errors of `load`.
        """
        if not self._reloading.acquire(blocking=False):
            raise ApiError(409, f"a reload of model {self.name!r} is running already", code="reloading")
        try:
            new = Scheduler(self._load().eval(), self.name, self.settings)
            old, self.scheduler = self.scheduler, new
            self.created = int(time.time())
            self.retired.add(old)
            old.close()
        finally:
            self._reloading.release()
        log.info("reloaded", extra={"fields": {"model": self.name}})

    def close(self, patience_s: float) -> bool:
        """Finish open requests; returns False if this takes longer than `patience_s` seconds."""
        schedulers = (*self.retired, self.scheduler)
        for scheduler in schedulers:
            scheduler.close()
        until = time.monotonic() + patience_s
        for scheduler in schedulers:
            scheduler.thread.join(max(until - time.monotonic(), 0))
        return not any(scheduler.thread.is_alive() for scheduler in schedulers)


class Checkpoints:
    """The checkpoints of a service, by name.

    Raises:
        ConfigError: none, or two of one name.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self.by_name: dict[str, Checkpoint] = {}
        for checkpoint in checkpoints:
            if checkpoint.name in self.by_name:
                raise ConfigError(f"serve: two checkpoints are named {checkpoint.name!r}; name one as NAME=FOLDER")
            self.by_name[checkpoint.name] = checkpoint
        if not self.by_name:
            raise ConfigError("serve: give one checkpoint or more")

    def named(self, name: str | None, task: str | None = None) -> Checkpoint:
        """The checkpoint of this name; of None, the only one, or the only one that has this task.

        Raises:
            ApiError: there is none of this name, or none was named and there are several.
        """
        if name is None:
            words = None if task is None else task.split()
            found = [
                checkpoint
                for checkpoint in self.by_name.values()
                if words is None or any(words == other.split() for other in checkpoint.scheduler.model.tasks)
            ]
            if len(found) == 1 or len(self.by_name) == 1:
                return (found or list(self.by_name.values()))[0]
            listed = ", ".join(map(repr, self.by_name))
            raise ApiError(400, f"model: choose one of {listed}", param="model", code="missing_model")
        if name not in self.by_name:
            raise ApiError(
                404,
                f"there is no model {shortened(repr(name), 100)}; there are {', '.join(map(repr, self.by_name))}"
                f"{did_you_mean(name, self.by_name)}",
                param="model",
                code="model_not_found",
            )
        return self.by_name[name]


def named_folder(word: str) -> tuple[str, Path]:
    """Turn "runs/digits" or "digits=runs/digits" into ("digits", runs/digits); "runs/digits/model" gets the name "digits" too."""
    name, equals, folder = word.partition("=")
    if equals and name and "/" not in name:
        return name, Path(folder)
    path = Path(word)
    return (path.resolve().parent.name if path.resolve().name == "model" else path.resolve().name), path
