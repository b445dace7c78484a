"""`pretrained list` shows the families of trained models, and `check` compares a model with the library that it came from."""

from typing import Literal

from multimodal.cli.arguments import Json
from multimodal.cli.output import print_json


def pretrained(
    action: Literal["check", "list"],
    name: str | None = None,
    /,
    *,
    revision: str | None = None,
    pickle: bool = False,
    as_json: Json = False,
) -> int:
    """List the families of trained models that can be read; or load one here and in its own library, and print the largest
    difference between what they compute. Exit code 1: too large.

    Example: multimodal pretrained list

    Example: multimodal pretrained check HuggingFaceTB/SmolLM2-135M

    Parameters
    ----------
    action
        "list", or "check" and the model.
    name
        A folder with config.json and weights, or a name on the hub.
    revision
        The branch, tag or commit of a name on the hub.
    pickle
        Read weights that are a pickle (.bin), with weights_only.
    """
    from multimodal.shapes import ConfigError

    if action == "list":
        if name is not None or revision is not None or pickle:
            raise ConfigError("pretrained list: it shows every family, so give nothing more")
        return _list_families(as_json)
    if name is None:
        raise ConfigError("pretrained check: give a folder with config.json and weights, or a name on the hub")
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


def _list_families(as_json: bool) -> int:
    """Print each family with the model_type of its configurations, and by task the class that computes it too."""
    from multimodal.pretrained import FAMILIES

    families = sorted(FAMILIES, key=lambda family: type(family).__name__.lower())
    if as_json:
        print_json([{"family": type(f).__name__, "types": f.names, "tasks": dict(f.peers)} for f in families], indent=2)
        return 0
    for family in families:
        print(f"{type(family).__name__}: model_type {', '.join(family.names)}")
        for task, peer in family.peers.items():
            print(f"  {task:<38} {peer}")
    return 0
