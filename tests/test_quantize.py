"""Smaller models: products compared with whole numbers in float64, places that stay exact, files, refusals, the command, ONNX."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import multimodal as mm
from multimodal import lora, quantization
from multimodal.checkpoint import read_header
from multimodal.export.compare import padded_inputs
from multimodal.export.formats import FORMATS
from multimodal.export.programs import read_fields
from multimodal.heads import cross_entropy
from multimodal.heads.base import TiedLinear
from multimodal.quantization import FORMS, QuantizedLinear, QuantizedTable
from multimodal_tokenizers import Chat, ImagePatches, Labels, Number
from tests.serve.conftest import data_url, png, serving

CORE = mm.Core(width=32, depth=2, heads=4, kv_heads=2)
A = mm.attention
PLACES = mm.layers.SelfAttention(score=A.Cosine(learned=True), prior=A.RelativeBias(8))
CORES = {
    "core": CORE,
    "two cores": mm.EncoderDecoder(reader=CORE, writer=CORE),
    "tables of places": CORE.replace(
        learned_times=120, learned_fields=3, rotary_split=(0, 0, 0), block=(PLACES, mm.layers.MLP(bias=True))
    ),
}
LABEL, WRITE, HEAR = "image -> label", "image -> text", "sound -> text"
CLOSE = {
    "int8": 0.12,
    "int8-weights": 0.05,
    "bfloat16": 0.02,
}  # of the largest logit, with weights as large as `lively` makes them
EXACT = ("int8-weights", "bfloat16")  # inputs are not rounded, so that sums in another order stay close


@pytest.fixture
def make(tokenizers, lively):
    """make(core) -> a model that classifies, writes with tied weights, and transcribes."""

    def made(core: Any = CORE) -> mm.Model:
        write = mm.Task(WRITE, mm.NextToken(tied=True, stop_id=0))
        return lively(mm.Model(tokenizers, core, [LABEL, write, mm.Task(HEAR, mm.CTC())]))

    return made


@pytest.fixture
def sample(values):
    """sample(i) -> every field; the text is short enough for each sound."""
    return lambda number: {**values(number), "text": "ab"[: 1 + number % 2]}


def logits(model: mm.Model, task: str, samples: list[Any]) -> Tensor:
    with model.inference_mode():
        return model.logits(model.pack(task, samples))[task]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def linear(out: int, width: int, to: str) -> tuple[nn.Linear, QuantizedLinear]:
    plain = nn.Linear(width, out)
    with torch.no_grad():
        plain.weight[0] = 0  # a row that has no largest number
    small = QuantizedLinear(plain, to)
    small.fill(plain.weight.detach())
    return plain, small


@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "no kernel"])
@pytest.mark.parametrize(("width", "out"), [(64, 96), (37, 5), (1, 3)])
def test_int8_multiplies_whole_numbers_and_no_row_depends_on_another(monkeypatch, width, out, kernel):
    """Written out in float64, with inputs of every size, that are all of one sign, or zero."""
    if kernel and not quantization.has_int8_kernel(torch.device("cpu")):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(quantization, "has_int8_kernel", lambda device: kernel)
    plain, small = linear(out, width, "int8")
    x_TD = torch.randn(40, width) * torch.logspace(-6, 6, 40)[:, None]
    x_TD[3], x_TD[4], x_TD[5] = 0, x_TD[4].abs(), -1
    y_TN, bias_N = small(x_TD), plain.bias.detach()
    largest_T1 = x_TD.abs().amax(1, keepdim=True).double()
    code_TD = (x_TD / largest_T1.float().clamp(min=1e-30) * 127).round().double()
    scale_N = plain.weight.detach().double().abs().amax(1) / 63
    code_ND = torch.where(scale_N[:, None] > 0, plain.weight.detach() / scale_N[:, None], 0).round()
    wanted = code_TD @ code_ND.double().T * scale_N * largest_T1 / 127 + bias_N
    torch.testing.assert_close(y_TN.double(), wanted, rtol=1e-5, atol=1e-5)
    alone = torch.cat([small(row[None]) for row in x_TD])
    assert torch.equal(alone, y_TN) or (not kernel and torch.allclose(alone, y_TN, rtol=1e-5))
    assert small(x_TD[:0]).shape == (0, out)
    assert torch.isnan(small(torch.full((1, width), torch.nan))).all()


@pytest.mark.parametrize("to", EXACT)
def test_other_forms_multiply_by_their_own_weight(monkeypatch, to):
    monkeypatch.setattr(quantization, "BLOCK", 64)  # several blocks
    plain, small = linear(50, 24, to)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(small(x), nn.functional.linear(x, small.weight, plain.bias))
    parts = [part(x) for part in small.divided((20, 30))]
    torch.testing.assert_close(torch.cat(parts, -1) + plain.bias, small(x))
    if to == "bfloat16":
        assert torch.equal(small.weight, plain.weight.bfloat16().float())
    else:  # within half a step of the row
        step_N1 = plain.weight.abs().amax(1, keepdim=True) / 127
        assert ((small.weight - plain.weight).abs() <= step_N1 * 0.5001).all()
        assert not torch.equal(small.weight, plain.weight)


def test_where_bfloat16_has_units_it_is_multiplied_there_and_the_stream_stays_float32(monkeypatch, make, sample):
    model = make()
    small, samples = mm.quantize(model, "bfloat16"), [sample(i) for i in range(3)]
    seen = []
    product = nn.functional.linear
    monkeypatch.setattr(quantization, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(
        quantization.F,
        "linear",
        lambda x, weight, *bias: seen.append((x.dtype, weight.dtype)) or product(x, weight, *bias),
    )
    packed = quantization._Packed.multiply
    monkeypatch.setattr(
        quantization._Packed,
        "multiply",
        lambda self, x: seen.append((x.dtype, self._packed.dtype)) or packed(self, x),
    )
    found = logits(small, LABEL, samples)
    assert found.dtype == torch.float32
    assert (torch.bfloat16, torch.bfloat16) in seen
    assert difference(found, logits(model, LABEL, samples)) < 0.05


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_matrices_become_smaller_and_everything_else_stays_bit_for_bit(make, sample, core, to):
    model = make(core)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = mm.quantize(model, to)
    made = {name for name, m in small.named_modules() if isinstance(m, (QuantizedLinear, QuantizedTable))}
    wanted = {n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(("core.", "readouts."))}
    assert made == wanted | {"embeds.text", "embeds.story", "embeds.label"}
    after = small.state_dict()
    stay = {name for name in before if name.removesuffix(".weight") not in made}
    assert {name for name in after if not name.endswith((".stored", ".scale"))} == stay
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == torch.float32 for name in stay)
    if core is CORES["tables of places"]:
        assert {"core.times.weight", "core.fields.weight"} <= stay
        assert sum(".prior_weights." in name or ".score_weights." in name for name in stay) == 4
    # the original is as it was, and shares nothing that could change
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters() if p.numel()}
    for task in model.tasks:
        samples = [sample(i) for i in range(5)]
        assert 0 < difference(logits(small, task, samples), logits(model, task, samples)) < CLOSE[to]
    assert small.dtype == torch.float32
    assert not small.training


Points = mm.heads.Mean(), mm.heads.Attended(4)
EACH = {  # a head, the task that it answers, and which of its layers become smaller
    "Classify": (mm.heads.Classify(), "image -> label", {"linear"}),
    "CTC": (mm.CTC(), HEAR, {"linear"}),
    "EachRow": (mm.heads.EachRow(), "text -> copy:text", {"linear"}),
    "NextToken": (mm.NextToken(), WRITE, {"linear"}),
    "NextTurn": (mm.NextTurn(), "chat -> text", {"linear"}),
    "Masked": (mm.heads.Masked(0.5), "text -> text", {"linear"}),
    "FlowMatching": (mm.heads.FlowMatching(width=32, depth=1, steps=2), "label -> drawn", set()),
    "Pointer": (mm.heads.Pointer(), "text -> part:text", set()),
    "Regress": (mm.Regress(), "text -> number", {"linear"}),
    "Contrast": (mm.Contrast(width=16), "image <-> text", {"left", "right"}),
    "Contrast, sigmoid": (mm.Contrast(width=16, form="sigmoid", bias=("left",)), "image <-> text", {"left", "right"}),
    "Contrast, one pool": (mm.Contrast(width=16, pool=mm.heads.Mean()), "image <-> text", {"left", "right"}),
    "Contrast, two pools": (mm.Contrast(width=16, pool=Points), "image <-> text", {"left", "right"}),
    "Contrast, one map": (mm.Contrast(width=32, maps=("right",)), "image <-> text", {"right"}),
}


def outputs(model: mm.Model, task: str, sample: dict[str, Any]) -> Tensor:
    """Numbers of an answer: vectors of a pair, logits of ids, or what the head makes of states where it writes features."""
    pattern = model.packer.patterns[task]
    if pattern.pair:
        sides = [{field.name: sample[field.name] for field in fields} for fields in pattern.sides.values()]
        return torch.cat([model.vectors(task, [side]) for side in sides])
    return torch.where(torch.isfinite(found := logits(model, task, [sample])), found, 0)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("name", EACH)
def test_every_head_of_ours(tokenizers, lively, sample, tmp_path, name, to):
    head, task, wanted = EACH[name]
    given = {
        **sample(3),
        "copy": sample(3)["text"],
        "part": sample(3)["text"][:1],
        "drawn": torch.rand(8, 8).numpy(),
        "number": 0.5,
    }
    given["chat"] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": given["text"]}]
    kinds = {
        **tokenizers,
        "drawn": ImagePatches(patch=4, channels=1, size=(8, 8)),
        "chat": Chat(words="text"),
        "number": Number(),
    }
    model = lively(mm.Model(kinds, CORE.replace(depth=1), [mm.Task(task, head)]))
    small = mm.quantize(model, to)
    made = {n for n, m in small.readout(task).named_modules() if isinstance(m, QuantizedLinear)}
    assert made == wanted
    found = outputs(small, task, given)
    assert difference(found, outputs(model, task, given)) < 2 * CLOSE[to]
    assert torch.equal(outputs(mm.Model.load(small.save(tmp_path / "small")), task, given), found)


def test_no_head_is_left_out():
    public = (getattr(mm.heads, name) for name in mm.heads.__all__)
    heads = {each.__name__ for each in public if isinstance(each, type) and issubclass(each, mm.heads.Head)} - {"Head"}
    assert heads == {name.partition(",")[0] for name in EACH}


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("how", ["registered twice", "in a list"])
def test_a_matrix_in_two_places_is_one_matrix_still_and_the_original_stays(make, sample, to, how):
    model = make()
    one, other = (block.layers[1].body for block in model.core.blocks)
    if how == "registered twice":
        other.down = one.down
    else:  # as a body of one's own may hold what another has
        vars(other)["beside"] = [one.down]
        down = other.down.weight.detach().clone()
        other.register_forward_hook(lambda body, given, out: out + body.beside[0](torch.ones(body.down.in_features)))
    samples = [sample(i) for i in range(3)]
    before, state = logits(model, LABEL, samples), {n: t.clone() for n, t in model.state_dict().items()}
    small = mm.quantize(model, to)
    ours, theirs = ({id(m) for m in each.modules()} for each in (model, small))
    assert not ours & theirs
    first, second = (block.layers[1].body for block in small.core.blocks)
    assert isinstance(first.down, QuantizedLinear)
    assert (second.down if how == "registered twice" else second.beside[0]) is first.down
    assert type(one.down) is nn.Linear
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model, LABEL, samples), before)
    assert 0 < difference(logits(small, LABEL, samples), before) < 2 * CLOSE[to]
    assert how == "registered twice" or torch.equal(other.down.weight, down)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", FORMS)
def test_another_precision_of_a_smaller_model_stores_the_same(make, sample, to, precision):
    small = mm.quantize(make(), to)
    stored = {n: t.clone() for n, t in small.state_dict().items() if n.endswith(".stored")}
    written = small.generate(WRITE, image=sample(0)["image"], max_tokens=4).value
    small.to(precision)
    assert small.dtype == precision
    after = small.state_dict()
    assert all(after[n].dtype == t.dtype and torch.equal(after[n], t) for n, t in stored.items())
    found = small.generate(WRITE, image=sample(0)["image"], max_tokens=4).value
    assert precision in (torch.float16, torch.bfloat16) or found == written


@pytest.mark.parametrize("to", FORMS)
def test_places_are_exact_far_from_the_start(tokenizers, to):
    """Pixels 5,000 rows from the corner, where bfloat16 knows every 32nd row only."""
    kinds = {**tokenizers, "image": ImagePatches(patch=4, channels=1, position="learned", grid=3)}
    model = mm.Model(kinds, CORE, [LABEL]).eval()
    small = mm.quantize(model, to)
    place_TA = torch.tensor([[7.0, 5000.0, 5001.0], [4097.0, 5001.0, 0.5]])
    for width, rotation in model.core.rotations(place_TA).items():
        assert torch.equal(small.core.rotations(place_TA)[width], rotation)
    rounded = model.core.rotations(place_TA.bfloat16())[CORE.head_width]
    assert not torch.allclose(model.core.rotations(place_TA)[CORE.head_width], rounded, atol=0.1)
    content = torch.rand(5, kinds["image"].feature_size)
    assert torch.equal(small.embed("image", content), model.embed("image", content))


def test_a_tied_head_multiplies_by_the_rows_that_are_looked_up(make):
    small = mm.quantize(make(), "int8-weights")
    table, head = small.embeds["text"], small.readout(WRITE).linear
    assert isinstance(head, TiedLinear)
    assert head.table is table
    assert [name for name in small.state_dict() if "text_NextToken.linear" in name] == [
        "readouts.text_NextToken.linear.bias"
    ]
    ids, state = torch.tensor([3, 250, 0]), torch.randn(4, 32)
    torch.testing.assert_close(head(state)[:, ids], state @ table(ids).T, atol=1e-5, rtol=1e-5)


def test_a_table_with_a_factor_keeps_it(tokenizers):
    text = mm.override(tokenizers["text"], scale=5.0)
    model = mm.Model({**tokenizers, "text": text}, CORE, [mm.Task(WRITE, mm.NextToken(tied=True, stop_id=0))]).eval()
    small = mm.quantize(model, "bfloat16")
    ids = torch.arange(256)
    torch.testing.assert_close(small.embeds["text"](ids), model.embeds["text"](ids), rtol=0.01, atol=1e-6)
    torch.testing.assert_close(small.readout(WRITE).linear.weight, model.embeds["text"].weight, rtol=0.01, atol=1e-6)


def test_a_tower_has_smaller_matrices_and_exact_places(tokenizers, lively, sample):
    model = lively(mm.Model({**tokenizers, "image": mm.Tower(tokenizers["image"], CORE)}, CORE, [LABEL]))
    small = mm.quantize(model, "int8")
    inner = {name for name, m in small.named_modules() if isinstance(m, QuantizedLinear) and "frozen_part.core" in name}
    assert len(inner) == 8
    assert torch.equal(
        small.embeds["image"].frozen_part.embed.linear.weight, model.embeds["image"].frozen_part.embed.linear.weight
    )
    samples = [sample(i) for i in range(4)]
    # two cores of random weights, one behind the other; without the scales the difference is above 1
    assert difference(logits(small, LABEL, samples), logits(model, LABEL, samples)) < 4 * CLOSE["int8"]
    rounded = mm.quantize(model, "int8-weights")
    assert difference(logits(rounded, LABEL, samples), logits(model, LABEL, samples)) < CLOSE["int8-weights"]
    words = mm.quantize(mm.Model({**tokenizers, "text": mm.Tower(tokenizers["text"], CORE)}, CORE, ["text -> label"]))
    assert isinstance(words.embeds["text"].frozen_part.embed, QuantizedTable)
    assert len(logits(words, "text -> label", samples)) == 4


@pytest.mark.parametrize("to", EXACT)
@pytest.mark.parametrize("core", list(CORES.values())[:2], ids=list(CORES)[:2])
def test_single_is_batch_is_packed_is_cached(make, sample, core, to):
    small, samples = mm.quantize(make(core), to), [sample(i) for i in range(4)]
    report = mm.check.verify(small, {WRITE: [{"image": one["image"]} for one in samples]})
    assert report.passed, str(report)


def test_answers_of_int8_do_not_depend_on_the_other_samples(make, sample):
    small, samples = mm.quantize(make(), "int8"), [{"image": sample(i)["image"]} for i in range(6)]
    together = small.generate(WRITE, samples, max_tokens=6)
    alone = [small.generate(WRITE, max_tokens=6, **one) for one in samples]
    same = sum(a.tokens.content.tolist() == b.tokens.content.tolist() for a, b in zip(together, alone, strict=True))
    assert same >= 5  # a sum in another order may round to the next step


@pytest.mark.parametrize("to", FORMS)
def test_a_checkpoint_says_what_it_is_and_answers_the_same(make, sample, tmp_path, to):
    model = make(CORES["two cores"])
    small = mm.quantize(model, to)
    folder, plain = small.save(tmp_path / "small"), model.save(tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization"] == {"type": "multimodal.quantization:Quantization", "config": {"to": to}}
    assert "quantization" not in json.loads((plain / "config.json").read_text(encoding="utf-8"))
    kinds = {name: kind for name, (_, kind) in read_header(folder / "weights.safetensors").items()}
    stored = {kind for name, kind in kinds.items() if name.endswith(".stored")}
    assert stored == {"BF16" if to == "bfloat16" else "I8"}
    loaded = mm.Model.load(folder)
    assert loaded.quantization == small.quantization
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(loaded.state_dict().values(), small.state_dict().values(), strict=True)
    )
    samples = [sample(i) for i in range(3)]
    for task in model.tasks:
        assert torch.equal(logits(loaded, task, samples), logits(small, task, samples))
    given = [{"image": one["image"]} for one in samples]
    written = [[a.value for a in m.generate(WRITE, given, max_tokens=5)] for m in (loaded, small)]
    assert written[0] == written[1]
    assert mm.evaluate(loaded, LABEL, samples) == mm.evaluate(small, LABEL, samples)
    assert difference(logits(mm.Model.load(plain), LABEL, samples), logits(model, LABEL, samples)) == 0


def test_a_checkpoint_that_was_changed_is_refused(make, tmp_path):
    folder = mm.quantize(make(), "int8").save(tmp_path / "small")
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"to": "int8"', '"to": "int7"'), encoding="utf-8")
    with pytest.raises(mm.CheckpointError, match=r"quantize: to='int7' is unknown; there are 'int8', .*did you mean"):
        mm.Model.load(folder)
    path.write_text(text.replace('"to": "int8"', '"to": "bfloat16"'), encoding="utf-8")
    with pytest.raises(mm.CheckpointError, match="the weights do not fit the config"):
        mm.Model.load(folder)


def test_it_is_served(make, tmp_path):
    """The folder that was saved, by the service; what it answers is what the model answers."""
    small = mm.quantize(make(), "int8")
    folder = small.save(tmp_path / "small")
    files = {"image": png(3)}
    path = tmp_path / "one.png"
    path.write_bytes(files["image"])
    with serving(lambda: mm.Model.load(folder)) as client:
        found = [
            client.post(f"/v1/tasks/{task}", json=body).json()["answers"][0]["value"]
            for task, body in (
                (LABEL, {"fields": {"image": data_url(files["image"])}}),
                (WRITE, {"fields": {"image": data_url(files["image"])}, "max_tokens": 5}),
            )
        ]
    assert found == [small.predict(LABEL, image=path).value, small.generate(WRITE, image=path, max_tokens=5).value]


def test_what_cannot_be_done_is_refused_with_what_to_do(make, sample, tmp_path):
    model = make()
    small = mm.quantize(model)
    with pytest.raises(
        mm.ConfigError, match=r"fit: the model is quantized, .*train the original, and quantize the result"
    ):
        mm.fit(small, {LABEL: [sample(0)]}, steps=1, quiet=True)
    with pytest.raises(mm.ConfigError, match="this model is quantized to 'int8' already"):
        mm.quantize(small, "bfloat16")
    with pytest.raises(mm.ConfigError, match="to='int4' is unknown; there are 'int8', 'int8-weights', 'bfloat16'"):
        mm.quantize(model, "int4")
    with pytest.raises(mm.ConfigError, match="LoRA: the model is quantized; attach adapters to the original"):
        lora.LoRA().attach(small)
    with pytest.raises(mm.ConfigError, match="extended: the model is quantized; extend the original"):
        small.extended({"more": Labels(("a", "b"))})
    for to in ("onnx", "pt2"):
        with pytest.raises(mm.ConfigError, match=r"export: the model is quantized, .*export the original"):
            small.export(to, tmp_path / "out", task=LABEL)
    with pytest.raises(mm.ConfigError, match="would not read quantized weights; export the original"):
        small.export("hf", tmp_path / "out")
    with torch.no_grad():
        model.core.blocks[1].layers[1].body.down.weight[0, 0] = torch.nan
    with pytest.raises(mm.ConfigError, match=r"the weights in core.blocks.1.layers.1.body.down are not all finite"):
        mm.quantize(model)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_precision_is_quantized_from_float32(make, sample):
    model, samples = make(), [sample(i) for i in range(3)]
    wanted = logits(model, LABEL, samples)
    small = mm.quantize(model.double(), "bfloat16")
    assert {p.dtype for p in small.parameters()} == {torch.float32, torch.bfloat16}
    assert difference(logits(small, LABEL, samples), wanted) < CLOSE["bfloat16"]


def test_the_loss_of_a_large_vocabulary_is_computed_by_parts(monkeypatch):
    _, small = linear(50, 24, "int8")
    state, target = torch.randn(40, 24), torch.randint(50, (40,))
    whole = nn.functional.cross_entropy(small(state), target, reduction="sum")
    rows: list[int] = []
    small.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    monkeypatch.setattr(cross_entropy, "CHUNK", 350)
    with torch.no_grad():
        found = cross_entropy.linear_cross_entropy(small, state, target)
    assert rows == [7, 7, 7, 7, 7, 5]
    torch.testing.assert_close(found, whole)


def digits(folder: Path, sample: Any) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(8):
        (folder / sample(i)["label"]).mkdir(parents=True, exist_ok=True)
        pixels = (sample(i)["image"] * 255).astype("uint8")
        image.fromarray(pixels).save(folder / sample(i)["label"] / f"{i}.png")


def test_the_command_prints_both_models_side_by_side(make, sample, tmp_path, capsys):
    pytest.importorskip("cyclopts")
    from multimodal.cli import main

    model = make()
    model.save(tmp_path / "model")
    digits(tmp_path / "pictures", sample)
    line = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "small"), "--data", str(tmp_path / "pictures")]
    assert main([*line, "--to", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {name: (tmp_path / name / "weights.safetensors").stat().st_size for name in ("model", "small")}
    assert found["bytes"] == {"original": sizes["model"], "int8": sizes["small"]}
    assert list(found["tasks"]) == [LABEL]  # the data have no text
    figures = found["tasks"][LABEL]
    samples = [{"image": p, "label": p.parent.name} for p in sorted((tmp_path / "pictures").rglob("*.png"))]
    for name, m in (("original", model), ("int8", mm.Model.load(tmp_path / "small"))):
        wanted = mm.evaluate(m, LABEL, samples)
        assert {figure: figures[figure][name] for figure in wanted} == pytest.approx(wanted)
    assert main([*line, "--to", "bfloat16", "--samples", "3"]) == 0
    head, size, title, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["original", "bfloat16"]
    assert size.split()[:5] == ["bytes", "of", "the", "weights", f"{sizes['model']:,}"]
    assert title == "image -> label, 3 samples"
    assert main([*line, "--fields", "sound=image"]) == 2
    assert "--data: samples have sound, and 'image -> label' needs image, label" in capsys.readouterr().err
    assert main([*line[:-2], "--task", LABEL]) == 2
    assert "none are given; add --data" in capsys.readouterr().err


def test_the_command_never_replaces_a_model_that_is_not_quantized(make, sample, tmp_path, capsys):
    pytest.importorskip("cyclopts")
    from multimodal.cli import main

    model = make()
    run = tmp_path / "run"
    for folder in (tmp_path / "model", tmp_path / "other", run / "model", run / "best"):
        model.save(folder)
    (run / "log.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    digits(tmp_path / "pictures", sample)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refused(*words: Any) -> str:
        assert main(["quantize", *map(str, words)]) == 2
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return capsys.readouterr().err

    for given, out in (
        ("model", "model"),
        ("model", "other"),
        ("model", "link"),
        ("link", "model"),
        ("run", "run/model"),
        ("run/model", "run/best"),
        ("model", "run/../model"),
    ):
        said = refused(tmp_path / given, "--out", tmp_path / out)
        assert f"--out {tmp_path / out}: a model is here that is not quantized" in said
    assert "this is no checkpoint, and saving here would replace it" in refused(tmp_path / "model", "--out", run)
    # a sample that does not fit is found before anything is written
    (tmp_path / "pictures" / "circle").rename(tmp_path / "pictures" / "hexagon")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    data = ("--data", tmp_path / "pictures")
    assert "hexagon" in refused(tmp_path / "model", "--out", tmp_path / "small", *data)
    assert not (tmp_path / "small").exists()


def test_int8_programs_are_for_onnx(make, sample, tmp_path):
    model = make()
    with pytest.raises(mm.ConfigError, match="int8 programs are for to='onnx'; pt2 holds the weights as they are"):
        model.export("pt2", tmp_path / "out", task=LABEL, int8=True)
    with pytest.raises(mm.ConfigError, match="int8 and data are for 'onnx'"):
        model.export("hf", tmp_path / "out", int8=True)
    with pytest.raises(mm.ConfigError, match="data is for int8=True"):
        model.export("onnx", tmp_path / "out", task=LABEL, data=[sample(0)])


@pytest.mark.slow
def test_int8_programs_of_onnx_are_compared_on_data(make, sample, tmp_path):
    for name in FORMATS["onnx"].needs:
        pytest.importorskip(name, reason="the extra `export` is not installed")
    onnx = importlib.import_module("onnx")
    model = make(CORE.replace(depth=1, learned_times=120))
    samples = [sample(i) for i in range(20)]
    folder = model.export("onnx", tmp_path / "out", task=LABEL, int8=True, data=samples)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["difference"]["largest"] <= 1e-5
    entry, file = manifest["int8"], folder / "answer.onnx"
    assert [path.name for path in sorted(folder.iterdir())] == ["answer.onnx", "manifest.json"]
    assert entry["bytes"] == file.stat().st_size < 0.8 * entry["bytes_before"]
    assert 0 < entry["largest"] < 0.2
    # the program alone, beside what the model answers
    run = FORMATS["onnx"].read({"answer": file})
    tokens = [{"image": model.packer.tokenizers["image"](one["image"])} for one in samples]
    best = [
        run("answer", padded_inputs(model, read_fields(model, LABEL), tokens[i : i + 16]))["logits"].argmax(-1)
        for i in (0, 16)
    ]
    names = ("circle", "square", "star")
    same = [
        names[i] == model.predict(LABEL, image=s["image"]).value for i, s in zip(torch.cat(best), samples, strict=True)
    ]
    assert entry["data"] | {"largest": 0} == {"samples": 20, "rows": 20, "same": sum(same) / 20, "largest": 0}
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(file).graph.initializer}
    exact = {name for name in kinds if name.startswith(("model.core.times.", "model.embeds.image."))}
    assert len(exact) >= 2
    assert {kinds[name] for name in exact} == {onnx.TensorProto.FLOAT}
    assert sum(kind == onnx.TensorProto.INT8 for name, kind in kinds.items() if name.endswith("_quantized")) == 5
