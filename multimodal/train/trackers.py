"""Trackers: callbacks that write every row of the log somewhere."""

import atexit
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from multimodal.shapes import ConfigError
from multimodal.train.callbacks import RowTracker
from multimodal.train.display import is_held_out


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
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                group = "held out" if is_held_out(key) else "training"
                writer.add_scalar(f"{group}/{key}", value, step)

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

    def close(self) -> None:
        """Put everything on the disk."""
        if self._writer is not None:
            self._writer.close()
