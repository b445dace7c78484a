"""Proof on the user's own model that packing, batching and caching change nothing, and values to prove it with."""

from multimodal.verify.checks import CHECKS, Row, Verification, verify
from multimodal.verify.values import plausible_values

__all__ = ["CHECKS", "Row", "Verification", "plausible_values", "verify"]
