"""The job that a recipe file returns to `multimodal train`: a model, its data, and the settings of training."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from multimodal.data import Samples, Source
from multimodal.declare import override
from multimodal.model import Model
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.train.loop import Run, Tracker, fit
from multimodal.train.recipe import Recipe
from multimodal.train.run_report import Record


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """The arguments of `fit` as one object.

    model: what is trained.
    data: the source of the samples of each task.
    evaluation: held-out samples of each task; None: nothing is evaluated.
    mix: shares of the tasks, or a temperature, as `fit` takes it; None: by their sizes.
    recipe: the settings of training.
    callbacks: objects that are called in the run, see `multimodal.train.Callback`.
    """

    model: Model
    data: Mapping[str, Source]
    evaluation: Mapping[str, Samples] | None = None
    mix: Mapping[str, float] | float | None = None
    recipe: Recipe = field(default_factory=Recipe)
    callbacks: Sequence[Any] = ()

    def __post_init__(self) -> None:
        wanted = {
            "model": (Model, "a Model"),
            "data": (Mapping, "data sets by task"),
            "evaluation": ((Mapping, type(None)), "data sets by task"),
            "mix": ((Mapping, int, float, type(None)), "shares by task or a temperature"),
            "recipe": (Recipe, "a Recipe"),
            "callbacks": ((list, tuple), "a list of callbacks"),
        }
        for name, (kind, what) in wanted.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ConfigError(f"TrainingJob: {name} is {type(value).__name__}, wanted {what}")

    @classmethod
    def of(cls, given: Any, where: str) -> Self:
        """A job from a job, or from a mapping of its fields, whose "recipe" may be a mapping of settings.

        Raises:
            ConfigError: something else, a field or setting that does not exist, or one that is missing.
        """
        if isinstance(given, cls):
            return given
        known = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"{where} returned {type(given).__name__}; wanted a TrainingJob or a mapping with {', '.join(known)}"
            )
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"{where} returned an unknown {name!r}; known are {', '.join(known)}{did_you_mean(str(name), known)}"
                )
        for name in ("model", "data"):
            if name not in given:
                raise ConfigError(f"{where} returned no {name!r}; it returned {', '.join(given) or 'nothing'}")
        # a recipe file may give only the settings that differ from the defaults
        recipe = given.get("recipe", Recipe())
        if isinstance(recipe, Mapping):
            recipe = override(Recipe(), **recipe)
        return cls(**{**given, "recipe": recipe})

    def run(
        self,
        folder: Path,
        *,
        resume: bool = False,
        trackers: Sequence[Tracker] = (),
        quiet: bool = False,
        go_on: str | None = None,
    ) -> Run:
        """Train and save everything in `folder`; an unfinished run of the same configuration there is resumed.

        resume: a finished run there is no error, and nothing is trained. go_on: as of `fit`.

        Raises:
            ConfigError: the folder holds a finished run. CheckpointError: it holds one of another configuration.
        """
        found = Record.read(folder)
        if found.finished and not resume:
            raise ConfigError(
                f"{folder} holds a training run that went to its end; choose another folder (--folder), or delete it "
                "(--resume takes it as it is)"
            )
        return fit(
            self.model,
            self.data,
            self.recipe,
            evaluation=self.evaluation,
            mix=self.mix,
            folder=folder,
            resume=found.step is not None,
            trackers=trackers,
            callbacks=self.callbacks,
            quiet=quiet,
            go_on=go_on or "run the same job with the same folder",
        )
