"""Builds the data set of `fit` out of sources by task, and checks the held-out data."""

from collections.abc import Mapping
from typing import Any

from multimodal.data import Batches, Packs, Samples, Source, as_samples, check_samples, is_indexed, preserved_rng
from multimodal.model import Model
from multimodal.shapes import ConfigError
from multimodal.train.processes import Processes
from multimodal.train.recipe import Recipe


def make_dataset(
    model: Model,
    data: Mapping[str, Source],
    recipe: Recipe,
    mix: Mapping[str, float] | float | None,
    processes: Processes,
) -> Batches | Packs:
    """Batches of a fixed number of samples, or packs of a token budget, as the recipe says.

    Raises:
        ConfigError: no data, or data that do not fit the recipe.
    """
    if not data:
        raise ConfigError("fit: no data were given; give samples by task, as in {'image -> label': samples}")
    for pattern in data:
        each = recipe.look_ahead if recipe.tokens else recipe.batch // (recipe.accumulate * len(data))
        needed = model.packer.heads[pattern].smallest_batch if pattern in model.tasks else 1
        if needed > 1 and each < needed:
            raise ConfigError(
                f"fit: task {pattern!r} compares a pair with the others of its micro-batch, which would have {each}; "
                + ("raise look_ahead" if recipe.tokens else "raise batch, or lower accumulate")
            )
    # what both kinds of steps take
    common: dict[str, Any] = {
        "seed": recipe.seed,
        "mix": mix,
        "max_bad": recipe.max_bad,
        "rank": processes.data_rank,
        "ranks": processes.data_count,
    }
    if recipe.tokens:
        budget = {"tokens": recipe.tokens, "packs": recipe.packs, "look_ahead": recipe.look_ahead}
        return Packs(model.packer, data, **budget, **common)
    for pattern, source in data.items():
        if not is_indexed(source) and hasattr(source, "__iter__"):
            raise ConfigError(
                f"fit: the data of task {pattern!r} are {type(source).__name__}, which has no length and [index]; what can only be "
                "iterated is packed to a token budget: set tokens=4096"
            )
    return Batches(model.packer, data, batch=recipe.batch, accumulate=recipe.accumulate, **common)  # type: ignore[arg-type]


def check_evaluation(model: Model, evaluation: Mapping[str, Samples], recipe: Recipe) -> None:
    """Pack the first held-out sample of each task, and check the name of the measure `best`.

    Raises:
        ConfigError, TaskError, MediaError: held-out data or a name that cannot be used.
    """
    for pattern, samples in evaluation.items():
        samples = as_samples(samples)
        model.packer.check_task(pattern)
        check_samples("evaluation", pattern, samples)
        # one sample is packed now, so that a wrong declaration is an error before training, not after it
        with preserved_rng():
            model.packer([(pattern, samples[0])], names=["held-out sample 0"])
    known = {f"{pattern} {name}" for pattern in evaluation for name in model.packer.head(pattern).measures}
    if recipe.best and recipe.best not in known:
        raise ConfigError(
            f"fit: best={recipe.best!r} is no measure of the held-out data; "
            + (
                f"there are {', '.join(map(repr, sorted(known)))}"
                if known
                else "there are none: give some as evaluation="
            )
        )
