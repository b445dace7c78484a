"""Melodies as a kind of data for multimodal-stream."""

from melodies.kinds import Melody

__all__ = ["Melody"]
