"""`shards` packs data into archives that are read in place, and checks them."""

import math
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from multimodal.cli.output import check_folder
from multimodal.progress import progress_bar

SHOWN = 5  # bad rows


def shards(
    source: str,
    out: Path | None = None,
    /,
    *,
    fields: Annotated[list[str] | None, Parameter(negative="")] = None,
    files: Annotated[list[str] | None, Parameter(negative="")] = None,
    split: str | None = None,
    encoding: str | None = None,
    quotes: bool | None = None,
    shard_mb: float = 256.0,
    max_bad: int = 0,
    verify: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Turn a folder or a table into shards: archives that are read in place, from a disk or an object store.

    Stopped at any moment, the same command goes on behind the last whole shard, and the result is the same to the byte.

    Example: multimodal shards photos photo-shards

    Example: multimodal shards captions.csv caption-shards --fields image=file --fields text=caption --files image

    Example: multimodal shards caption-shards --verify

    Parameters
    ----------
    source
        A folder of pictures or sounds in class folders; a .csv, .tsv, .jsonl or .parquet file; a data set that Hugging Face
        `datasets` saved, or hf:NAME of its hub; with --verify, a folder or URL of shards.
    out
        The folder of the shards.
    fields
        A column to take, or field=column to give it another name; all columns unless given. Repeat it for more.
    files
        A field whose values are paths of files (relative to the table), which are packed in place of the paths. Repeat it for more.
    split
        The split of a data set that is read; of a folder the sub-folder train, val, test, ..
    encoding
        The encoding of a .csv, .tsv or .jsonl file that is not UTF-8: latin-1, utf-16, ..
    quotes
        Whether quotation marks enclose cells; by default they do in a .csv and not in a .tsv.
    shard_mb
        The largest size of an archive, in megabytes.
    max_bad
        The largest number of broken rows that are left out; they are listed in bad.jsonl.
    verify
        Read all shards and compare their checksums. Exit code 1: some are damaged.
    """
    from multimodal.data.shard_writer import BAD, write_shards
    from multimodal.data.tables import open_table
    from multimodal.shapes import ConfigError

    if verify:
        return _verify(source)
    if not 1e-6 <= shard_mb < math.inf:
        raise ConfigError(f"--shard-mb {shard_mb:g}: wanted a number of megabytes above 0, such as 256")
    if out is None:
        raise ConfigError("shards: give the folder of the shards behind the source")
    check_folder(out, "shards:")
    chosen = {name: column or name for name, _, column in (text.partition("=") for text in fields or [])}
    table = open_table(source, split, encoding=encoding, quotes=quotes).select(chosen, files or [])
    with progress_bar("packing", table.total) as bar:
        made = write_shards(
            table,
            out,
            shard_bytes=int(shard_mb * 1e6),
            max_bad=max_bad,
            source=table.about,
            progress=lambda at: bar.update(at.rows, f"{at.shards} shards, {at.bytes / 1e6:,.1f} MB"),
        )
    for row, why in made.bad[:SHOWN]:
        print(f"row {row}: {why}", file=sys.stderr)
    if made.bad:
        print(f"broken rows that were left out: {len(made.bad)}; they are listed in {out / BAD}", file=sys.stderr)
    if made.account.left_out or made.account.notes:
        print(made.account, file=sys.stderr)
    already = "  (it was complete already)" if made.already else ""
    print(f"samples  {made.samples:,}\nfields   {', '.join(made.fields)}")
    print(f"shards   {made.shards}, {made.bytes / 1e6:,.1f} MB\nfolder   {out}{already}")
    return 0


def _verify(folder: str) -> int:
    from multimodal.data.shards import Shards

    found = Shards(folder)
    total = sum(shard.bytes for shard in found.shards)
    read = 0
    with progress_bar("reading", total) as bar:

        def more(count: int) -> None:
            nonlocal read
            read += count
            bar.update(read, f"{read / 1e6:,.1f} of {total / 1e6:,.1f} MB")

        faults = found.check(more)
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(found.shards) - len(faults)} of {len(found.shards)} shards are as they were written")
    if unknown := sum(shard.sha256 is None for shard in found.shards):
        print(f"{unknown} of them are archives of others, of which only the length is known")
    return 1 if faults else 0
