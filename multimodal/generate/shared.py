"""Prompts that begin alike are read once: a request takes the keys and values of these tokens from one that is being answered."""

from collections.abc import Iterable

import torch

from multimodal.core import Transformer
from multimodal.generate.request import Request
from multimodal.masks import PREFIX_LM
from multimodal.network import Network
from multimodal.tokenizer import Tokens

LEAST = 16  # tokens; fewer are read as fast as they are copied


def shares(model: Network) -> bool:
    """Whether the cache of a token depends on the tokens before it alone, and on each of them by keys and values."""
    core = model.core
    return type(core) is Transformer and core.core.mask == PREFIX_LM and not core.masks and not core.state_sizes


def longest(model: Network, request: Request, others: Iterable[Request]) -> tuple[Request, int] | None:
    """Of these requests one whose prompt shares most first tokens with this one's, and their number; None: none shares enough."""
    if request.prefix is not None or request.guided or request.source is not None or request.options.ctc is not None:
        return None
    found = [(other, shared_tokens(model, request, other)) for other in others]
    best = max(found, key=lambda pair: pair[1], default=None)
    return best if best is not None and best[1] >= LEAST else None


def shared_tokens(model: Network, one: Request, other: Request) -> int:
    """Number of first tokens that both prompts have and that attend to no later ones; never all of a prompt."""
    if one.task != other.task:
        return 0
    packer, fields = model.packer, one.pattern.reads
    # before the last field that attends in both directions nothing can be cut
    both_ways = [i for i, field in enumerate(fields) if not packer.tokenizers[field.kind].causal]
    first = both_ways[-1] + 1 if both_ways else 0
    count = 0
    for i, field in enumerate(fields):
        mine, theirs = one.tokens.get(field.name), other.tokens.get(field.name)
        if mine is None and theirs is None:
            continue
        if type(mine) is not Tokens or type(theirs) is not Tokens or mine.pairs is not None or theirs.pairs is not None:
            break
        alike = _alike(mine, theirs)
        whole = alike == len(mine) == len(theirs)
        # a token is embedded alone where it is an id of a kind whose embedding does not see its neighbours
        alone = mine.content.ndim == 1 and packer.kinds[field.kind].weights not in packer.reads_places
        if not whole and (i < first or not alone):
            break
        count += alike
        if not whole:
            return min(count, one.prompt - 1)
    else:
        return min(count, one.prompt - 1)
    return min(count, one.prompt - 1) if i >= first else 0


def _alike(one: Tokens, other: Tokens) -> int:
    """Number of first tokens with equal content and position."""
    count = min(len(one), len(other))
    if one.content.shape[1:] != other.content.shape[1:]:
        return 0
    same_N = (one.content[:count] == other.content[:count]).reshape(count, -1).all(1)
    same_N &= (one.position_NA[:count] == other.position_NA[:count]).all(1)
    return count if bool(same_N.all()) else int(torch.argmin(same_N.int()))
