"""Parts of a model by name, for freezing and adapters, and the depth of each weight."""

import re
from collections.abc import Iterable

from torch import nn

from multimodal.core import Transformer
from multimodal.encoder_decoder import TwoCores
from multimodal.network import Network
from multimodal.shapes import ConfigError, did_you_mean

_BLOCKS = re.compile(r"(core|reader|writer)\[([^\]]*)\]")


def cores(model: Network) -> dict[str, Transformer]:
    """The transformers of a model by the names of their parameters, in the order in which a token passes them."""
    if isinstance(model.core, TwoCores):
        return {"core.reader": model.core.reader, "core.writer": model.core.writer}
    assert isinstance(model.core, Transformer)
    return {"core": model.core}


def weights_of(where: str, model: Network, parts: Iterable[str]) -> set[str]:
    """The names of the parameters in these parts of a model.

    A part is one of:
        "image"                the embedding of the kind with this name
        "core"                 everything in the core; of an EncoderDecoder also "reader" and "writer"
        "core[:6]", "core[-1]" blocks of the core, as Python slices a list
        "head:image -> label"  the head of a task, its learned tokens included; or "head:" and the name of its weights
        "queries"              the learned tokens of all heads, which enter the core with what is read
        "image.frozen_part"    a part of the embedding of a kind, by its name in it
        "core.norm"            a module or parameter by its name in the model

    Raises:
        ConfigError: no such part; the message begins with `where` and lists the parts.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for part in parts:
        prefixes = _prefixes(where, model, part)
        below = {name for name in names if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)}
        if not below:
            known = _known(model)
            # a kind without weights is a part all the same
            there = "it has no weights" if part in known else f"there are {', '.join(map(repr, known))}"
            more = "" if part in known else f", and the beginnings of parameters' names{did_you_mean(part, known)}"
            raise ConfigError(f"{where}: {part!r} is no part of this model with weights; {there}{more}")
        found |= below
    return found


def topmost(model: nn.Module, names: set[str]) -> list[nn.Module]:
    """The largest modules that have no other parameters than these."""

    def search(module: nn.Module, prefix: str) -> list[nn.Module]:
        own = {prefix + name for name, _ in module.named_parameters()}
        if own and own <= names:
            return [module]
        return [found for name, child in module.named_children() for found in search(child, f"{prefix}{name}.")]

    return search(model, "")


def depths(model: Network) -> tuple[dict[str, int], int]:
    """The depth of each parameter by name, and the highest depth.

    Embeddings have depth 0, and so do learned times and fields and the first norm of a core.
    Block i of the core has i + 1; heads, with their learned tokens, have the highest depth. The norm after the last block has the
    depth of that block. In an EncoderDecoder the writer's blocks count on from the reader's.
    """
    blocks: dict[str, int] = {}
    ends: dict[str, int] = {}
    count = 0
    for name, core in cores(model).items():
        blocks |= {f"{name}.{part}.": 0 for part in ("times", "fields", "first_norm")}
        blocks |= {f"{name}.blocks.{i}.": count + i + 1 for i in range(len(core.blocks))}
        count += len(core.blocks)
        ends[f"{name}."] = count
    # blocks come first, because the name of a core begins the names of its blocks too
    starts = {**blocks, **ends, "embeds.": 0}
    found = {
        name: next((depth for start, depth in starts.items() if name.startswith(start)), count + 1)
        for name, _ in model.named_parameters()
    }
    return found, count + 1


def _prefixes(where: str, model: Network, part: str) -> list[str]:
    """How the names of a part's parameters begin."""
    named = {name.rpartition(".")[2]: [name] for name in cores(model)} | {"core": ["core"]}
    named["queries"] = [f"readouts.{key}.query" for key in model.readouts]
    if part in model.embeds and part in named:
        raise ConfigError(
            f"{where}: {part!r} is a kind of this model and also the name of {', '.join(named[part])}; write 'embeds.{part}' for "
            f"the kind, or the beginnings of the other parameters' names"
        )
    if part in model.embeds:
        return [f"embeds.{part}"]
    if part in named:
        return named[part]
    if match := _BLOCKS.fullmatch(part):
        core = named[match[1]][0] if match[1] in named else match[1]
        return _some_blocks(where, model, part, core, match[2])
    if part.startswith("head:"):
        keys = {_spaced(pattern): key for pattern, key in model.packer.keys.items()}
        head = part.removeprefix("head:").strip()
        return [f"readouts.{keys.get(_spaced(head), head)}"]
    kind = part.partition(".")[0]
    return [part, f"embeds.{part}"] if kind in model.embeds and kind not in named else [part]


def _spaced(pattern: str) -> str:
    """One spelling of a task: a blank between fields, and one on each side of the arrow."""
    return " ".join(re.sub(r"(<?->)", r" \1 ", pattern).split())


def _some_blocks(where: str, model: Network, part: str, core: str, index: str) -> list[str]:
    """How the names of the parameters of some blocks begin, as "core[2:4]" names them."""
    if core not in cores(model):
        there = ", ".join(name.rpartition(".")[2] for name in cores(model))
        raise ConfigError(f"{where}: {part!r} names blocks of {core!r}, and this model has blocks in {there}")
    numbers = list(range(len(cores(model)[core].blocks)))
    try:
        bounds = [int(text) if text.strip() else None for text in index.split(":")]
        chosen = numbers[slice(*bounds)] if ":" in index else [numbers[int(index)]]
        # a slice of a list may end anywhere, but a bound that the model does not have is a mistake
        beyond = [bound for bound in bounds[:2] if bound is not None and abs(bound) > len(numbers)]
    except (ValueError, TypeError, IndexError):
        chosen, beyond = [], []
    if chosen and beyond:
        raise ConfigError(
            f"{where}: {part!r}: {beyond[0]} is beyond the {len(numbers)} blocks of {core!r}; all of them are "
            f"'{part.partition('[')[0]}[:]'"
        )
    if not chosen:
        raise ConfigError(
            f"{where}: {part!r} names no block; there are {len(numbers)}, counted from 0, as in '[0]', '[:2]' and '[-1]'"
        )
    return [f"{core}.blocks.{i}" for i in chosen]


def _known(model: Network) -> list[str]:
    """The names of parts, for errors."""
    inner = [name.rpartition(".")[2] for name in cores(model)]
    blocks = [f"{name}[:{len(core.blocks)}]" for name, core in zip(inner, cores(model).values(), strict=True)]
    heads = [f"head:{pattern}" for pattern in model.tasks]
    return [*model.embeds, *dict.fromkeys(["core", *inner]), *blocks, *heads, "queries"]
