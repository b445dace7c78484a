"""nanoVLM against a reference in plain torch, since no library has it: the names and shapes are those of its repository."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import multimodal as mm
from multimodal.pretrained import Pretrained, pretrained
from tests.pretrained.compared import (
    TOLERANCE,
    check_mutations,
    check_packed_and_alone,
    check_round_trip,
    largest,
    logits_by_sample,
    refused,
)
from tests.pretrained.seeing import check_pixels, unfitted

CONFIG: dict[str, Any] = {
    "vit_hidden_dim": 24,
    "vit_inter_dim": 40,
    "vit_patch_size": 2,
    "vit_img_size": 16,
    "vit_n_heads": 3,
    "vit_dropout": 0.0,
    "vit_n_blocks": 2,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
    "vit_model_type": "google/siglip-base-patch16-224",
    "lm_hidden_dim": 32,
    "lm_inter_dim": 48,
    "lm_rms_eps": 1e-5,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192,
    "lm_vocab_size": 71,
    "lm_n_heads": 4,
    "lm_n_kv_heads": 2,
    "lm_dropout": 0.0,
    "lm_n_blocks": 2,
    "lm_attn_scaling": 1.0,
    "lm_use_tokens": False,
    "lm_tie_weights": True,
    "mp_pixel_shuffle_factor": 2,
    "hf_repo_name": "nanoVLM",
}
TASK = "image text -> text"
SAMPLES = [
    (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)), prompt, answer)
    for i, (prompt, answer) in enumerate([([2, 5, 9, 3], [33, 1, 0]), ([60, 8], [7])])
]


def tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the names of a folder; of the tied table a file has one name."""
    draw = torch.Generator().manual_seed(0)
    eye, words, patch = config["vit_hidden_dim"], config["lm_hidden_dim"], config["vit_patch_size"]
    patches = (config["vit_img_size"] // patch) ** 2
    heads = words // config["lm_n_heads"] * config["lm_n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.conv.weight": (eye, 3, patch, patch),
        "vision_encoder.patch_embedding.conv.bias": (eye,),
        "vision_encoder.patch_embedding.position_embedding": (1, patches, eye),
        "MP.proj.weight": (words, eye * config["mp_pixel_shuffle_factor"] ** 2),
        "decoder.head.weight": (config["lm_vocab_size"], words),
        "decoder.norm.weight": (words,),
        "decoder.rotary_embd.inv_freq": (words // config["lm_n_heads"] // 2,),
    }
    if not config["lm_tie_weights"]:
        shapes["decoder.token_embedding.weight"] = (config["lm_vocab_size"], words)
    for name, out, into in (
        ("attn.qkv_proj", 3 * eye, eye),
        ("attn.out_proj", eye, eye),
        ("mlp.fc1", config["vit_inter_dim"], eye),
        ("mlp.fc2", eye, config["vit_inter_dim"]),
    ):
        for i in range(config["vit_n_blocks"]):
            shapes[f"vision_encoder.blocks.{i}.{name}.weight"] = (out, into)
            shapes[f"vision_encoder.blocks.{i}.{name}.bias"] = (out,)
    for name in ["layer_norm", *(f"blocks.{i}.ln{n}" for i in range(config["vit_n_blocks"]) for n in (1, 2))]:
        shapes |= {f"vision_encoder.{name}.{part}": (eye,) for part in ("weight", "bias")}
    for name, out, into in (
        ("attn.q_proj", words, words),
        ("attn.k_proj", heads, words),
        ("attn.v_proj", heads, words),
        ("attn.out_proj", words, words),
        ("mlp.gate_proj", config["lm_inter_dim"], words),
        ("mlp.up_proj", config["lm_inter_dim"], words),
        ("mlp.down_proj", words, config["lm_inter_dim"]),
    ):
        shapes |= {f"decoder.blocks.{i}.{name}.weight": (out, into) for i in range(config["lm_n_blocks"])}
    shapes |= {f"decoder.blocks.{i}.norm{n}.weight": (words,) for i in range(config["lm_n_blocks"]) for n in (1, 2)}
    made = {name: torch.randn(shape, generator=draw) * 0.15 for name, shape in shapes.items()}
    return {name: x + 1 if "norm" in name and x.dim() == 1 else x for name, x in made.items()}


def saved(folder: Path, **changes: Any) -> Path:
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(config), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    """(N, D) by its definition; keys and values may be shared by several heads."""
    width = q.shape[1] // heads
    shared = heads // (k.shape[1] // width)
    found = []
    for h in range(heads):
        mine, key = slice(h * width, (h + 1) * width), slice(h // shared * width, (h // shared + 1) * width)
        logits = q[:, mine] @ k[:, key].T / width**0.5
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf"))
        found.append(logits.softmax(1) @ v[:, key])
    return torch.cat(found, 1)


def turned(x: Tensor, heads: int, base: float) -> Tensor:
    """Rotary positions, whose pairs are the halves of a head."""
    x = x.unflatten(1, (heads, -1))
    half = x.shape[2] // 2
    angle = torch.arange(len(x))[:, None] * base ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).flatten(1)


def seen(t: dict[str, Tensor], c: dict[str, Any], picture: Tensor) -> Tensor:
    """The rows of a picture."""
    t = {name.removeprefix("vision_encoder."): x for name, x in t.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], c["vit_ln_eps"])

    conv = "patch_embedding.conv"
    x = F.conv2d(picture[None], t[f"{conv}.weight"], t[f"{conv}.bias"], stride=c["vit_patch_size"])[0].flatten(1).T
    x = x + t["patch_embedding.position_embedding"][0]
    for i in range(c["vit_n_blocks"]):
        b = f"blocks.{i}"
        q, k, v = linear(f"{b}.attn.qkv_proj", norm(f"{b}.ln1", x)).chunk(3, 1)
        x = x + linear(f"{b}.attn.out_proj", attended(q, k, v, c["vit_n_heads"], False))
        x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.ln2", x)), approximate="tanh"))
    x = norm("layer_norm", x)
    grid, side = c["vit_img_size"] // c["vit_patch_size"], c["mp_pixel_shuffle_factor"]
    squares = [
        torch.cat([x[(row + i) * grid + column + j] for i in range(side) for j in range(side)])
        for row in range(0, grid, side)
        for column in range(0, grid, side)
    ]
    return F.linear(torch.stack(squares), t["MP.proj.weight"], t.get("MP.proj.bias"))


