"""Prefix caching: the first fields of a task are read once for many answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multimodal.attention import Cache
from multimodal.heads.base import encode_read
from multimodal.network import Network
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokens


@dataclass(frozen=True)
class CachedPrefix:
    """The result of `Model.read`: the first fields of a task, with the keys and values of their tokens.

    model: the model that read them.
    task: the pattern of the task.
    fields: by name of a field, its tokens; None: a field that is left out.
    cache: the KV cache, with these tokens in row 0.
    count: number of tokens.
    """

    model: Network
    task: str
    fields: Mapping[str, Tokens | None]
    cache: Cache
    count: int


def read_prefix(model: Network, task: str, fields: Mapping[str, Any]) -> CachedPrefix:
    """Read the first fields of a task once, for many answers that differ in the other fields.

    Raises:
        ConfigError: the fields are not the first of the task, or they would attend to a later, bidirectional field.
    """
    packer = model.packer
    packer.check_task(task, answers=True)
    pattern = packer.patterns[task]
    names = [field.name for field in pattern.reads]
    if not fields or names[: len(fields)] != [name for name in names if name in fields] or set(fields) - set(names):
        raise ConfigError(
            f"task {task!r}: a prefix is one or more of its first fields, of {', '.join(names)}; not {', '.join(fields) or 'none'}"
        )
    # the cached states are final, so that the prefix must not attend to later fields
    for field in pattern.reads[len(fields) :]:
        if not packer.tokenizers[field.kind].causal:
            raise ConfigError(
                f"task {task!r}: what comes before {field.name!r} cannot be read once for all, because tokenizer "
                f"{field.kind!r} is bidirectional, so what comes before attends to it; make that tokenizer with causal=True"
            )
    tokens = {
        field.name: encode_read(packer.tokenizers[field.kind], field, fields[field.name], f"task {task!r}")
        for field in pattern.reads[: len(fields)]
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
