"""`demo`: a small model that adds a digit that is drawn and one that is said, and the page to try it on."""

import base64
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from multimodal.cli.output import check_folder
from multimodal.cli.serve import check_installed, listen, serve_folders

HOST = "127.0.0.1"
ABOUT = "Draw a digit and say another, from zero to nine: the model writes their sum."
STEPS = 420
EXACT, EXPECTED = "image audio -> text exact", 0.7  # the measure of held-out sums, and what STEPS steps exceed
TRIED = (("seven", "three"), ("two", "nine"), ("five", "zero"))  # pictures and sounds that the page offers together
EXAMPLES = "examples"  # the folder in that of the run; it is made last, when the model has learned all


def demo(
    *,
    folder: Path = Path("runs/demo"),
    port: int = 8000,
    steps: int = STEPS,
    browser: Annotated[bool, Parameter(help="Open the page in the browser of this machine.")] = True,
) -> int:
    """Draw a digit, say another, and see their sum: a small model on the page of `serve`.

    The first call trains the model, in some minutes on two cores; it needs no internet. Ctrl-C ends it, and the next call goes
    on from there.

    Example: multimodal demo

    Parameters
    ----------
    folder
        Where the model is, or is trained if there is none.
    port
        The port; 0 for one that is not in use.
    steps
        Steps of training, if it is trained.
    """
    check_folder(folder, "--folder")
    check_installed("demo")
    from multimodal.serve.settings import Settings

    if not (folder / EXAMPLES).is_dir():
        listen("demo", HOST, port).close()  # raises before minutes of training
        if not _train(folder, steps):
            return 130
    print(f"pictures and sounds to try, which it has not learned from: {folder / EXAMPLES}")
    settings = Settings(about=ABOUT, examples=_samples(folder / EXAMPLES))
    return serve_folders("demo", [("demo", folder)], settings, host=HOST, port=port, browser=browser)


def _train(folder: Path, steps: int) -> bool:
    """Train the model and write the examples; False: it was stopped."""
    from multimodal.demo import sums_job, write_examples

    print("reading the digits and the voices ...", flush=True)
    job = sums_job(steps)
    print(f"the model is trained first, once: {steps} steps, in some minutes; its data are made meanwhile", flush=True)
    run = job.run(folder, resume=True, go_on="give the same command again")
    if not run.finished:
        return False
    right = next((row[EXACT] for row in reversed(run.history) if EXACT in row), None)
    if right is not None and right < EXPECTED:
        print(
            f"multimodal: of unseen digits and unheard voices it adds {right:.0%} right, and after {STEPS} steps most are; it will "
            f"be wrong often. For another training, move {folder} away and leave --steps out",
            file=sys.stderr,
        )
    write_examples(folder / EXAMPLES)
    return True


def _samples(folder: Path) -> "tuple[dict[str, tuple[str, str]], ...]":
    """What the page offers to try, of the files that are there."""
    found = []
    for seen, heard in TRIED:
        files = {"image": (folder / f"{seen}.png", "image/png"), "audio": (folder / f"{heard}.wav", "audio/wav")}
        if all(path.is_file() for path, _ in files.values()):
            found.append(
                {
                    field: (path.name, f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")
                    for field, (path, kind) in files.items()
                }
            )
    return tuple(found)