def theirs(t: dict[str, Tensor], c: dict[str, Any], samples: Any = SAMPLES) -> list[Tensor]:
    """The logits of each answer."""
    table = t.get("decoder.token_embedding.weight", t["decoder.head.weight"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], t[f"decoder.{name}.weight"], c["lm_rms_eps"])

    found = []
    for picture, prompt, answer in samples:
        x = torch.cat([seen(t, c, picture), table[prompt + answer]])
        for i in range(c["lm_n_blocks"]):
            b = f"blocks.{i}"
            h = norm(f"{b}.norm1", x)
            q, k, v = (h @ t[f"decoder.{b}.attn.{p}_proj.weight"].T for p in "qkv")
            q, k = (turned(y, n, c["lm_re_base"]) for y, n in ((q, c["lm_n_heads"]), (k, c["lm_n_kv_heads"])))
            x = x + attended(q, k, v, c["lm_n_heads"], True) @ t[f"decoder.{b}.attn.out_proj.weight"].T
            h = norm(f"{b}.norm2", x)
            gate, up = (h @ t[f"decoder.{b}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ t[f"decoder.{b}.mlp.down_proj.weight"].T
        found.append((norm("norm", x) @ t["decoder.head.weight"].T)[-len(answer) - 1 :])
    return found


def ours(loaded: Pretrained, samples: Any = SAMPLES) -> list[Tensor]:
    plain = unfitted(loaded.tokenizers["image"], 0.0, 1.0)
    return logits_by_sample(loaded.model(), TASK, [{"image": plain(x), "text": p, "answer": a} for x, p, a in samples])


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_reference_packed_and_alone(tied: bool, tmp_path: Path) -> None:
    given = saved(tmp_path / "theirs", lm_tie_weights=tied)
    config = {**CONFIG, "lm_tie_weights": tied}
    loaded, wanted = pretrained(given), theirs(tensors(config), config)
    check_packed_and_alone(loaded, SAMPLES, ours, wanted)
    check_round_trip(tmp_path, given)


def test_a_projection_with_a_bias(tmp_path: Path) -> None:
    given, bias = saved(tmp_path / "theirs"), torch.linspace(-1, 1, 32)
    t = {**tensors(CONFIG), "MP.proj.bias": bias}
    save_file(t, given / "model.safetensors", {"format": "pt"})
    loaded = pretrained(given)
    assert largest(ours(loaded), theirs(t, CONFIG)) < TOLERANCE < largest(ours(loaded), theirs(tensors(CONFIG), CONFIG))
    check_round_trip(tmp_path, given)


def test_the_width_of_a_released_model(tmp_path: Path) -> None:
    """nanoVLM-222M's widths and heads, each part of depth 1, with a small picture and vocabulary."""
    changes = {
        "vit_hidden_dim": 768,
        "vit_inter_dim": 3072,
        "vit_n_heads": 12,
        "vit_n_blocks": 1,
        "lm_hidden_dim": 576,
        "lm_inter_dim": 1536,
        "lm_n_heads": 9,
        "lm_n_kv_heads": 3,
        "lm_n_blocks": 1,
    }
    config = {**CONFIG, **changes}
    given = saved(tmp_path, **changes)
    t = {name: x * 0.2 if x.dim() > 1 else x for name, x in tensors(config).items()}
    save_file(t, given / "model.safetensors", {"format": "pt"})
    assert largest(ours(pretrained(given)), theirs(t, config)) < TOLERANCE


def test_any_small_change_is_found(tmp_path: Path) -> None:
    given = saved(tmp_path)
    wanted = theirs(tensors(CONFIG), CONFIG)

    def difference(loaded: Pretrained) -> float:
        return largest(ours(loaded), wanted)

    names = ["vision_encoder.blocks.1.mlp.fc1.bias", "MP.proj.weight", "decoder.blocks.0.norm2.weight"]
    check_mutations(given, difference, names, {"rotary_base": (90000.0, 100.0, 100.0)})


def test_what_is_written_is_what_the_reference_writes(tmp_path: Path) -> None:
    loaded = pretrained(saved(tmp_path, lm_tie_weights=False))
    config = {**CONFIG, "lm_tie_weights": False}
    (picture, prompt, _), written = SAMPLES[0], []
    for _ in range(6):
        written.append(int(theirs(tensors(config), config, [(picture, prompt, written)])[0][-1].argmax()))
    assert len(set(written)) > 2
    assert loaded.model().generate(TASK, image=picture, text=prompt, max_tokens=6).value == written


def test_pictures_are_resized_and_not_normalised(tmp_path: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    from PIL import Image

    tower: Any = pretrained(saved(tmp_path)).tokenizers["image"]
    levels = (torch.rand(23, 40, 3, generator=torch.Generator().manual_seed(3)) * 255).to(torch.uint8)
    wanted_CYX = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])(
        Image.fromarray(levels.numpy())
    )
    check_pixels(tower, levels.numpy(), wanted_CYX)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(tmp_path)
    refused({"vit_windows": 4}, given, r"has vit_windows, which this version does not know")
    refused({"vit_cls_flag": True}, given, r"vit_cls_flag=True is not supported")
    refused({"lm_attn_scaling": 0.5}, given, r"lm_attn_scaling=0.5 is not supported")
    refused({"max_img_size": 2048}, given, r"max_img_size=2048 splits pictures into tiles.*do_image_splitting=False")
    config = json.loads((given / "config.json").read_text(encoding="utf-8"))
    newer = {**config, "max_img_size": 2048, "lm_chat_template": "<|im_start|>{{ text }}<|im_end|>"}
    (given / "config.json").write_text(json.dumps(newer), encoding="utf-8")
    head: Any = pretrained(given, do_image_splitting=False).tasks[0].head
    assert head.stop_id == 2
    pixels = SAMPLES[0][0]
    whole, plain = pretrained(given, do_image_splitting=False), pretrained(saved(tmp_path / "plain"))
    assert torch.equal(whole.tokenizers["image"](pixels).content, plain.tokenizers["image"](pixels).content)
    assert largest(ours(whole), theirs(tensors(CONFIG), CONFIG)) < TOLERANCE
    with pytest.raises(mm.CheckpointError, match="do_image_splitting=7 is not among True, False"):
        pretrained(given, do_image_splitting=7)
    with pytest.raises(mm.CheckpointError, match="this family has no option 'splitting'"):
        pretrained(given, splitting=False, do_image_splitting=False)
