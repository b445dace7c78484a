"""`push` puts a checkpoint with a model card on the Hugging Face hub."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from multimodal.cli.arguments import Json, Plugins
from multimodal.cli.loading import load, model_folder, text_of
from multimodal.cli.output import print_json, printable


def push(
    checkpoint: Path,
    name: str,
    /,
    *,
    private: bool | None = None,
    message: str | None = None,
    revision: str | None = None,
    license: str | None = None,
    dataset: Annotated[list[str] | None, Parameter(negative="")] = None,
    limits: str = "",
    token_file: Path | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    as_json: Json = False,
    plugin: Plugins = None,
) -> int:
    """Push a model with a card to the Hugging Face hub: config.json, safetensors, the tokenizers' files and README.md, no others.

    The card says what the model does, how it was trained, the figures of its run, and how to use it. Afterwards every command
    takes NAME in the place of CHECKPOINT.

    Example: multimodal push runs/digits ann/digits --dry-run

    Example: multimodal push runs/digits ann/digits --no-private --license apache-2.0

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or another name on the hub.
    name
        OWNER/MODEL on the hub; without OWNER/ it is that of the token.
    private
        Who sees a new repository: only its owner, unless it is --no-private. One that is there stays as it is.
    message
        The message of the commit.
    revision
        A branch, which is made if it is not there.
    license
        The license for the card, as the hub writes it: apache-2.0.
    dataset
        A data set of the hub that it was trained on, for the card. Repeat it for more.
    limits
        For the card, what the model is not for, and where it is known to fail.
    token_file
        A text file with the token; without it, the one of `hf auth login` or of the variable HF_TOKEN.
    overwrite
        Replace another model that has this name, or a card that was changed on the hub; its history keeps them.
    dry_run
        Show the files and the card; nothing is sent.
    """
    from multimodal.card import card
    from multimodal.hub import full_name
    from multimodal.publish import files_of, push_files, run_of

    token = None if token_file is None else _token(token_file)
    name = full_name(name, token)
    folder = model_folder(checkpoint)
    run, best = run_of(folder)
    model = load(folder, plugin, "cpu")
    text = card(model, name, run=run, best=best, license=license, datasets=dataset or (), limits=limits)
    files = files_of(folder, text)
    if dry_run:
        sizes = {file: len(data) if isinstance(data, bytes) else data.stat().st_size for file, data in files.items()}
        if as_json:
            print_json({"name": name, "files": sizes, "card": text}, indent=2)
        else:
            print(printable(text))
            for file, size in sizes.items():
                print(f"{size:>15,} bytes  {printable(file)}")
            print("nothing was sent (--dry-run)", file=sys.stderr)
            _print_unsaid(license, dataset, limits)
        return 0
    done = push_files(
        name, files, private=private, token=token, message=message, revision=revision, overwrite=overwrite
    )
    if as_json:
        print_json(vars(done), indent=2)
        return 0
    seen = "private" if done.private else "public"
    print(f"{done.url}  {seen}, commit {done.commit}")
    for what in ("written", "unchanged", "deleted"):
        if found := getattr(done, what):
            print(f"{what:<10} {printable(', '.join(found))}")
    if done.kept:
        print(
            f"{'kept':<10} {', '.join(done.kept)}: it was written or changed there by hand; --overwrite replaces it",
            file=sys.stderr,
        )
    else:
        _print_unsaid(license, dataset, limits)
    return 0


def _print_unsaid(license: str | None, dataset: list[str] | None, limits: str) -> None:
    """What a card cannot know, and nobody has said."""
    said = {"licence (--license)": license, "data set (--dataset)": dataset, "limits (--limits)": limits}
    if unsaid := [what for what, given in said.items() if not given]:
        print(f"the card says nothing of: {', '.join(unsaid)}", file=sys.stderr)


def _token(file: Path) -> str:
    """The token in a file."""
    from multimodal.shapes import ConfigError

    words = text_of("--token-file", file).split()
    if len(words) != 1:
        raise ConfigError(f"--token-file {file}: holds {len(words)} words; wanted the token alone")
    return words[0]
