"""`Model.export` to programs: the folder, the manifest, what is refused, and faults that the comparison finds before writing."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import multimodal as mm
from multimodal.export import MOST, formats, padded, programs
from multimodal.export.programs import NEXT
from multimodal_tokenizers import Features, Labels, TextBPE

CORE = mm.Core(width=32, depth=1, heads=4, kv_heads=2)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_has_programs_a_manifest_and_the_files_of_tokenizers(tokenizers, lively, untraced, tmp_path):
    pieces = TextBPE.train(["the cat and the dog"] * 3, vocab_size=260)
    model = lively(mm.Model({**tokenizers, "text": pieces}, CORE, ["image -> text", "image -> label"]))
    folder = model.export("pt2", tmp_path / "out", task="image -> text")
    assert files_of(folder) == ["manifest.json", "prefill.pt2", "step.pt2", "tokenizers/text/tokenizer.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (made := tmp_path / "made").mkdir()
    assert folder.stat().st_mode == made.stat().st_mode  # others may read it as any folder
    manifest = manifest_of(folder)
    assert manifest["task"] == "image -> text"
    assert manifest["versions"] == {"torch": version("torch")}
    assert manifest["difference"]["largest"] <= 1e-5 < manifest["difference"]["allowed"] == MOST
    assert set(manifest["tokenizers"]) == {"image", "text"}
    assert manifest["tokenizers"]["text"]["files"] == ["tokenizer.json"]
    assert manifest["answer"]["kind"] == "text"
    assert manifest["answer"]["stop"] == pieces.vocab_size
    prefill, step = manifest["programs"]["prefill"], manifest["programs"]["step"]
    assert prefill["fields"] == {"image": "image"}
    assert {entry["name"]: entry["axes"] for entry in prefill["inputs"]} == {
        "image": ["batch", "image_tokens", 18],
        "image.place": ["batch", "image_tokens", 3],
        "image.length": ["batch"],
    }
    given = {entry["name"] for entry in step["inputs"]} - {"token", "token.place"}
    assert {entry["name"].removesuffix(NEXT) for entry in prefill["outputs"]} == given | {"logits"}


def test_the_manifest_says_what_outputs_mean(tokenizers, lively, untraced, tmp_path):
    tasks = [
        "image -> label",
        mm.Task("sound -> text", mm.CTC()),
        mm.Task("image <-> text", mm.Contrast(form="sigmoid")),
    ]
    model = lively(mm.Model(tokenizers, CORE, tasks))
    answers = {}
    for number, task in enumerate(model.tasks):
        answers[task] = manifest_of(model.export("pt2", tmp_path / str(number), task=task))["answer"]
    assert answers["image -> label"]["labels"] == ["circle", "square", "star"]
    assert answers["sound -> text"]["blank"] == 256
    pair = answers["image <-> text"]
    assert (pair["probability"], round(pair["scale"], 3), round(pair["bias"], 3)) == ("sigmoid", 10.0, -10.0)


def test_a_model_in_training_is_exported_as_it_answers_and_stays_in_training(tokenizers, untraced, tmp_path):
    model = mm.Model(tokenizers, CORE.replace(dropout=0.5), ["image -> label"]).train()
    model.export("pt2", tmp_path / "out")
    assert model.training
    assert untraced.made["answer"].model.core is not model.core


class Looks(nn.Module):
    """An embedding of one's own that looks at what a tensor holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width)

    def forward(self, content):
        return self.linear(content) if bool(content.sum() > 0) else self.linear(content) * 2


@dataclass(frozen=True)
class Readings(Features):
    def embed(self, width):
        return Looks(width)


