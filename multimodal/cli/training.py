"""`train` trains what a Python file describes; `report` compares what it left behind."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from multimodal.cli.loading import import_file
from multimodal.cli.showing import check_folder, harmless, print_json, saved

if TYPE_CHECKING:
    from multimodal.train import Run


def train(
    recipe: Path,
    /,
    *,
    setting: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
    folder: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    processes: int = 1,
    tensorboard: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train what a Python file describes, and save it. A run that was stopped goes on when the same command is given again.

    The file defines a function recipe() that returns multimodal.train.job.TrainingJob(model=..., data=..., evaluation=...,
    recipe=Recipe(...)), or a mapping with these names.

    Example: multimodal train digits.py --set steps=200 --set core.depth=8 --folder runs/digits

    Example: multimodal train digits.py --processes 4 --tensorboard

    Parameters
    ----------
    recipe
        The Python file.
    setting
        Change a setting: steps=200 (of the Recipe, or a parameter of recipe()), core.depth=8, tokenizers.image.patch=8,
        "tasks.image -> label.weight=2", "mix.image -> label=3", model.seed=1. Repeat it for more.
    folder
        Where the run is kept; runs/NAME for NAME.py unless given.
    resume
        Take a run that went to its end as it is, instead of refusing to train in its folder.
    processes
        So many on this machine, which train together. On several machines, each runs the command through torchrun.
    tensorboard
        Also write the log for TensorBoard, into the run's folder tensorboard.
    """
    folder = folder or Path("runs", recipe.stem)
    options = [str(recipe), *(f"--set={change}" for change in setting or []), "--folder", str(folder)]
    options += ["--tensorboard"] if tensorboard else []
    check_folder(folder, "--folder")
    from multimodal.train.launch import LAUNCHED, end_with_launcher, launch

    if processes != 1 and LAUNCHED not in os.environ:
        command = [sys.executable, "-P", "-m", "multimodal", "train", *options, *(["--resume"] if resume else [])]
        return launch(command, processes)
    end_with_launcher()
    return _train(recipe, setting or [], folder, resume, options, tensorboard)


def _train(recipe: Path, setting: list[str], folder: Path, resume: bool, options: list[str], tensorboard: bool) -> int:
    from multimodal.shapes import ConfigError, did_you_mean
    from multimodal.train.launch import LAUNCHED, STOPPED
    from multimodal.train.run_folder import BOARD
    from multimodal.train.settings import make_job
    from multimodal.train.trackers import TensorBoard

    module = import_file(recipe)
    make = getattr(module, "recipe", None)
    if not callable(make):
        raise ConfigError(f"{recipe} defines no function recipe(){did_you_mean('recipe', vars(module))}")
    job = make_job(make, setting, f"recipe() of {recipe}")
    board = TensorBoard(folder / BOARD) if tensorboard else None
    count = int(os.environ.get("WORLD_SIZE", "1"))
    many = ["--processes", str(count)] if count > 1 else []
    command = shlex.join(["multimodal", "train", *options, *many, "--resume"])
    by_torchrun = count > 1 and LAUNCHED not in os.environ
    try:
        run = job.run(
            folder,
            resume=resume,
            trackers=[board] if board else [],
            go_on="the same torchrun command" if by_torchrun else command,
        )
    finally:
        if board:
            board.close()
    if run.finished and os.environ.get("RANK", "0") == "0":  # only the first process prints
        _show(run, folder, tensorboard)
    return 0 if run.finished else STOPPED


def _show(run: "Run", folder: Path, tensorboard: bool) -> None:
    """Where everything is, and how good it is."""
    from multimodal.train.run_folder import BEST, BOARD, BROKEN, CURVES, LOG, MODEL

    print(f"model   {folder / MODEL}")
    if (folder / BEST).is_dir():
        print(f"best    {folder / BEST}")
    print(f"curves  {folder / CURVES}\nlog     {folder / LOG}")
    if tensorboard:
        print(f"board   tensorboard --logdir {folder / BOARD}")
    if run.bad:
        print(f"broken  {folder / BROKEN}: {len(run.bad)} samples were left out")
    print(f"loss    {run.last('loss'):.4f}")
    for name, value in run.history[-1].items():
        if name.endswith(" exact"):
            print(f"{100 * value:.1f} % exactly right on held-out data: {name.removesuffix(' exact')}")
        elif " R@" in name:
            print(f"{100 * value:.1f} % of held-out pairs: {name}")


def report(
    runs: list[Path],
    /,
    *,
    out: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")] = False,
) -> int:
    """Compare training runs: their curves in one picture, a table of results, and the settings in which they differ.

    Example: multimodal report runs/small runs/large

    Example: multimodal report runs --out comparison.png

    Parameters
    ----------
    runs
        Run folders, or folders with run folders in them.
    out
        The picture; unless given, report.png in the first of the folders. No file is overwritten: the next gets a number.
    """
    import io

    from multimodal.shapes import ConfigError
    from multimodal.train.compare import differences, draw, read_runs, table

    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: wanted the name of a picture that ends in .png")
    records = read_runs(runs)
    picture = io.BytesIO()
    draw(records, picture)
    out = runs[0] / "report.png" if out is None else out
    out = saved(out.suffix, picture.getvalue(), out.stem, out.parent)
    if as_json:
        facts = {"runs": [r.to_json() for r in records], "differences": differences(records), "picture": str(out)}
        print_json(facts, indent=2)
    else:
        print(harmless(f"{table(records)}\n\npicture  {out}"))
    return 0
