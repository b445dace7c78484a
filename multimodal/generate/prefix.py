"""The first fields of a task, read once for many answers: their tokens and the keys and values that the core cached."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimodal.attention import Cache
from multimodal.heads.base import encode_field
from multimodal.network import Network
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokens


@dataclass(frozen=True)
class CachedPrefix:
    """What `Model.read` returns: the first fields of a task, read.

    model: the model that read them.
    task: the task that they are of.
    fields: by name, their tokens; None: a field that is left out.
    cache: the core's keys and values of these tokens, in row 0.
    count: number of tokens.
    """

    model: Network
    task: str
    fields: Mapping[str, Tokens | None]
    cache: Cache
    count: int


def read_prefix(model: Network, task: str, fields: Mapping[str, Any]) -> CachedPrefix:
    """Read the first fields of a task once, for many answers that differ in the others.

    Raises:
        ConfigError: fields that are not the first of the task, or later fields that those would have had to see.
    """
    packer = model.packer
    packer.check_task(task, answers=True)
    pattern = packer.patterns[task]
    names = [field.name for field in pattern.reads]
    if not fields or names[: len(fields)] != [name for name in names if name in fields] or set(fields) - set(names):
        raise ConfigError(
            f"task {task!r}: a prefix is one or more of its first fields, of {', '.join(names)}; not {', '.join(fields) or 'none'}"
        )
    for field in pattern.reads[len(fields) :]:
        if not packer.tokenizers[field.kind].causal:
            raise ConfigError(
                f"task {task!r}: what comes before {field.name!r} cannot be read once for all, because tokenizer "
                f"{field.kind!r} is bidirectional, so what comes before looks at it; make that tokenizer with causal=True"
            )
    tokens = {
        name: None
        if fields[name] is None
        else encode_field(packer.tokenizers[pattern.reads[i].kind], fields[name], f"task {task!r}", name)
        for i, name in enumerate(names[: len(fields)])
    }
    with model.inference_mode():
        stream = packer.prompt(task, tokens).to(model.device)
        cache = model.core.cache(
            rows=1, capacity=len(stream), device=model.device, dtype=next(model.core.parameters()).dtype
        )
        if cache.memory is not None:
            raise ConfigError(
                f"task {task!r}: an EncoderDecoder reads all of a sample at once, so no prefix of it can be read before; "
                "give generate the whole sample"
            )
        model(stream, cache=cache)
    return CachedPrefix(model, task, tokens, cache, len(stream))
