"""CLIP and SigLIP against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.norm import Norm
from multimodal.pretrained import Pretrained, pretrained
from tests.pretrained.compared import TOLERANCE, changed, check_round_trip, refused, saved

transformers = pytest.importorskip("transformers")

LENGTH, LAST = 12, 59
TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
IDS = [[5, 9, 2, 33, LAST], [40, 3, 3, 8, 11, 12, 40, 41, 7, 20, LAST], [1, LAST]]
FAMILIES = ("CLIP", "Siglip")


def build(family: str, text: dict[str, Any] = TEXT, vision: dict[str, Any] = VISION, **more: Any) -> Any:
    if family == "CLIP":
        more = {"projection_dim": 20, **more}
        text = {"eos_token_id": LAST, **text}
    else:
        text = {"projection_size": vision["hidden_size"], **text}
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision, **more)
    return getattr(transformers, f"{family}Model")(config)


def pictures() -> list[Tensor]:
    random = torch.Generator().manual_seed(2)
    return [torch.rand(3, *size, generator=random) for size in ((24, 24), (40, 31))]


def processor(family: str, module: Any) -> Any:
    side = module.config.vision_config.image_size
    sizes: dict[str, Any] = {"size": {"height": side, "width": side}}
    if family == "CLIP":
        sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return getattr(transformers, f"{family}ImageProcessor")(**sizes)


def levels(picture_CYX: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((picture_CYX * 255).round().byte().permute(1, 2, 0).numpy())


def padded(family: str, ids: list[int]) -> list[int]:
    return ids if family == "CLIP" else (ids + [1] * LENGTH)[:LENGTH]


def theirs(family: str, module: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The vectors of pictures and of texts, each computed alone."""
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    process = processor(family, module)
    with torch.inference_mode():
        for picture in pictures():
            pixels = process(levels(picture), return_tensors="pt").pixel_values
            found[0].append(_pooled(module.get_image_features(pixel_values=pixels)))
        for ids in IDS:
            found[1].append(_pooled(module.get_text_features(input_ids=torch.tensor([padded(family, ids)]))))
    return found


def _pooled(found: Any) -> Tensor:
    vector = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(vector[0], dim=-1)


