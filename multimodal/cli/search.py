"""`search`: trains a recipe with many settings and says which are the best."""

import shlex
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from multimodal.cli.arguments import Json
from multimodal.cli.loading import import_recipe
from multimodal.cli.output import check_folder, print_json, printable, saved


def search(
    recipe: Path,
    /,
    *,
    ranges: Annotated[list[str], Parameter(name="--range", negative="")],
    measure: str,
    trials: int = 20,
    setting: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    folder: Path | None = None,
    no_prune: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    as_json: Json = False,
) -> int:
    """Train a Python file with many settings, chosen by Optuna, and print the best ones. A search that was stopped goes on when the
    same command is given again. Exit code 1: no trial has finished.

    Example: multimodal search digits.py --range lr=1e-4..1e-2:log --range core.depth=2,4,6 --measure "image -> label exact"

    Example: multimodal search digits.py --range optimizer=adamw,muon --measure "image -> label loss" --set evaluate_every=50

    Parameters
    ----------
    recipe
        The Python file, as of `multimodal train`, with held-out data.
    ranges
        A setting, named as by --set, and its values: lr=1e-4..1e-2 (numbers between), lr=1e-4..1e-2:log (on a logarithmic scale),
        core.depth=2,4,6 (one of these). Repeat it for more.
    measure
        The held-out measure to compare, such as "image -> label exact". One that ends in " loss" is made small, others large.
    trials
        Number of trials, those included that are done already.
    setting
        Change a setting in all trials, as of `multimodal train`: name=value. Repeat it for more.
    folder
        The folder of the search, with a run folder for each trial; runs/NAME-search for NAME.py unless given.
    no_prune
        Let every trial train to its end, also if it is worse than the others at the same step.
    seed
        Of the choices.
    """
    from multimodal.train.hyperparameters import search as find
    from multimodal.train.launch import STOPPED

    folder = folder or Path("runs", f"{recipe.stem}-search")
    check_folder(folder, "--folder")
    words = ["multimodal", "search", str(recipe), *(f"--range={text}" for text in ranges), "--measure", measure]
    words += [f"--set={text}" for text in setting or []] + ["--trials", str(trials), "--folder", str(folder)]
    words += ["--no-prune"] if no_prune else []
    words += ["--seed", str(seed)] if seed else []
    found = find(
        import_recipe(recipe),
        ranges,
        measure=measure,
        trials=trials,
        folder=folder,
        settings=setting or [],
        prune=not no_prune,
        seed=seed,
        quiet=as_json,
        where=f"recipe() of {recipe}",
        go_on=shlex.join(words),
    )
    if not found.finished:
        return STOPPED
    best = found.best
    picture = saved(".png", found.picture(), "search", folder) if best else None
    train = shlex.join(
        ["multimodal", "train", str(recipe), *(f"--set={s}" for s in [*(setting or []), *found.settings])]
    )
    if as_json:
        entries = {"measure": measure, "trials": [trial.to_json() for trial in found.trials]}
        entries |= {"best": best.number, "settings": found.settings, "train": train} if best else {"best": None}
        print_json(entries | {"picture": None if picture is None else str(picture)}, indent=2)
        return 0 if best else 1
    print(printable(f"\n{found.table()}\n"))
    if best is None:
        return 1
    print(f"picture {picture}\nbest    {best.folder}: {measure} {best.value:.4f}\ntrain   {printable(train)}")
    return 0
