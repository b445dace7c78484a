"""What `replay` shows: which samples made a training step go wrong."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from multimodal.cli.loading import load
from multimodal.cli.options import Device, Json, Plugins
from multimodal.cli.showing import harmless, print_json
from multimodal.progress import progress_bar

if TYPE_CHECKING:
    from multimodal.train.spikes import ReplayRow

MOST_ROWS = 12


def replay(
    trouble: Path,
    /,
    *,
    rows: int = MOST_ROWS,
    as_json: Json = False,
    plugin: Plugins = None,
    device: Device = "auto",
) -> int:
    """Run a training step that went wrong again, sample by sample, and list the worst. Exit code 1: something is not finite.

    Example: multimodal replay runs/digits/trouble/step-0000123

    Parameters
    ----------
    trouble
        A folder that training kept, below RUN/trouble.
    rows
        How many samples to list; with --json all are.
    """
    from multimodal.shapes import ConfigError
    from multimodal.train import spikes

    if rows < 1:
        raise ConfigError(f"--rows {rows}: list one sample or more")
    found = spikes.load_spike(trouble)
    model = load(trouble, plugin, device, finite=False)  # weights that are not finite are to be found here
    count = sum(len(set(r.samples)) for batch in found.batches for r in batch.stream.readings.values())
    with progress_bar("replaying", count, quiet=as_json) as bar:
        done = spikes.replay(model, found, progress=bar.advance)
    if as_json:
        facts = {
            "step": found.step,
            "why": found.why,
            "batches": [row.to_json() for row in done.batches],
            "samples": [row.to_json() for row in done.samples],
            "weights": list(done.weights),
            "notes": list(done.notes),
        }
        print_json(facts)
    else:
        print(f"step {found.step}: {harmless(found.why)}\n")
        print(_table(done.batches) + "\n\n" + _table(done.samples[:rows]))
        if len(done.samples) > rows:
            print(f"{len(done.samples) - rows} more samples (--rows)")
        if done.weights:
            print(f"\nweights that were not finite before the step: {_few(done.weights)}")
        for note in done.notes:
            print(f"\nnote: {note}")
    return 0 if all(row.finite for row in (*done.batches, *done.samples)) and not done.weights else 1


def _table(rows: "tuple[ReplayRow, ...]") -> str:
    """Rows as text in columns; what is not finite says where it began."""
    lines = [
        ["micro-batch", "sample", "task", "tokens", "loss", "grad norm", "first not finite", "gradients not finite"]
    ]
    for row in rows:
        sample = "all" if row.sample is None else f"{row.sample} {row.name}".strip()
        where = [harmless(text) for text in (row.file, sample, row.task)]
        number = [f"{x:.4g}" if math.isfinite(x) else str(x) for x in (row.loss, row.norm)]
        lines.append([*where, str(row.tokens), *number, row.first or "", _few(row.parameters)])
    wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(size) if 3 <= i <= 5 else cell.ljust(size)
            for i, (cell, size) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in lines
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
