"""Mean and standard deviation of numbers that tokens hold in float32, in deviations from the mean."""

import math

import numpy as np

from multimodal.shapes import ConfigError

LOOKED_AT = 10_000  # of more different numbers, so many by their order


def mean_and_std(numbers: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation; 1 for the deviation of equal numbers, which rounding may make one that is not quite 0."""
    if numbers.min() == numbers.max():
        return float(numbers.min()), 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(numbers.mean()), float(numbers.std())
    return mean, std if not std <= 1e-12 * float(np.abs(numbers).max()) else 1.0


def far_apart(numbers: np.ndarray, mean: float, std: float) -> bool:
    """Whether a few numbers are so far away that most others, which differ, are one in float32 once they are scaled."""
    if not math.isfinite(mean) or not math.isfinite(std):
        return True
    different = np.unique(numbers)
    different = different[:: len(different) // LOOKED_AT + 1]
    return 2 * len(np.unique(scaled(different, mean, std))) <= len(different) > 1


def scaled(numbers: np.ndarray, mean: float, std: float) -> np.ndarray:
    """The numbers as a token holds them; what float32 cannot hold is infinite."""
    with np.errstate(over="ignore"):
        return ((numbers - mean) / std).astype(np.float32)


def scale_of(where: str, numbers: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation.

    Raises:
        ConfigError: a few numbers are so far away that tokens would not tell the others apart.
    """
    mean, std = mean_and_std(numbers)
    check_near(where, numbers, mean, std)
    return mean, std


def check_near(where: str, numbers: np.ndarray, mean: float, std: float) -> None:
    """Raise a ConfigError where most different numbers would be one in float32."""
    if far_apart(numbers, mean, std):
        raise ConfigError(
            f"{where}: a few numbers are so far from the others, in all {numbers.min():.6g} to {numbers.max():.6g}, that float32 "
            "cannot tell the others apart; replace those that stand for missing values, or scale the numbers first"
        )
