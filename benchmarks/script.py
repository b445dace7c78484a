"""What the programs of this folder share: options, a model that is loaded or trained, and tables."""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "seed": {"type": int, "default": 0, "help": "of weights and data (default: 0)"},
    "seeds": {"type": int, "nargs": "+", "default": [0]},
    "folder": {"type": Path, "help": "the run: its checkpoints and its model"},
    "score": {"type": Path, "help": "score this trained model, and train none"},
    "steps": {"type": int, "help": "of training"},
    "write": {"action": "store_true", "help": "write the table to benchmarks/results"},
}


def parser(doc: str | None, *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with those of the common options that are named, and other defaults than theirs."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        found.add_argument(f"--{name}", **OPTIONS[name])
    found.set_defaults(**defaults)
    return found


def parsed(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as given; from here on PyTorch has one thread, so that CPU time does not depend on the machine."""
    import torch

    args = options.parse_args()
    torch.set_num_threads(1)
    return args


def random() -> Any:
    """A generator of NumPy that is seeded by PyTorch's, the one that a run repeats: for samples that change each time."""
    import numpy as np
    import torch

    return np.random.default_rng(int(torch.randint(2**31, ())))


@contextmanager
def cpu_time(what: str) -> Iterator[None]:
    """Prints the CPU-minutes of a block behind `what`."""
    start = time.process_time()
    yield
    print(f"{what} {(time.process_time() - start) / 60:.1f} CPU-minutes", flush=True)


def trained(
    args: argparse.Namespace, make: Callable[[], Any], data: Mapping[str, Any], recipe: Any, **more: Any
) -> Any:
    """The model of --score, or a new one that is trained in --folder, where a run that was stopped goes on.

    make: the new model. more: further options of `fit`. Prints the CPU-minutes and the number of parameters.
    """
    from multimodal import Model, fit

    if args.score:
        model = Model.load(args.score)
    else:
        model = make()
        with cpu_time("trained in"):
            fit(model, data, recipe, folder=args.folder, resume=True, seed=args.seed, **more)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, seed {args.seed}")
    return model


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, with a line end behind each line."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])


def compared(found: Mapping[str, Sequence[float]], ours: str) -> list[list[str]]:
    """Rows of a table: of each method its scores by seed and their mean; of `ours` also the points above the best other."""
    mean = {method: sum(right) / len(right) for method, right in found.items()}
    best = max(mean[method] for method in found if method != ours)
    return [
        [
            method,
            *(f"{x:.2%}" for x in right),
            f"{mean[method]:.2%}",
            f"{100 * (mean[method] - best):+.2f}" if method == ours else "",
        ]
        for method, right in found.items()
    ]
