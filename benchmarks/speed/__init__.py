"""Ours beside what people would pick instead, on the same work in the same run: `uv run multimodal bench`."""
