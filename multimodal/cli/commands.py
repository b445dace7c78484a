"""The list of commands, and `main`, which runs one and turns its errors into messages and an exit code.

A command is a function: its docstring is its help, its parameters are its options. Everything heavy is imported inside of them, so
that help comes at once.
"""

import sys
import traceback
from collections.abc import Sequence

from cyclopts import App

from multimodal.cli import console
from multimodal.cli.answers import generate, predict
from multimodal.cli.arguments import joined
from multimodal.cli.checks import bench, check, look, verify
from multimodal.cli.demo import demo
from multimodal.cli.evaluate import evaluate
from multimodal.cli.export import export
from multimodal.cli.hub import push
from multimodal.cli.pretrained import pretrained
from multimodal.cli.quantize import quantize
from multimodal.cli.search import search
from multimodal.cli.serve import serve
from multimodal.cli.shards import shards
from multimodal.cli.train import plan, replay, report, train
from multimodal.cli.transcribe import transcribe


def _version() -> str:
    from multimodal.versions import package_version

    return package_version()


app = App(
    name="multimodal",
    version=_version,
    suppress_keyboard_interrupt=False,
    help="Models that read and write many kinds of data.\n\n"
    "Every command explains itself: multimodal train --help. With --debug, an error shows where in the code it came from.",
)

COMMANDS = (
    *(train, report, replay, shards, plan, bench, evaluate, predict, generate, transcribe, serve, check, verify, look),
    *(pretrained, export, push, quantize, demo, search),
)
for command in COMMANDS:
    app.command(command)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: a check that was asked for failed, or one file of several. 2: something the user can put right, with one message
    on stderr. 70: a bug, in one line. 130: stopped by Ctrl-C. 141: the reader of the output has ended.
    """
    tokens = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        with console.prepared():
            code = app(joined(app, tokens), exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
            return code or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _failed(error, debug)


def _failed(error: Exception, debug: bool) -> int:
    """Report an error; returns the exit code."""
    if isinstance(error, OSError) and sys.stdout is not None and (output := console.output_error()) is not None:
        if isinstance(output, BrokenPipeError):  # as of `head`
            return 141  # 128 + SIGPIPE, as shells count it
        error = OSError(f"standard output: {output.strerror}; what should be shown there is lost")
    message = console.message_of(error)
    if debug:
        traceback.print_exc()
    elif message is None:
        console.report_bug(error)
    else:
        console.say(message)
    return 70 if message is None else 2  # 70: EX_SOFTWARE
