"""The command line: `multimodal train | predict | generate | transcribe | look | check | verify`."""

from multimodal.cli.commands import app, main

__all__ = ["app", "main"]
