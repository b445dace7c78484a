"""`evaluate` says how good a model is on data of one's own, and writes a report with the worst answers."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from multimodal.cli.arguments import Columns, DataFiles, Device, Json, Most, Plugins, choose_task
from multimodal.cli.loading import load, samples_of, tasks_of
from multimodal.cli.output import check_folder, print_json


def evaluate(
    checkpoint: Path,
    data: str,
    /,
    *,
    task: str | None = None,
    fields: Columns = None,
    files: DataFiles = None,
    samples: Most = 10_000,
    measures: Annotated[
        list[str] | None,
        Parameter(negative="", help="A measure, such as F1 or wer. Repeat it for more; all that fit unless given."),
    ] = None,
    resamples: Annotated[int, Parameter(help="Draws of the samples for 95 % intervals; 0 for none.")] = 200,
    out: Annotated[
        Path | None, Parameter(help="The folder of the report: a page, a picture and JSON for each task.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        Parameter(
            help="Write a model here that is as sure as it is right. One half of the samples sets it, the other is reported."
        ),
    ] = None,
    as_json: Json = False,
    plugin: Plugins = None,
    device: Device = "auto",
) -> int:
    """Measure a model on data of your own: accuracy, F1, AUROC, error rates and more, and which answers are worst.

    Example: multimodal evaluate runs/digits digits/test --out report

    Example: multimodal evaluate runs/speech clips.csv --fields audio=file --fields text --files audio --measures wer

    Parameters
    ----------
    checkpoint
        A run folder, the model folder in it, or a name on the hub: OWNER/MODEL, or OWNER/MODEL@REVISION.
    data
        A folder of pictures or sounds in class folders, a .csv, .tsv, .jsonl or .parquet file, hf:NAME, or a folder of shards.
    task
        The task that is measured; unless given, every task whose fields the data have.
    """
    from multimodal.checkpoint import check_room, own_config
    from multimodal.shapes import ConfigError
    from multimodal.train import calibrate as calibrated
    from multimodal.train import evaluate as evaluated

    check_folder(out)
    if calibrate is not None:
        check_folder(calibrate, "--calibrate")
        check_room(calibrate.resolve())
        if own_config(calibrate) is not None:
            raise ConfigError(f"--calibrate {calibrate}: a model is here already; choose another folder")
    model = load(checkpoint, plugin, device)
    chosen = None if task is None else choose_task(model, task, [])
    found = samples_of(data, fields, files, samples)
    tasks = tasks_of(model, chosen, found)
    if calibrate is not None:
        if len(tasks) > 1:
            raise ConfigError(f"--calibrate: the data fit {', '.join(map(repr, tasks))}; choose one with --task")
        one = calibrated(model, tasks[0], found[::2])
        found = found[1::2]
        if not as_json:
            print(f"{one}\nmodel  {model.save(calibrate)}")
        else:
            model.save(calibrate)
    results = []
    for number, name in enumerate(tasks):
        result = evaluated(model, name, found, measures=measures, resamples=resamples, quiet=as_json)
        results.append(result)
        if not as_json:
            print(result)
        if out is not None:
            folder = result.save(out / f"task{number}" if len(tasks) > 1 else out)
            if not as_json:
                print(f"report  {folder / 'report.html'}")
    if as_json:
        print_json([result.to_json() for result in results], indent=2)
    return 0
