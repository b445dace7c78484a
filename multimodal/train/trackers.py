"""Trackers: functions that `fit` calls with every row of the log, a dict."""

import atexit
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multimodal.shapes import ConfigError
from multimodal.train.display import is_held_out


class TensorBoard:
    """Writes every number of every row for TensorBoard: `fit(..., trackers=[TensorBoard("runs/digits/tensorboard")])`.

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
        if self._writer is None:
            self._writer = self._make(self._folder, purge_step=step, flush_secs=10)
            atexit.register(self.close)
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                group = "held out" if is_held_out(key) else "training"
                self._writer.add_scalar(f"{group}/{key}", value, step)

    def close(self) -> None:
        """Put everything on the disk."""
        if self._writer is not None:
            self._writer.close()
