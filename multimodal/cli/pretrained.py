"""`pretrained check` compares a trained model of others with the library that it came from."""

from typing import Literal

from multimodal.cli.arguments import Json
from multimodal.cli.output import print_json


def pretrained(
    action: Literal["check"], name: str, /, *, revision: str | None = None, pickle: bool = False, as_json: Json = False
) -> int:
    """Load a trained model here and in its own library, and print the largest difference between what they compute.
    Exit code 1: too large.

    Example: multimodal pretrained check HuggingFaceTB/SmolLM2-135M

    Parameters
    ----------
    action
        "check".
    name
        A folder with config.json and weights, or a name on the hub.
    revision
        The branch, tag or commit of a name on the hub.
    pickle
        Read weights that are a pickle (.bin), with weights_only.
    """
    from multimodal.pretrained.gate import TOLERANCE, compare

    rows = compare(name, revision=revision, pickle=pickle)
    passed = all(row.passed for row in rows)
    if as_json:
        print_json({"passed": passed, "rows": [{**vars(row), "passed": row.passed} for row in rows]}, indent=2)
        return 0 if passed else 1
    print(f"{name}: the largest differences from its own library, in float32")
    width = max(len(row.case) for row in rows)
    for row in rows:
        said = "ok" if row.passed else "TOO LARGE"
        print(f"  {row.case:<{width}}   packed {row.packed:.1e}   alone {row.alone:.1e}   {said}")
    print("passed" if passed else f"failed: more than {TOLERANCE:g}")
    return 0 if passed else 1
