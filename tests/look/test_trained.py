"""The X-ray of trained weights of others: its maps are the attention weights of transformers, and it draws what they look at."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import multimodal as mm
from multimodal.attention import Trace
from multimodal.look import XRay, inside, xray
from multimodal.look.drawing import own_looks, panels, without_sink, without_tail
from multimodal.look.page import page
from multimodal.pretrained import pretrained
from multimodal.tower import Dropped, Tower
from tests.pretrained.compared import saved
from tests.pretrained.pictured import normalised, pictures, tokens
from tests.pretrained.test_towers import EYE, TEXT

transformers = pytest.importorskip("transformers")

PAIR = "image <-> other:image"
(PICTURE,) = pictures([(8, 12)])
"""Four rows and six columns of patches."""


def eager(name: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    config._attn_implementation = "eager"  # the others write no weights down
    return config


def eye(folder: Path, registers: int = 0) -> tuple[Any, Any]:
    """The vision transformer of transformers, and as ours."""
    name, more = ("Dinov2WithRegisters", {"num_register_tokens": registers}) if registers else ("Dinov2", {})
    module = getattr(transformers, f"{name}Model")(eager(name, {**EYE, **more}))
    return module, pretrained(saved(module, folder / "eye"))


def maps(ray: XRay) -> list[Tensor]:
    return [layer.posterior_HTM.float() for layer in ray.layers]


def check_equal(found: list[Tensor], wanted: Any) -> None:
    assert len(found) == len(wanted) > 1
    for have_HTM, want_HTM in zip(found, wanted, strict=True):
        assert float(want_HTM.amax(-1).mean()) > 1.2 / want_HTM.shape[-1]  # not the same for all keys
        torch.testing.assert_close(have_HTM, want_HTM, atol=1e-5, rtol=0)


@pytest.mark.parametrize("registers", [0, 3])
def test_heads_of_dinov2_are_those_of_transformers(registers: int, tmp_path: Path) -> None:
    module, loaded = eye(tmp_path, registers)
    ray = xray(loaded.model(), PAIR, {"image": tokens(loaded, PICTURE)})
    with torch.inference_mode():
        wanted = module(normalised(PICTURE), output_attentions=True).attentions
    check_equal(maps(ray), [x[0] for x in wanted])
    assert ray.asked_N.tolist() == [0]
    # the photograph is under the patches, and the class token is no patch
    field = ray.fields["image"]
    assert (field.flat, field.learned, field.grid, len(field)) == (True, 1 + registers, (4, 6), 25 + registers)
    assert field.labels[:2] == (("class token", "row 0, column 0") if registers == 0 else ("learned 0", "learned 1"))
    (tiles, _), text = panels(ray), page(ray)
    assert "bars: class token" in tiles.title if registers == 0 else "bars: learned 0 to 3" in tiles.title
    heat_N = torch.stack([x[0].mean(0)[0] for x in wanted])[0]
    assert text.count('class="learned"') == 2 * (1 + 3)  # of each block the mean and the heads
    assert f'title="{field.labels[0]}: {float(heat_N[0]):.1%}"' in text
    assert f'title="row 1, column 2: {float(heat_N[1 + registers + 8]):.1%}"' in text
    ray.draw(tmp_path / "x.png")


def test_heads_of_llama_are_those_of_transformers(tmp_path: Path) -> None:
    module = transformers.LlamaForCausalLM(eager("Llama", TEXT))
    model = pretrained(saved(module, tmp_path)).model()
    read, written = [5, 9, 3, 60, 11], [7, 1, 30]
    ray = xray(model, "text -> text", {"text": read}, answer=written)
    with torch.inference_mode():
        wanted = module(torch.tensor([read + written]), output_attentions=True).attentions
    check_equal(maps(ray), [x[0] for x in wanted])


def test_heads_of_whispers_encoder_are_those_of_transformers(tmp_path: Path) -> None:
    settings = {
        "vocab_size": 99, "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 2, "decoder_layers": 1,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 8,
        "max_source_positions": 50, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 3,
    }  # fmt: skip
    module = transformers.WhisperForConditionalGeneration(eager("Whisper", settings))
    model = pretrained(saved(module, tmp_path)).model()
    (task,) = model.tasks
    sound = 0.1 * torch.randn(6400, generator=torch.Generator().manual_seed(0))  # 0.4 of the second that it reads
    frames_NF = model.packer.tokenizers["audio"]((sound.numpy(), 16000)).content.reshape(-1, 8)
    ray = xray(model, task, {"audio": (sound.numpy(), 16000)}, answer=[5, 9])
    with torch.inference_mode():
        wanted = module.model.encoder(frames_NF.T[None], output_attentions=True).attentions
    check_equal(maps(ray)[:2], [x[0] for x in wanted])

    # the silence behind the sound is not drawn, and its share is said
    field = ray.fields["audio"]
    own = own_looks(ray, field)
    assert [layer.name for layer, _ in own] == ["reader block 1 self", "reader block 2 self"]
    cut, looks, note = without_tail(field, own)
    assert 20 <= len(cut) <= 22 < len(field) == 50
    assert cut.picture_YXC is not None
    assert cut.picture_YXC.shape[1] == 2 * len(cut)
    share = sum(float(x[0, ..., len(cut) :].sum(-1).mean()) for x in wanted) / 2
    assert note == f"; not shown: {50 - len(cut)} equal tokens at its end, which get {100 * share:.0f} %"
    torch.testing.assert_close(looks[1][1].float(), wanted[1][0, ..., : len(cut)], atol=1e-5, rtol=0)
    titles = [panel.title for panel in panels(ray)]
    assert [title.split(" (")[0] for title in titles[:2]] == [
        "audio: where the answer looked, a row for each head",
        "audio: which token",
    ]
    ray.draw(tmp_path / "x.png")
    ray.page(tmp_path / "x.html")


def seeing(folder: Path) -> tuple[Any, Any, mm.Model]:
    """The eye of transformers, as ours, and a language model that sees by it."""
    module, loaded = eye(folder)
    words = pretrained(saved(transformers.LlamaForCausalLM(eager("Llama", TEXT)), folder / "words"))
    tower = Tower.of(loaded, Dropped(1), kind="image")
    inner: Any = tower.tokenizer
    tower = replace(tower, tokenizer=replace(inner, of=replace(inner.of, fit=None, mean=0.5, std=0.5)))
    return module, loaded, words.model([mm.Task("image text -> text", words.tasks[0].head)], {"image": tower})


def test_inside_a_tower_are_the_heads_that_it_has_alone_and_in_the_model(tmp_path: Path) -> None:
    module, loaded, model = seeing(tmp_path)
    within = inside(model, "image")
    ray = xray(within, PAIR, {"image": PICTURE})
    with torch.inference_mode():
        wanted = module(normalised(PICTURE), output_attentions=True).attentions
    check_equal(maps(ray), [x[0] for x in wanted])
    check_equal(maps(ray), maps(xray(loaded.model(), PAIR, {"image": tokens(loaded, PICTURE)})))
    # what is handed on asks, and that is not the class token
    assert ray.asked_N.tolist() == list(range(1, 25))
    assert panels(ray)[0].title.startswith("image: where the answer looked")
    picture_YXC = ray.fields["image"].picture_YXC
    assert picture_YXC is not None
    torch.testing.assert_close(picture_YXC, PICTURE.permute(1, 2, 0), atol=1e-6, rtol=0)

    # the same happens in a forward pass of the whole model
    trace = Trace()
    part: Any = model.embeds["image"].frozen_part
    hook = part.core.register_forward_pre_hook(
        lambda _, args, more: (args, {**more, "trace": trace, "backend": "dense"}), with_kwargs=True
    )
    outer = xray(model, "image text -> text", {"image": PICTURE, "text": [5, 9]}, answer=[3])
    hook.remove()
    check_equal(maps(ray), [seen.weight_BHTM[0] for seen in trace.seen[:2]])
    assert (outer.fields["image"].grid, outer.fields["image"].learned) == ((4, 6), 0)
    assert outer.fields["image"].flat
    # the weights are the tower's own
    assert within.core is part.core
    assert within.embeds["image"] is part.embed


def test_a_model_without_towers_has_no_inside(tmp_path: Path) -> None:
    _, _, model = seeing(tmp_path)
    with pytest.raises(mm.ConfigError, match="inside: 'text' is no tower; the towers are image"):
        inside(model, "text")
    with pytest.raises(mm.ConfigError, match="'image' is no tower; this model has no tower"):
        inside(inside(model, "image"), "image")


def test_of_a_pair_one_side_is_looked_at(tmp_path: Path) -> None:
    _, loaded = eye(tmp_path)
    model, value = loaded.model(), tokens(loaded, PICTURE)
    right = xray(model, PAIR, {"other": value})
    check_equal(maps(right), maps(xray(model, PAIR, {"image": value, "other": None})))
    torch.testing.assert_close(right.prediction.value, model.vectors(PAIR, [{"other": value}])[0], atol=1e-5, rtol=0)
    with pytest.raises(mm.TaskError, match="has two sides, and both came; give the fields of one, image or other"):
        xray(model, PAIR, {"image": value, "other": value})
    with pytest.raises(mm.TaskError, match="and none came"):
        xray(model, PAIR, {})


def test_the_sink_of_a_causal_text_is_not_shaded(tmp_path: Path) -> None:
    module = transformers.LlamaForCausalLM(eager("Llama", TEXT))
    model = pretrained(saved(module, tmp_path)).model()
    ray = xray(model, "text -> text", {"text": list(range(4, 24))}, answer=[7, 1])
    assert ray.sink is None
    # the same model, if all heads looked at the first token
    score = [
        layer.score_HTM.index_add(-1, torch.tensor([0]), torch.full_like(layer.score_HTM[..., :1], 9))
        for layer in ray.layers
    ]
    sunk = replace(ray, layers=tuple(replace(x, score_HTM=s) for x, s in zip(ray.layers, score, strict=True)))
    assert sunk.sink == 0
    field, looks = sunk.fields["text"], list(sunk.looking_at("text"))
    others, note = without_sink(sunk, field, looks)
    share = sum(float(heat[:, 0].mean()) for _, heat in looks) / 2
    assert note.endswith(f"({100 * share:.0f} %)")
    assert 0.9 < share < 1
    assert all(
        float(heat[:, 0].max()) == 0 and torch.equal(heat[:, 1:], x[:, 1:])
        for (_, heat), (_, x) in zip(others, looks, strict=True)
    )
    assert all("not shaded: the first token" in panel.title for panel in panels(sunk)[:2])
    assert "background:#ddd" in page(sunk)
    # heads are as sharp as what else they read
    layer = sunk.layers[0]
    asked_HTM = layer.posterior_HTM[:, sunk.asked(layer)]
    keys_T = layer.seen_HTM[0, sunk.asked(layer)].sum(-1)
    wanted_H = (asked_HTM * (asked_HTM * keys_T[:, None]).clamp(min=1e-300).log())[..., 1:].sum(-1).mean(-1)
    torch.testing.assert_close(sunk.sharpness(layer), wanted_H)
