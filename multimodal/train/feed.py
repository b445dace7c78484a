"""What `fit` is given, checked, and turned into steps."""

from collections.abc import Mapping
from typing import Any

from multimodal.data import Batches, Packs, Samples, Source, check_samples, is_indexed, kept_generators
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.train.processes import Processes
from multimodal.train.recipe import Recipe


def make_feed(
    model: Model,
    data: Mapping[str, Source],
    recipe: Recipe,
    mix: Mapping[str, float] | float | None,
    processes: Processes,
) -> Batches | Packs:
    if not data:
        raise ConfigError("fit: no data were given; give samples by task, as in {'image -> label': samples}")
    rest: dict[str, Any] = {
        "seed": recipe.seed,
        "mix": mix,
        "forgiving": recipe.max_bad > 0,
        "rank": processes.rank,
        "ranks": processes.count,
    }
    if recipe.tokens:
        room = {"tokens": recipe.tokens, "packs": recipe.packs, "look_ahead": recipe.look_ahead}
        return Packs(model.packer, data, **room, **rest)
    for pattern, source in data.items():
        if not is_indexed(source) and hasattr(source, "__iter__"):
            raise ConfigError(
                f"fit: the data of task {pattern!r} are {type(source).__name__}, which has no length and [index]; what can only be "
                "iterated is packed to a token budget: set tokens=4096"
            )
    return Batches(model.packer, data, batch=recipe.batch, accumulate=recipe.accumulate, **rest)  # type: ignore[arg-type]


def size(source: Any) -> int | None:
    return len(source) if is_indexed(source) else None


def check_evaluation(model: Model, evaluation: Mapping[str, Samples], recipe: Recipe) -> None:
    for pattern, samples in evaluation.items():
        model.packer.check_task(pattern)
        check_samples("evaluation", pattern, samples)
        with kept_generators():
            model.packer([(pattern, samples[0])], names=["held-out sample 0"])
    if recipe.best and not any(recipe.best.startswith(f"{pattern} ") for pattern in evaluation):
        raise ConfigError(
            f"fit: best={recipe.best!r} is no measure of the held-out data; it is a task of them and what is measured, as in "
            f"{next(iter(evaluation), 'image -> label')!r} + ' exact'"
        )
