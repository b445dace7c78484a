"""The command line: `multimodal train | predict | generate | ..`; `multimodal --help` lists them."""

from multimodal.cli.commands import app, main

__all__ = ["app", "main"]
