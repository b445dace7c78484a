"""Data and model of `multimodal demo`, which adds a drawn digit and a spoken one, and writes the sum in words."""

from multimodal.demo.digits import DIGITS, RATE_HZ, Clip, disturbed, scanned_digits, spoken_words
from multimodal.demo.sums import ADD, HEAR, SEE, DigitSamples, sums_job, sums_model, write_examples

__all__ = [
    "ADD",
    "DIGITS",
    "HEAR",
    "RATE_HZ",
    "SEE",
    "Clip",
    "DigitSamples",
    "disturbed",
    "scanned_digits",
    "spoken_words",
    "sums_job",
    "sums_model",
    "write_examples",
]
