"""Trackers: callbacks that write every row of the log somewhere."""

import atexit
import html
import importlib
import json
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from multimodal.declare import plain
from multimodal.files import read_json, write_atomic
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.train.callbacks import RowTracker, View
from multimodal.train.display import is_held_out
from multimodal.train.run_folder import BOARD, REMOTE


class TensorBoard(RowTracker):
    """Writes every number of every row for TensorBoard: `fit(..., trackers=[TensorBoard("runs/digits/tensorboard")])`.

    It also takes histograms and texts of callbacks.

    A resumed run writes to the same folder: steps that are repeated replace those that were there.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"TensorBoard: {error}; pip install tensorboard, or pip install 'multimodal-stream[tensorboard]'"
            ) from error
        self._make = SummaryWriter
        self._folder = str(folder)
        self._writer: Any = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        writer = self._opened(step)
        for name, value in numbers_of(row).items():
            writer.add_scalar(name, value, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Draw numbers; those that are not finite are left out, as TensorBoard has no place for them."""
        finite = values[values.isfinite()]
        if len(finite):
            self._opened(step).add_histogram(name, finite, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text as it is."""
        self._opened(step).add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def _opened(self, step: int) -> Any:
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step, flush_secs=10)
            atexit.register(self.close)
        return self._writer

    def on_end(self, view: View) -> None:
        """Put everything on the disk."""
        self.close()

    def close(self) -> None:
        """Put everything on the disk."""
        if self._writer is not None:
            self._writer.close()  # what is written after it opens it again


class Service(RowTracker):
    """A service that shows runs: one run there for each run folder, which goes on when the run is resumed.

    project: the name of the group of runs there. name: of the run; None: that of its folder.
    """

    package: ClassVar[str]

    def __init__(self, project: str = "multimodal", name: str | None = None, **options: Any) -> None:
        for what, value in (("project", project), ("name", name)):
            if not isinstance(value, str) and not (what == "name" and value is None):
                raise ConfigError(f"{type(self).__name__}: {what} is {type(value).__name__}, wanted a text")
        self.project, self.name, self.options = project, name, options
        self.library = self._imported()
        self._run: Any = None

    def _imported(self) -> Any:
        try:
            return importlib.import_module(self.package)
        except ImportError as error:
            raise ConfigError(f"{type(self).__name__}: {error}; pip install {self.package}") from error

    def on_start(self, view: View) -> None:
        """Begin a run there, or go on with the one of this run folder."""
        path = None if view.folder is None else view.folder / REMOTE
        known = {} if path is None or not path.is_file() else read_json(path, ValueError)
        mine = known.get(self.package) if isinstance(known, dict) else None
        name = self.name or (view.folder.resolve().name if view.folder is not None else None)
        parameters = sum(p.numel() for p in view.model.parameters())
        config = {"parameters": parameters, "recipe": plain(view.recipe.config())}
        found = self._open(mine if isinstance(mine, str) else None, name, config)
        if path is not None and mine != found:
            write_atomic(path, json.dumps({**known, self.package: found}, indent=1) + "\n")

    def __call__(self, row: Mapping[str, Any]) -> None:
        if self._run is None:
            self._open(None, self.name, {})
        self._write(numbers_of(row), row["step"])

    def on_end(self, view: View) -> None:
        """End the run there."""
        self.close(view.finished)

    def _open(self, known: str | None, name: str | None, config: dict[str, Any]) -> str:
        """Begin a run, or go on with a known one; returns by what it is found again."""
        raise NotImplementedError

    def _write(self, numbers: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def close(self, finished: bool = True) -> None:
        """End the run, with everything sent."""
        raise NotImplementedError


class WandB(Service):
    """Writes every row to Weights & Biases: `fit(..., trackers=[WandB("digits")])`. It needs `pip install wandb`.

    project: as there. name: of the run; None: that of the run folder. options: of `wandb.init`, such as mode="offline".

    Raises:
        ConfigError: the package wandb is not installed.
    """

    package = "wandb"

    def _open(self, known: str | None, name: str | None, config: dict[str, Any]) -> str:
        given = {"project": self.project, "name": name, "config": config, "id": known, "resume": "allow"}
        self._run = self.library.init(**{**given, **self.options})
        return str(self._run.id)

    def _write(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)  # a step that is there already, after a resume, is left as it is

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Draw numbers; those that are not finite are left out."""
        finite = values[values.isfinite()].numpy()
        if len(finite):
            self._run.log({name: self.library.Histogram(finite)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text as it is."""
        self._run.log({name: self.library.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self, finished: bool = True) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class MLflow(Service):
    """Writes every row to MLflow: `fit(..., trackers=[MLflow("digits")])`. It needs `pip install mlflow` or `mlflow-skinny`.

    project: the experiment. name: of the run; None: that of the run folder. uri: of the server or store; None: as MLflow is set up,
    which reads MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: the package mlflow is not installed.
    """

    package = "mlflow"

    def __init__(self, project: str = "multimodal", name: str | None = None, *, uri: str | None = None) -> None:
        super().__init__(project, name)
        self.uri = uri
        self._client: Any = None

    def _open(self, known: str | None, name: str | None, config: dict[str, Any]) -> str:
        self._client = self.library.MlflowClient(self.uri)
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run = known
            return known
        experiment = self._client.get_experiment_by_name(self.project)
        number = self._client.create_experiment(self.project) if experiment is None else experiment.experiment_id
        self._run = self._client.create_run(number, run_name=name).info.run_id
        for key, value in config.pop("recipe", {}).items():
            self._client.log_param(self._run, key, str(value)[:500])
        for key, value in config.items():
            self._client.log_param(self._run, key, value)
        return self._run

    def _write(self, numbers: dict[str, float], step: int) -> None:
        now = round(time.time() * 1000)
        metric = self.library.entities.Metric
        self._client.log_batch(self._run, [metric(_plain_name(k), v, now, step) for k, v in numbers.items()])

    def text(self, name: str, text: str, step: int) -> None:
        """Save a text as an artifact."""
        self._client.log_text(self._run, text, f"{_plain_name(name)}/step-{step}.txt")

    def close(self, finished: bool = True) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
            self._run = None


class Trackio(Service):
    """Writes every row to Trackio, which is shown by `trackio show`: `fit(..., trackers=[Trackio("digits")])`.

    It needs `pip install trackio`.

    project: as there. name: of the run; None: that of the run folder. options: of `trackio.init`, such as space_id="me/space".

    Raises:
        ConfigError: the package trackio is not installed.
    """

    package = "trackio"

    def _open(self, known: str | None, name: str | None, config: dict[str, Any]) -> str:
        # a run is found by its name there, so a new one may not have that of another
        name = known or f"{name or 'run'}-{uuid.uuid4().hex[:6]}"
        given = {"project": self.project, "name": name, "config": config, "resume": "allow", "embed": False}
        self._run = self.library.init(**{**given, **self.options})
        return name

    def _write(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Draw numbers; those that are not finite are left out."""
        finite = values[values.isfinite()].numpy()
        if len(finite):
            self._run.log({name: self.library.Histogram(finite)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text."""
        self._run.log({name: self.library.Markdown(text)}, step=step)

    def close(self, finished: bool = True) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


SERVICES = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def make_tracker(typed: str, folder: Path) -> RowTracker:
    """The tracker of a name on the command line: "tensorboard", "wandb", "mlflow", "trackio", or with a project "wandb:digits".

    folder: of the run.

    Raises:
        ConfigError: another name, or a package that is not installed.
    """
    name, _, project = typed.partition(":")
    known = ["tensorboard", *SERVICES]
    if name == "tensorboard" and not project:
        return TensorBoard(folder / BOARD)
    if name not in SERVICES:
        raise ConfigError(
            f"--track {typed}: wanted one of {', '.join(known)}, all but the first also with a project, wandb:digits"
            f"{did_you_mean(name, known)}"
        )
    return SERVICES[name](project) if project else SERVICES[name]()


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by names for a tracker: "training/loss", "held out/image -> label exact"."""
    return {
        f"{'held out' if is_held_out(key) else 'training'}/{key}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, (int, float))
    }


def _plain_name(name: str) -> str:
    """A name in the characters that MLflow takes."""
    return re.sub(r"[^/\w.\- :]", "_", name.replace("<->", "and").replace("->", "to"))
