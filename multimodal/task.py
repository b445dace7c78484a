"""A task: a pattern, the head that answers it, and its weight in the loss."""

import math
from dataclasses import dataclass

from multimodal.heads import Head
from multimodal.old_names import moved
from multimodal.shapes import ConfigError


@dataclass(frozen=True)
class Task:
    """A pattern, the head that answers it, and its weight in the loss of several tasks.

    pattern: what is read and written, such as "image text -> text", or the two sides of a pair, "image <-> text".
    head: what answers it; None: the default of the written kind (see `default_head`), and `Contrast` for a pair.
    weight: factor of this task's mean loss in the sum over all tasks, 0 or more.

    Examples:
        >>> task = mm.Task("audio -> text", head=mm.CTC(), weight=0.5)
        >>> model = mm.Model({"audio": AudioFrames(), "text": TextBytes()}, mm.Core.tiny(), [task, "audio -> said:text"])
        >>> list(model.tasks)
        ['audio -> text', 'audio -> said:text']
    """

    pattern: str
    head: Head | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"task {self.pattern!r}: weight={self.weight} must be 0 or more")


__getattr__ = moved(__name__)  # goes with version 0.3
