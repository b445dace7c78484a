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


def test_an_export_goes_to_any_folder_that_is_new_or_empty(tokenizers, lively, untraced, tmp_path, monkeypatch):
    model, task = lively(mm.Model(tokenizers, CORE, ["image -> label"])), "image -> label"
    for name in ("empty", "led to", "current", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").write_text("mine")
    for link, to in (("link", "led to"), ("dangling", "new/deep"), ("to full", "full"), ("loop", "loop")):
        (tmp_path / link).symlink_to(tmp_path / to)
    monkeypatch.chdir(tmp_path / "current")
    whole = ["answer.pt2", "manifest.json"]
    good = {
        "..": "../full",
        "empty": "empty",
        "link": "led to",
        "dangling": "new/deep",
        ".": "current",
        "a/b/../c": "a/c",
    }
    for name in ("empty", "link", "dangling", "a/b/../c", "x/y"):
        assert model.export("pt2", tmp_path / name, task=task) == tmp_path / name
        assert files_of(tmp_path / good.get(name, name)) == whole
    assert (tmp_path / "link").is_symlink()
    for name in ("", "current/new"):
        if name:
            (tmp_path / "current" / "current").mkdir()
            monkeypatch.chdir(tmp_path / "current" / "current")
        model.export("pt2", name, task=task)
    assert files_of(tmp_path / "current") == sorted([*whole, *(f"current/current/new/{one}" for one in whole)])
    before = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    for name, why in (
        ("full", "there are files here already"),
        ("to full", "there are files here already"),
        ("file", "there are files here already"),
        ("file/out", r"cannot be written \(Not a directory\)"),
        ("file/out/deep", r"cannot be written \(Not a directory\)"),
        ("n" * 300, r"cannot be written \(File name too long\)"),
        ("new2/" + "n" * 300, r"cannot be written \(File name too long\)"),
        ("loop", "there are files here already"),
        ("a\0b", r"cannot be written \(.*null"),
    ):
        monkeypatch.setattr(untraced, "write", lambda *_: pytest.fail("work before the check"))
        with pytest.raises(mm.CheckpointError, match=f"{why}.*choose another folder"):
            model.export("pt2", tmp_path / name, task=task)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("there", [True, False])
def test_of_two_exports_at_once_one_wins_and_nothing_is_left(
    tokenizers, lively, untraced, tmp_path, monkeypatch, there
):
    model, folder = lively(mm.Model(tokenizers, CORE, ["image -> label"])), tmp_path / "out"
    if there:
        folder.mkdir()
    write, others = untraced.write, [folder]

    def other_first(program, path):
        if others:
            found = None
            try:
                others.pop() and model.export("pt2", folder)
            except mm.CheckpointError as error:
                found = error
            assert (found is not None) == there  # the first that is in a folder has it
        write(program, path)

    monkeypatch.setattr(untraced, "write", other_first)
    if there:
        model.export("pt2", folder)
    else:
        with pytest.raises(mm.CheckpointError, match="there are files here already"):
            model.export("pt2", folder)
    assert files_of(tmp_path) == ["out/answer.pt2", "out/manifest.json"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_full_disk_is_an_error_and_leaves_nothing(tokenizers, lively, full_disk, tmp_path, to, there):
    for name in formats.FORMATS["onnx"].needs if to == "onnx" else ():
        pytest.importorskip(name, reason="the extra `export` is not installed")
    model = lively(mm.Model(tokenizers, CORE, ["text -> label"]))
    folder = tmp_path / "deep" / "out"
    if there:
        folder.mkdir(parents=True)
    with full_disk(), pytest.raises(mm.CheckpointError, match=r"out: cannot be written \(.*(too large|27).*make room"):
        model.export(to, folder)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "deep", folder] if there else [])


A = mm.attention
PLACES = {
    "table of times": CORE.replace(learned_times=12),
    "score": CORE.replace(score=A.LocationBased(12)),
    "prior": CORE.replace(prior=A.MixingWeights(12)),
    "tables of a reader and a writer": mm.EncoderDecoder(
        reader=CORE.replace(learned_times=12), writer=CORE.replace(learned_times=8)
    ),
    "score of a reader": mm.EncoderDecoder(reader=CORE.replace(score=A.LocationBased(12)), writer=CORE),
    "score of a writer": mm.EncoderDecoder(reader=CORE, writer=CORE.replace(score=A.LocationBased(12))),
    "none": CORE,
}


@pytest.mark.parametrize("core", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(
    "task",
    [
        mm.Task("story text -> label"),
        mm.Task("story text -> label", mm.Classify(pool=mm.heads.Mean(skip=2))),
        mm.Task("story <-> text"),
        mm.Task("story -> text"),
    ],
    ids=["classes", "pool", "pair", "texts"],
)
def test_the_manifest_says_which_samples_the_model_refuses(tokenizers, lively, untraced, tmp_path, core, task):
    model = lively(mm.Model(tokenizers, core, [task]))
    (pattern,) = model.tasks
    manifest = manifest_of(model.export("pt2", tmp_path / "out"))
    (name, program), *_ = [(name, p) for name, p in manifest["programs"].items() if "tokens" in p]

    def answered(count: int, written: int = 1) -> bool:
        sample = dict.fromkeys(("story", "text")) | ({"story": "a" * count} if count else {})
        try:
            if name == "left":
                model.vectors(pattern, [{"story": sample["story"]}], side="left")
            elif name == "prefill":
                model.generate(pattern, story=sample["story"], max_tokens=written)
            else:
                model.predict(pattern, **sample)
        except ValueError:
            return False
        return True

    bounds = program["tokens"]
    shared = 1 if name == "prefill" and manifest["most_tokens"] is not None else 0
    found = [count for count in range(40) if answered(count)]
    assert found[0] == bounds["least"]
    assert found == list(range(found[0], found[-1] + 1))
    assert (None if found[-1] == 39 else found[-1] + shared) == bounds["most"]
    if name == "prefill" and manifest["most_tokens"] is None:
        written = max(count for count in range(1, 20) if answered(3, count))
        assert manifest["answer"]["most"] == (None if written == 19 else written)


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
