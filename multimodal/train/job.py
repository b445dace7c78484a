"""What a recipe file hands to `multimodal train`: a model, its data, and how to train it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from multimodal.data import Samples
from multimodal.declare import override
from multimodal.model import Model
from multimodal.shapes import ConfigError, did_you_mean
from multimodal.train.fit import STATE, Run, fit
from multimodal.train.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """The arguments of `fit`, as one thing."""

    model: Model
    data: Mapping[str, Samples]  # by task
    evaluation: Mapping[str, Samples] | None = None  # held out, by task
    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        wanted = {"model": Model, "data": Mapping, "evaluation": (Mapping, type(None)), "recipe": Recipe}
        for name, kind in wanted.items():
            if not isinstance(value := getattr(self, name), kind):
                what = "a Model" if name == "model" else "a Recipe" if name == "recipe" else "data sets by task"
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
        recipe = given.get("recipe", Recipe())
        if isinstance(recipe, Mapping):
            recipe = override(Recipe(), **recipe)
        return cls(**{**given, "recipe": recipe})

    def run(self, folder: Path, *, resume: bool = False) -> Run:
        """Train, keeping everything in `folder`.

        Raises:
            ConfigError: the folder holds a run already, and it was not said that this one goes on from there.
        """
        if not resume and (folder / STATE).exists():
            raise ConfigError(
                f"{folder} already holds a training run; go on with it (--resume), choose another folder (--folder), "
                "or delete it"
            )
        return fit(self.model, self.data, self.recipe, evaluation=self.evaluation, folder=folder, resume=resume)
