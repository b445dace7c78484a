"""Where a model looked, and pictures of its answers."""

from multimodal.look.answers import draw_answers, looked_at

__all__ = ["draw_answers", "looked_at"]
