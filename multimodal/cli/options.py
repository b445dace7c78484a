"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Plugins = Annotated[
    list[Path] | None,
    Parameter(
        name="--plugin",
        negative="",
        help="A Python file that defines a tokenizer or head of the checkpoint. It is imported, not run as a script. "
        "Repeat it for more files.",
    ),
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON instead of text.")]
Device = Annotated[str, Parameter(help="cpu, cuda, ... or auto.")]
Out = Annotated[
    Path | None,
    Parameter(
        help="The folder for pictures and sounds that are written; the run's unless given. With it texts are files too. "
        "No file is overwritten: the next gets a number."
    ),
]
Fields = Annotated[
    list[str],
    Parameter(
        negative="",
        help="A field that the task reads, by its name: --image cat.png, --text 'a cat'. Pictures and sound are files; "
        "arrays are .npy or .json files, or JSON. Several values are several samples: --image cats/*.jpg. "
        "A value that begins like an option is written --text='--no'. A field that has the name of an option is given as "
        "--field-NAME.",
    ),
]
Without = Annotated[
    list[str] | None,
    Parameter(
        negative="", help="A field that the task reads and this sample lacks: --without image. Repeat it for more."
    ),
]
TAKEN = {
    *("answer", "as_json", "begin", "beams", "checkpoint", "count", "debug", "device", "guidance", "help", "json"),
    *("length_penalty", "max_tokens", "min_p", "no_repeat", "one_of", "only", "out", "plugin", "repetition", "seed"),
    *("stop", "task", "temperature", "top_k", "top_p", "version", "without", "writing"),
}
"""Names of options; a field of the same name is given with FIELD before it."""
FIELD = "field_"
