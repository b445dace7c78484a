"""The command line: `multimodal train | predict | generate | transcribe | check | verify`."""

from multimodal.cli.commands import app, main

__all__ = ["app", "main"]
