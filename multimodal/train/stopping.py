"""The best evaluation of a run so far, and whether the run should end because no better one comes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multimodal.train.recipe import Recipe

LOSS = "held-out loss"  # its name where no measure is asked for


@dataclass(kw_only=True)
class BestSoFar:
    """The best value of one measure, and how many evaluations have not been better.

    measure: its name; "": the mean of the held-out losses of all tasks.
    patience: the run ends after so many evaluations without a better value; 0: never.
    value: the best value; None: there is none yet.
    step: where it was measured.
    row: everything that was measured there.
    waited: the number of evaluations since then.
    """

    measure: str = ""
    patience: int = 0
    value: float | None = None
    step: int = 0
    row: dict[str, float] = field(default_factory=dict)
    waited: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> "BestSoFar | None":
        """What a recipe asks for; None: neither `best` nor `patience`."""
        return cls(measure=recipe.best, patience=recipe.patience) if recipe.best or recipe.patience else None

    @property
    def name(self) -> str:
        return self.measure or LOSS

    @property
    def worn_out(self) -> bool:
        """Whether the run should end."""
        return 0 < self.patience <= self.waited

    def of_row(self, row: Mapping[str, float], patterns: Iterable[str]) -> float | None:
        """The value of the measure in a row of held-out measures; None: it is not there."""
        if self.measure:
            return row.get(self.measure)
        losses = [row[f"{pattern} loss"] for pattern in patterns]
        return sum(losses) / len(losses)

    def is_better(self, value: float) -> bool:
        """Whether a value is better than the best so far; one that is not a number never is."""
        if math.isnan(value):
            return False
        less = not self.measure or self.measure.endswith(" loss")
        return self.value is None or (value < self.value if less else value > self.value)

    def take(self, value: float, step: int, row: Mapping[str, float]) -> None:
        """Note a new best value."""
        self.value, self.step, self.row, self.waited = value, step, dict(row), 0

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"measure": self.measure, "step": self.step, "row": self.row, "waited": self.waited}

    def load_state_dict(self, value: Any, state: Mapping[str, Any] | None) -> None:
        """Go on from a saved best value and state. A state of another measure is ignored; an old version saved the value only.

        Raises:
            TypeError, ValueError, LookupError, AttributeError: they are of other types.
        """
        if state is None:
            self.value = None if value is None else float(value)
        elif state["measure"] == self.measure:
            self.value = None if value is None else float(value)
            self.step, self.waited = int(state["step"]), int(state["waited"])
            self.row = {str(key): float(number) for key, number in state["row"].items()}