def refusals() -> dict[str, tuple[mm.Core | mm.EncoderDecoder, str | mm.Task, str]]:
    block = (mm.layers.SelfAttention(), mm.layers.Recurrent())
    two = mm.EncoderDecoder(reader=CORE, writer=CORE)
    return {
        "head": (CORE, mm.Task("image -> image", mm.Masked(0.5)), "Masked cannot be exported, only those of Classify, CTC"),
        "layer": (CORE.replace(block=block), "image -> label", "Recurrent carries a state from token to token"),
        "layer of a writer": (
            two.replace(writer=CORE.replace(block=block)), "image -> text", "Recurrent carries a state from token to token",
        ),
        "start": (two, mm.Task("image -> story", mm.NextToken(start_ids=())), "needs a field to read and a start token"),
        "nothing read": (two, "-> text", "needs a field to read and a start token"),
    }  # fmt: skip


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_exported_is_refused_by_name(tokenizers, tmp_path, name):
    core, task, message = refusals()[name]
    with pytest.raises(mm.ConfigError, match=message):
        mm.Model(tokenizers, core, [task]).eval().export("pt2", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_looks_at_values_is_refused_with_what_to_do(tmp_path):
    model = mm.Model({"sensor": Readings(3), "label": Labels(("a", "b"))}, CORE, ["sensor -> label"]).eval()
    with pytest.raises(
        mm.ConfigError, match=r"(?s)'answer': torch.export cannot trace it: .*no branch on what a tensor holds"
    ):
        model.export("pt2", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_mistakes_are_refused(tokenizers, untraced, tmp_path):
    model = mm.Model(tokenizers, CORE, ["image -> label", "text -> label"]).eval()
    with pytest.raises(mm.ConfigError, match="several tasks; name one of 'image -> label', 'text -> label'"):
        model.export("pt2", tmp_path / "out")
    with pytest.raises(mm.TaskError, match=r"no task 'image -> lable'.*did you mean 'image -> label'"):
        model.export("pt2", tmp_path / "out", task="image -> lable")
    with pytest.raises(mm.ConfigError, match="'hf' takes the whole model, so leave task='image -> label' out"):
        model.export("hf", tmp_path / "out", task="image -> label")
    with pytest.raises(mm.ConfigError, match="the weights are bfloat16; programs compute in float32"):
        mm.Model(tokenizers, CORE, ["image -> label"]).bfloat16().export("pt2", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(mm.CheckpointError, match="there are files here already; choose another folder"):
        model.export("pt2", tmp_path / "full", task="image -> label")
    assert files_of(tmp_path) == ["full/mine.txt"]


def test_a_missing_package_is_named_with_what_to_install(tokenizers, monkeypatch, tmp_path):
    monkeypatch.setattr(formats.ONNX, "needs", ("onnx_that_nobody_has",))
    model = mm.Model(tokenizers, CORE, ["image -> label"]).eval()
    with pytest.raises(
        mm.ConfigError, match=r"is not installed .*pip install 'multimodal-stream\[export\]', or export to pt2"
    ):
        model.export("onnx", tmp_path / "out")


def own_pool() -> mm.heads.Pool:
    @dataclass(frozen=True)
    class Largest(mm.heads.Pool):
        def pool(self, state_ND, lengths, weights):
            return torch.stack([part.amax(0) for part in state_ND.split(list(lengths))])

    return Largest()


def test_a_pool_of_ones_own_says_how_it_pools_padded_states(tokenizers, untraced, tmp_path):
    model = mm.Model(tokenizers, CORE, [mm.Task("image -> label", mm.Classify(pool=own_pool()))]).eval()
    with pytest.raises(mm.ConfigError, match="Largest: this pool has no `padded`"):
        model.export("pt2", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def planted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One fault in what padded programs do."""
    plan, known, rows = padded.PaddedPlan, padded.TokenInfo, padded.lay_out
    if name == "padding is attended to":
        make = plan.__init__

        def init(self, rule, queries, keys, *rest, **more):
            make(self, rule, queries, replace(keys, valid_BT=keys.valid_BT | True), *rest, **more)

        monkeypatch.setattr(plan, "__init__", init)
    elif name == "the mask is dropped":
        make_ruled = plan.__init__
        monkeypatch.setattr(plan, "__init__", lambda self, rule, *rest, **more: make_ruled(self, None, *rest, **more))
    elif name == "times do not go on from field to field":

        def at_zero(model, fields, start, inputs):
            found = rows(model, fields, start, inputs)
            return replace(found, position_BTA=found.position_BTA % 4)

        monkeypatch.setattr(programs, "lay_out", at_zero)
    elif name == "the written token has the order of the one before it":
        of = known.from_numbers
        monkeypatch.setattr(
            known, "from_numbers", lambda numbers: replace(of(numbers), valid_BT=of(numbers).mask_info.order > 0)
        )
    elif name == "keys are not cached":
        attend = plan.attend

        def forgetful(self, *args):
            read = attend(self, *args)
            self.joined |= {layer: (k * 0, v) for layer, (k, v) in self.joined.items()}
            return read

        monkeypatch.setattr(plan, "attend", forgetful)
    elif name == "the answer begins a step too late":
        states = programs.Prefill.forward

        def late(self, inputs):
            found = states(self, inputs)
            return {**found, "answer.time.next": found["answer.time.next"] + 1}

        monkeypatch.setattr(programs.Prefill, "forward", late)
    elif name == "not a number":
        monkeypatch.setattr(programs.Step, "forward", lambda self, inputs: {"logits": torch.tensor(torch.nan)})
    else:
        raise AssertionError(name)


FAULTS = (
    *("padding is attended to", "the mask is dropped", "times do not go on from field to field", "keys are not cached"),
    *("the written token has the order of the one before it", "the answer begins a step too late", "not a number"),
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_before_anything_is_written(
    tokenizers, lively, untraced, monkeypatch, tmp_path, fault
):
    model = lively(mm.Model(tokenizers, CORE.replace(depth=2, prior=mm.attention.ALiBi()), ["image story -> text"]))
    model.export("pt2", tmp_path / "good")
    planted(monkeypatch, fault)
    with pytest.raises(
        mm.ConfigError, match=r"to pt2: what the programs compute differs from the model by .*, and at most"
    ):
        model.export("pt2", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_the_command_exports_and_prints_the_difference(tokenizers, lively, untraced, tmp_path, capsys):
    pytest.importorskip("cyclopts")
    from multimodal.cli import main

    lively(mm.Model(tokenizers, CORE, ["image -> label", "image -> text"])).save(tmp_path / "model")
    line = ["export", str(tmp_path / "model"), "--to", "pt2", "--out", str(tmp_path / "out"), "--task", "image->label"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "answer.pt2, manifest.json" in out
    assert "largest difference from the model on samples of 3 shapes:" in out
    assert main(line) == 2
    assert "there are files here already" in capsys.readouterr().err
    assert main([*line[:-3], str(tmp_path / "json"), "--task", "image -> text", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == ["manifest.json", "prefill.pt2", "step.pt2"]