def samples(family: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [{"image": levels(x)} for x in pictures()], [{"text": padded(family, ids)} for ids in IDS]


def difference(family: str, loaded: Pretrained, wanted: tuple[list[Tensor], list[Tensor]]) -> float:
    """The largest difference of any vector, packed and alone."""
    model, worst = loaded.model(), 0.0
    for side, given, known in zip(("left", "right"), samples(family), wanted, strict=True):
        found = model.vectors("image <-> text", given, side=side)
        alone = torch.cat([model.vectors("image <-> text", [one], side=side) for one in given])
        worst = max(worst, *(float((x - torch.stack(known)).abs().max()) for x in (found, alone)))
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_both_towers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    module = build(family)
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    assert difference(family, loaded, theirs(family, module)) < TOLERANCE / 10
    check_round_trip(tmp_path, tmp_path / "theirs")


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_are_the_probabilities_of_transformers(family: str, tmp_path: Path) -> None:
    module = build(family)
    model = pretrained(saved(module, tmp_path / "theirs")).model()
    process = processor(family, module)
    pixels = torch.cat([process(levels(x), return_tensors="pt").pixel_values for x in pictures()])
    ids = torch.tensor([(padded(family, ids) + [LAST] * LENGTH)[:LENGTH] for ids in IDS])
    with torch.inference_mode():
        logits = module(pixel_values=pixels, input_ids=ids).logits_per_image
    wanted = logits.softmax(1) if family == "CLIP" else logits.sigmoid()
    found = model.matches("image <-> text", *samples(family))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    model.save(tmp_path / "ours")
    again = mm.Model.load(tmp_path / "ours")
    assert torch.equal(again.matches("image <-> text", *samples(family)), found)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_tower_is_a_model_of_its_own(family: str, tmp_path: Path) -> None:
    module = build(family)
    given = saved(module, tmp_path / "theirs")
    for part, own, known in zip(("vision", "text"), samples(family), theirs(family, module), strict=True):
        loaded = pretrained(given, part=part)
        kind = "image" if part == "vision" else "text"
        found = loaded.model().vectors(f"{kind} <-> other:{kind}", own, side="left")
        torch.testing.assert_close(found, torch.stack(known), rtol=0, atol=1e-5)
        assert loaded.core.depth == (3 if part == "vision" else 2)
        assert f"{'text' if part == 'vision' else 'vision'}_model.encoder.layers.0.mlp.fc1.bias" in loaded.unused
        with pytest.raises(mm.ConfigError, match=f"this is the {part} tower alone"):
            loaded.model().export("hf", tmp_path / "out")
    with pytest.raises(mm.CheckpointError, match=r"part='left' is not among 'both', 'vision', 'text'"):
        pretrained(given, part="left")


@pytest.mark.parametrize(
    "name",
    [
        *("CLIPVisionModelWithProjection", "CLIPVisionModel", "CLIPTextModelWithProjection", "CLIPTextModel"),
        *("SiglipVisionModel", "SiglipTextModel"),
    ],
)
def test_towers_that_were_saved_alone(name: str, tmp_path: Path) -> None:
    family, part = name.split("Model")[0][: -6 if "Vision" in name else -4], "Vision" if "Vision" in name else "Text"
    given = VISION if part == "Vision" else {**TEXT, "projection_size": 32} if family == "Siglip" else TEXT
    more: dict[str, Any] = {"projection_dim": 20} if family == "CLIP" else {}
    more |= {"eos_token_id": LAST} if name.startswith("CLIPText") else {}
    module = getattr(transformers, name)(getattr(transformers, f"{family}{part}Config")(**given, **more))
    loaded = pretrained(saved(module, tmp_path / "theirs"))
    kind = "image" if part == "Vision" else "text"
    own = samples(family)[0 if part == "Vision" else 1]
    known = []
    with torch.inference_mode():
        for sample in own:
            if part == "Text":
                found = module(input_ids=torch.tensor([sample["text"]]))
            else:
                one = type("", (), {"config": type("", (), {"vision_config": module.config})})
                found = module(processor(family, one)(sample["image"], return_tensors="pt").pixel_values)
            vector = getattr(found, "image_embeds", None) if part == "Vision" else getattr(found, "text_embeds", None)
            known.append(torch.nn.functional.normalize((found.pooler_output if vector is None else vector)[0], dim=-1))
    found = loaded.model().vectors(f"{kind} <-> other:{kind}", own, side="left")
    torch.testing.assert_close(found, torch.stack(known), rtol=0, atol=1e-5)
    check_round_trip(tmp_path, tmp_path / "theirs")


@pytest.mark.parametrize("family", FAMILIES)
def test_any_small_change_is_found(family: str, tmp_path: Path) -> None:
    module = build(family)
    given = saved(module, tmp_path)
    wanted = theirs(family, module)
    names = ["vision_model.post_layernorm.bias", "text_model.final_layer_norm.bias"]
    names += [f"{part}_model.encoder.layers.1.mlp.fc2.bias" for part in ("vision", "text")]
    names += ["vision_model.pre_layrnorm.weight"] if family == "CLIP" else ["vision_model.head.mlp.fc2.bias"]
    for name in names:
        with changed(given, name, 3e-3):
            assert difference(family, pretrained(given), wanted) > TOLERANCE / 10, name
    loaded = pretrained(given)
    for kind in ("image", "text"):
        tower: Any = loaded.tokenizers[kind]
        object.__setattr__(tower, "core", tower.core.replace(norm=Norm(eps=1e-2, centred=True, bias=True)))
        assert difference(family, loaded, wanted) > TOLERANCE / 10
        loaded = pretrained(given)


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    given = saved(build("CLIP"), tmp_path / "clip")
    refused({"image_text_loss": 1}, given, r"has image_text_loss, which this version does not know")
    refused({"text_config": {**TEXT, "rope_theta": 1.0}}, given, r"text_config: its configuration has rope_theta")
    refused({"vision_config": {**VISION, "hidden_act": "mish"}}, given, r"vision_config: hidden_act='mish'")
    given = saved(build("Siglip"), tmp_path / "siglip")
    refused({"model_type": "siglip2"}, given, r"models of type 'siglip2' are not supported")
    refused({"text_config": {**TEXT, "projection_size": 30}}, given, r"vectors of its text tower are not 32 wide")


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_prepared_as_the_processor_does(family: str, tmp_path: Path) -> None:
    module = build(family)
    process = processor(family, module)
    process.save_pretrained(saved(module, tmp_path))
    loaded = pretrained(tmp_path, part="vision")
    tokenizer: Any = loaded.tokenizers["image"]
    for picture in pictures():
        wanted = process(levels(picture), return_tensors="pt").pixel_values[0]
        assert torch.allclose(tokenizer.of.preprocess(levels(picture)), wanted, rtol=0, atol=1e-6)


def spec(*, start: str | None, end: str, pad: str | None) -> str:
    """A tokenizer.json of letters in lower case, with tokens around a text."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz?")}
    made = Tokenizer(models.WordLevel(letters, unk_token="?"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens([AddedToken(token, special=True) for token in (start, end, pad) if token])
    ids = {token: made.token_to_id(token) for token in (start, end) if token}
    around = f"{start} $A {end}" if start else f"$A {end}"
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=list(ids.items()))
    return made.to_str()


@pytest.mark.parametrize(
    ("family", "start", "pad"), [("CLIP", "<s>", None), ("Siglip", None, None), ("Siglip", None, "<pad>")]
)
def test_texts_are_those_of_the_tokenizer(family: str, start: str | None, pad: str | None, tmp_path: Path) -> None:
    module = build(family, text={**TEXT, "eos_token_id": 28 if start else 27})
    saved(module, tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text(spec(start=start, end="</s>", pad=pad), encoding="utf-8")
    file = str(tmp_path / "theirs" / "tokenizer.json")
    theirs_ = transformers.PreTrainedTokenizerFast(tokenizer_file=file, pad_token=pad or "b", eos_token="</s>")
    model = pretrained(tmp_path / "theirs").model()
    for text in ("Cat", "a dog", "abcdefgh"):
        how: dict[str, Any] = {"padding": "max_length", "max_length": LENGTH} if family == "Siglip" else {}
        ids = theirs_(text, return_tensors="pt", **how).input_ids
        tower: Any = model.packer.tokenizers["text"]
        assert tower.tokenizer(text).content.tolist() == ids[0].tolist()
        with torch.inference_mode():
            known = _pooled(module.get_text_features(input_ids=ids))
        found = model.vectors("image <-> text", [{"text": text}], side="right")[0]
        torch.testing.assert_close(found, known, rtol=0, atol=1e-5)
    model.export("hf", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "theirs" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_of_more_tokens_than_places_is_refused_by_both(family: str, tmp_path: Path) -> None:
    module = build(family)
    model, ids = pretrained(saved(module, tmp_path)).model(), [5] * LENGTH + [LAST]
    with pytest.raises(mm.MediaError, match=r"field 'text': .* it has 13 tokens, .* positions for 12; shorten it"):
        model.vectors("image <-> text", [{"text": ids}])
    with pytest.raises(ValueError, match="Sequence length must be less than max_position_embeddings"):
        module.get_text_features(input_ids=torch.tensor([ids]))


@pytest.mark.parametrize("family", FAMILIES)
def test_both_towers_learn(family: str, tmp_path: Path) -> None:
    model = pretrained(saved(build(family), tmp_path)).model().train()
    left, right = samples(family)
    pairs = [{**a, **b} for a, b in zip(left, right[: len(left)], strict=True)]
    model.loss(model.pack("image <-> text", pairs)).backward()
    still = [name for name, x in model.named_parameters() if x.grad is None or not bool(x.grad.abs().sum() > 0)]
    # the first key of a softmax cannot change it, so the biases of keys have rounding errors as gradients at most
    assert not [name for name in still if ".biases.key" not in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_of_a_small_model(family: str, tmp_path: Path) -> None:
    """The widths of CLIP ViT-B/32, and of SigLIP base at 16 pixels a patch, at a depth of 1 and with a small vocabulary."""
    text = {"vocab_size": 60, "num_hidden_layers": 1, "hidden_size": 512 if family == "CLIP" else 768}
    vision = {
        "num_hidden_layers": 1,
        "image_size": 224,
        "patch_size": 32 if family == "CLIP" else 16,
        "hidden_size": 768,
    }
    module = build(family, text, vision, **({"projection_dim": 512} if family == "CLIP" else {}))
    loaded = pretrained(saved(module, tmp_path))
    model = loaded.model()
    picture = levels(pictures()[1])
    pixels = processor(family, module)(picture, return_tensors="pt").pixel_values
    places = module.config.text_config.max_position_embeddings
    ids = IDS[1] if family == "CLIP" else (IDS[1] + [1] * places)[:places]
    with torch.inference_mode():
        wanted = [_pooled(module.get_image_features(pixel_values=pixels))]
        wanted.append(_pooled(module.get_text_features(input_ids=torch.tensor([ids]))))
    found = [model.vectors("image <-> text", [{"image": picture}], side="left")[0]]
    found.append(model.vectors("image <-> text", [{"text": ids}], side="right")[0])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
