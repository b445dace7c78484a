"""Exports a text model that was trained here as a Qwen3 model, which other programs can load."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer
from torch import Tensor

from multimodal.core import Core
from multimodal.heads import NextToken
from multimodal.model import Model
from multimodal.pretrained.convert import their_tensors
from multimodal.pretrained.family import Blueprint
from multimodal.shapes import ConfigError
from multimodal.tokenizer import Tokenizer
from multimodal_tokenizers import TextBPE, TextBytes

STOP, START = "<|stop|>", "<|start|>"


def as_qwen3(
    model: Model, blueprint_of: Callable[[Mapping[str, Any]], Blueprint]
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, bytes]]:
    """Return (config, tensors, files) of a folder that `AutoModelForCausalLM` loads.

    The stop id and the learned start vector become two new tokens at the end of the vocabulary.

    Raises:
        ConfigError: the model does not fit Qwen3; the message says what to declare instead.
    """
    core, text = _parts(model)
    vocab, state = text.vocab_size or 0, model.state_dict()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab + 2,
        "hidden_size": core.width,
        "intermediate_size": core.hidden,
        "num_hidden_layers": core.depth,
        "num_attention_heads": core.heads,
        "num_key_value_heads": core.groups,
        "head_dim": core.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": core.norm.eps,
        "rope_theta": float(core.rotary_base[0]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(core.rotary_base[0])},
        "max_position_embeddings": 32768,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": vocab + 1,
        "eos_token_id": vocab,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    blueprint = blueprint_of(config)
    if differ := [name for name, value in vars(core).items() if _differs(name, value, blueprint.core)]:
        wanted = ", ".join(f"{name}={getattr(blueprint.core, name)!r}" for name in differ)
        raise ConfigError(f"export: Qwen3 cannot hold this core's {' and '.join(differ)}; train one with {wanted}")
    key = model.packer.keys[next(iter(model.tasks))]
    table_VD, start_1D = state["embeds.text.weight"] * getattr(text, "scale", 1.0), state[f"readouts.{key}.query"]
    nothing_1D = torch.zeros_like(start_1D)
    weights = {
        **state,
        "embeds.text.weight": torch.cat([table_VD, nothing_1D, start_1D]),
        "readouts.text_NextToken.linear.weight": torch.cat([state[f"readouts.{key}.linear.weight"], nothing_1D]),
    }
    # the logit of the start is 0, which may be the largest, so generation must suppress it
    writing = {"bos_token_id": vocab + 1, "eos_token_id": vocab, "suppress_tokens": [vocab + 1]}
    files = {"generation_config.json": _json(writing), **_tokenizer_files(text)}
    return config, their_tensors(blueprint.pairs, weights), files


def _parts(model: Model) -> tuple[Core, Tokenizer]:
    """The core and the tokenizer of a model with one text task.

    Raises:
        ConfigError: the model does not fit Qwen3.
    """
    core, tasks = model.core.core, list(model.tasks)
    head = model.packer.heads[tasks[0]]
    if list(model.packer.tokenizers) != ["text"] or len(tasks) != 1 or tasks[0] not in ("-> text", "text -> text"):
        raise ConfigError(
            "export: the layout of Qwen3 holds a model with one task, '-> text' or 'text -> text'; this one has "
            f"{', '.join(map(repr, tasks))}"
        )
    text = model.packer.tokenizers["text"]
    if not isinstance(core, Core) or not isinstance(head, NextToken):
        raise ConfigError("export: the layout of Qwen3 holds a Core with a NextToken head, and no other")
    if head != NextToken(label_smoothing=head.label_smoothing, bias=False):
        raise ConfigError(f"export: Qwen3 cannot hold {head}; train with NextToken(bias=False)")
    if not text.causal and model.packer.patterns[tasks[0]].reads:
        raise ConfigError("export: Qwen3 reads causally; make the tokenizer with causal=True")
    return core, text


def _differs(name: str, value: Any, other: Any) -> bool:
    """Whether a setting of the core differs from that of Qwen3 and changes what it computes."""
    if name in (
        "dropout",
        "drop_path",
        "kv_heads",
        "mlp_width",
    ):  # only in training, or sizes whose defaults may be written as None
        return False
    if name == "rotary_base":  # the other two bases do not matter: a text has row 0 and column 0
        return value[0] != other.rotary_base[0]
    return value != getattr(other, name)


def _tokenizer_files(text: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json; no files for a tokenizer of ids."""
    if isinstance(text, TextBytes):
        alphabet = _byte_letters()
        made = HFTokenizer(models.BPE({letter: byte for byte, letter in enumerate(alphabet)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    elif isinstance(text, TextBPE):
        made = HFTokenizer.from_str(text.spec)
    else:
        return {}
    made.add_special_tokens([AddedToken(name, special=True) for name in (STOP, START)])
    if made.token_to_id(STOP) != text.vocab_size:
        raise ConfigError(
            "export: the ids in this tokenizer.json have gaps, so the stop and start tokens would get wrong ids"
        )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "bos_token": START}
    return {"tokenizer.json": made.to_str().encode("utf-8"), "tokenizer_config.json": _json(settings)}


def _byte_letters() -> list[str]:
    """The character for each byte in byte-level tokenizers (Radford et al. 2019): printable bytes stand for themselves."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printed)
    letter_of = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letter_of[byte] for byte in range(256)]


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode("utf-8")
