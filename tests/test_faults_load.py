"""Whatever is in a file of somebody else's: a right value or an error of ours, soon, and none of its code is run."""

import io
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import multimodal as mm
from multimodal.data import Shards, index_archives
from multimodal.data.codecs import encoded
from multimodal.shapes import CheckpointError, ConfigError, MediaError, ShapeError, StreamError
from multimodal.train.processes import Processes
from multimodal_tokenizers import Labels, TextBPE, TextBytes
from tests.hostile import (
    DATA,
    ENTRIES,
    PLAIN,
    STRANGE,
    TASK,
    Entry,
    every_field,
    make_all,
    make_model,
    open_making,
    open_model,
    open_report,
    open_run,
    open_shards,
    open_spike,
)

OURS = (CheckpointError, ConfigError, MediaError, ShapeError, StreamError)
SECONDS = 10


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("good"))


def outcome(entry: Entry, good: Path, folder: Path) -> str:
    """What became of it: "value", or our error's text. Anything else is raised."""
    shutil.copytree(good, folder)
    entry.make(folder)
    begun = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # damaged states are put aside with one
            entry.door(folder)
    except OURS as error:
        found = str(error)
    else:
        found = "value"
    assert time.monotonic() - begun < SECONDS
    assert not (folder / "pickle_was_read").exists()
    return found


def test_fault_82_the_good_ones_are_read(good, tmp_path):
    for door in {entry.door for entry in ENTRIES} - {open_making}:
        if not door.__name__.endswith(("picture", "sound")):
            assert outcome(Entry("good", door, lambda folder: None), good, tmp_path / door.__name__) == "value"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_fault_83_hostile_files_end_in_our_errors(entry, good, tmp_path):
    told = outcome(entry, good, tmp_path / "x")
    rows = entry.door.__name__ == "open_rows"  # whose broken rows are values
    spared = ("a manifest", "a state", "moments", "one moment", "all moments", "a pickle", "a step count")
    reads_on = entry.name.startswith(spared) and told == "value"  # from the state before, with a warning
    config = entry.name.startswith(("a nested config", "a config of"))  # a report says that there is none
    assert told != "value" or rows or config or (reads_on and "manifest" in entry.name), told
    assert "swordfish" not in told
    assert len(told) < 5000


EVERY_FIELD = pytest.mark.parametrize(
    ("path", "door", "sealed"),
    [
        ("model/config.json", open_model, False),
        ("run/checkpoints/*/state.json", open_run, True),
        ("run/checkpoints/*/manifest.json", open_run, False),
        ("run/config.json", open_report, False),
        ("shards/index.json", open_shards, False),
        ("trouble/trouble-0.json", open_spike, False),
    ],
)


@pytest.fixture
def no_curves(monkeypatch):
    """Runs draw no curves, which take most of their time and do not depend on what is read."""
    monkeypatch.setattr(sys.modules["multimodal.train.loop"], "draw_curves", lambda history, path: None)


def end_in_our_errors(entries: Sequence[Entry], good: Path, folder: Path) -> None:
    for number, entry in enumerate(entries):
        try:
            outcome(entry, good, folder)
        except Exception as error:
            raise AssertionError(f"{number}, {entry.name}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
@EVERY_FIELD
def test_fault_83a_every_field_may_hold_anything(path, door, sealed, good, tmp_path):
    """Every field holds some of the strange values, other ones than its neighbours."""
    entries = every_field(path, door, good, sealed)
    assert len(entries) > 20
    each = len(STRANGE) + 1  # one more where the field is not there
    fields = len(entries) // each
    most = max(1, min(each, (24 if door is open_run else 60) // fields))
    chosen = [entries[field * each + (field + n * each // most) % each] for field in range(fields) for n in range(most)]
    end_in_our_errors(chosen, good, tmp_path / "x")


@pytest.mark.training
@pytest.mark.usefixtures("no_curves")
@EVERY_FIELD
def test_fault_83f_every_field_may_hold_every_strange_value(path, door, sealed, good, tmp_path):
    end_in_our_errors(every_field(path, door, good, sealed), good, tmp_path / "x")


def test_fault_03_a_pickle_is_refused_by_name_and_read_only_where_trusted(good, tmp_path, monkeypatch):
    entry = next(e for e in ENTRIES if e.name == "a pickle in a state")
    told = outcome(entry, good, tmp_path / "x")
    assert "sharded: an earlier version wrote this state with Python's pickle" in told
    assert "MULTIMODAL_TRUST_PICKLE_IN" in told
    run = tmp_path / "x" / "run"
    settings = {**PLAIN, "folder": run, "resume": True}
    # not where training is not shared out, nor for another folder
    for parallel, trusted in (("ddp", run), ("fsdp", tmp_path), ("fsdp", "")):
        monkeypatch.setenv("MULTIMODAL_TRUST_PICKLE_IN", str(trusted))
        with pytest.raises(CheckpointError, match="pickle"):
            mm.fit(make_model(), {TASK: DATA}, **settings, parallel=parallel)
        assert not (tmp_path / "x" / "pickle_was_read").exists()


def test_fault_03a_pieces_of_any_number_of_processes_are_read_by_one(tmp_path):
    from multimodal.train.sharded_tensors import ShardedTensors, write_sharded

    whole = {
        "a": torch.arange(15.0).reshape(5, 3),
        "b": torch.tensor(7.0),
        "c": torch.arange(6.0).reshape(2, 3),
        "d": torch.zeros(0, 3),
    }
    write_sharded(tmp_path / "one", whole, Processes())
    assert not list(tmp_path.rglob(".metadata"))
    index = {
        "a": {"shape": [5, 3], "dtype": "F32", "axis": 0, "rows": [2, 2, 1]},
        "b": {"shape": [], "dtype": "F32"},
        "c": {"shape": [2, 3], "dtype": "F32", "axis": 1, "rows": [1, 1, 1]},
        "d": {"shape": [0, 3], "dtype": "F32", "axis": 0, "rows": [0, 0, 0]},
    }
    (tmp_path / "three").mkdir()
    for number in range(3):
        own = {"a": whole["a"][2 * number : 2 * number + 2].clone(), "c": whole["c"][:, number : number + 1].clone()}
        own |= {"b": whole["b"]} if number == 0 else {}
        save_file({name: t.contiguous() for name, t in own.items()}, tmp_path / "three" / f"{number:05d}.safetensors")
    (tmp_path / "three" / "index.json").write_text(json.dumps({"format": 1, "processes": 3, "tensors": index}))
    like = {name: torch.full_like(t, -1) for name, t in whole.items()}
    for folder in ("one", "three"):
        found = ShardedTensors(tmp_path / folder).read(like)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], t) for name, t in whole.items())
    (tmp_path / "three" / "00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00001\.safetensors: missing, damaged or cut short"):
        ShardedTensors(tmp_path / "three").read(like)
    index["a"]["rows"] = [2, 2, 2]
    (tmp_path / "three" / "index.json").write_text(json.dumps({"format": 1, "processes": 3, "tensors": index}))
    with pytest.raises(CheckpointError, match="do not make the shape"):
        ShardedTensors(tmp_path / "three")


def test_fault_59_no_program_is_run_in_a_users_folder(tmp_path, monkeypatch):
    from multimodal.train.display import environment

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    hook = tmp_path / "hook"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path / 'was_run'}\n")
    hook.chmod(0o755)
    with (tmp_path / ".git" / "config").open("a") as file:
        file.write(f"[core]\n\tfsmonitor = {hook}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"ran {a}"))
    environment()
    assert not (tmp_path / "was_run").exists()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/../../../secret\n")
    (tmp_path / "secret").write_text("swordfish")
    assert "swordfish" not in json.dumps(environment())
    (tmp_path / ".git" / "HEAD").write_text("swordfish\n")
    assert environment()["git"] is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t.update({k: torch.zeros(3) for k in t if "exp_avg/core.norm" in k}),
            r"exp_avg/core\.norm\.weight is F32 \(3,\)",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if "exp_avg_sq/core.norm" in k],
            "exp_avg_sq/core.norm.weight' is missing",
        ),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("optimizer/")], "is missing, which state.json names"),
    ],
)
def test_fault_60_the_optimisers_part_is_compared_with_the_model(good, tmp_path, change, told):
    from tests.hostile import reseal

    shutil.copytree(good / "run", tmp_path / "run")
    states = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for state in states:
        tensors = load_file(state / "state.safetensors")
        change(tensors)
        save_file(tensors, state / "state.safetensors")
        reseal(state)
    with pytest.raises(CheckpointError, match=told):
        open_run(tmp_path)
    # and where the list of tensors says the same
    facts = json.loads((states[-1] / "state.json").read_text())
    facts["tensors"] = {k: v for k, v in facts["tensors"].items() if k in tensors}
    (states[-1] / "state.json").write_text(json.dumps(facts))
    reseal(states[-1])
    with pytest.raises(CheckpointError, match=r"the optimiser's part does not fit the model: .*(is F32|missing)"):
        open_run(tmp_path)


def test_fault_60a_muons_part_is_compared_too(tmp_path):
    from tests.hostile import reseal

    settings = {**PLAIN, "folder": tmp_path, "optimizer": "muon", "keep": 1}
    mm.fit(make_model(), {TASK: DATA}, **settings)
    state = next((tmp_path / "checkpoints").iterdir())
    tensors = load_file(state / "state.safetensors")
    name = next(name for name in tensors if "momentum_buffer" in name)
    mm.fit(make_model(), {TASK: DATA}, **settings, resume=True)
    save_file(tensors | {name: torch.zeros(2, 2)}, state / "state.safetensors")
    reseal(state)
    with pytest.raises(CheckpointError, match=r"momentum_buffer.* is F32"):
        mm.fit(make_model(), {TASK: DATA}, **settings, resume=True)


def test_fault_61_a_rule_that_gives_up_is_our_error():
    tokenizer = TextBPE.train(["ab cd"] * 10, vocab_size=300, words=r"(a+)+b|\s")
    assert tokenizer.decode(tokenizer("ab aab")) == "ab aab"
    with pytest.raises(MediaError, match="the tokenizer gives up"):
        tokenizer("a" * 40)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_69_weights_that_are_not_finite_are_refused_by_name(value, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.core.norm.weight[3] = value
    folder = model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"core\.norm\.weight are not all finite"):
        mm.Model.load(folder)
    assert not mm.Model.load(folder, finite=False).core.norm.weight.isfinite().all()


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_fault_69a_another_precision_is_taken(kind, tmp_path):
    model = make_model()
    folder = model.save(tmp_path / "model")
    weights = {name: t.to(kind) for name, t in load_file(folder / "weights.safetensors").items()}
    save_file(weights, folder / "weights.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("sha256")
    (folder / "config.json").write_text(json.dumps(config))
    found = mm.Model.load(folder).core.norm.weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.core.norm.weight, atol=1e-2, rtol=0)


@pytest.mark.parametrize("value", [{"a": {1: 2}}, [{"a": [{2: 1}]}], {"a": ({None: 1},)}, {"a": {True: 1}}])
def test_fault_71_nested_keys_that_are_no_texts_are_refused(value):
    with pytest.raises(MediaError, match="keys that are not texts"):
        encoded(value)
    assert encoded({"a": [{"b": 1}]})[0] == "json"


def test_fault_71a_a_value_that_holds_itself_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(MediaError, match="nested too deeply"):
        encoded(value)


def test_fault_76_no_home_and_no_entry_for_the_user(monkeypatch):
    from multimodal.train.display import environment

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert environment()["command"]


def test_fault_83_no_file_outside_is_opened(good, tmp_path, monkeypatch):
    shutil.copytree(good / "model", tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_text("x")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    import multimodal.checkpoint as checkpoint

    hashed = []
    real = checkpoint.file_hash
    monkeypatch.setattr(checkpoint, "file_hash", lambda file: hashed.append(file) or real(file))
    for name in (str(secret), "../secret", "tokenizers/../../secret", "..\\secret", ""):
        path.write_text(json.dumps({**config, "sha256": {name: "0"}}))
        with pytest.raises(CheckpointError, match="would lie outside the folder; refused"):
            mm.Model.load(tmp_path / "model")
    assert hashed == []


def test_fault_83b_archives_elsewhere_are_read_if_they_are_archives(tmp_path):
    import tarfile

    (tmp_path / "theirs").mkdir()
    with tarfile.open(tmp_path / "theirs" / "a.tar", "w") as tar:
        for name, data in (("one.txt", b"hello"), ("one.json", b"[1]"), ("x" * 120 + ".txt", b"long")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = index_archives([tmp_path / "theirs" / "a.tar"], {"text": "txt", "n": "json"}, tmp_path / "index")
    assert [found[i]["text"] for i in range(2)] == ["hello", "long"]
    (tmp_path / "theirs" / "a.tar").write_bytes(b"the password is swordfish " * 1000)
    with pytest.raises(MediaError) as told:
        Shards(tmp_path / "index")[0]
    assert "swordfish" not in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["depth 100,000", "an id of 2^26", "300,000 labels", "config of a million tasks", "weights of nothing"]
)
def test_fault_80_what_is_declared_costs_nothing_before_it_fits(name, good, tmp_path):
    """In a process of its own: seconds and memory beyond those of a good checkpoint."""
    shutil.copytree(good, tmp_path / "x")
    next(entry for entry in ENTRIES if entry.name == name).make(tmp_path / "x")
    which = "bpe" if "id of" in name else "model"
    program = f"""
import resource, sys, time
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tokenizers")]!r}
import torch, multimodal as mm, multimodal_tokenizers
torch.set_num_threads(1)
mm.Model.load({str(good / which)!r})
before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    mm.Model.load({str(tmp_path / "x" / which)!r})
    print("loaded")
except mm.CheckpointError as error:
    print(time.process_time() - begun, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, str(error)[:300])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    seconds, mebibytes, *told = done.stdout.split(" ", 2)
    assert float(seconds) < SECONDS, done.stdout
    assert float(mebibytes) < 1024, done.stdout
    assert str(tmp_path) in told[0]


def test_fault_82a_a_log_that_was_cut_is_read_up_to_there(good, tmp_path):
    from multimodal.train.run_folder import read_rows

    shutil.copytree(good / "run", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    rows = read_rows(log)
    log.write_bytes(log.read_bytes()[:-9])
    assert read_rows(log) == rows[:-1]
    log.write_bytes(b"\xff\n" + log.read_bytes())
    with pytest.raises(CheckpointError, match=r"log\.jsonl: line 1 is no row of a log"):
        open_run(tmp_path)
    assert log.read_bytes().startswith(b"\xff\n")  # nothing is written over


@pytest.mark.parametrize(
    ("word", "seen"),
    [
        ("<script>alert(1)</script>", True),
        ('"><img src=x onerror=alert(1)>', True),
        ("</style></head><script>", True),
        ("a\nb\u2028'&amp;", True),
    ],
)
def test_fault_83c_a_page_shows_labels_and_texts_as_text(word, seen, tmp_path):
    from html.parser import HTMLParser

    from multimodal.look import xray
    from multimodal.look.page import page

    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags, self.settings, self.text = set(), set(), ""

        def handle_starttag(self, tag, attrs):
            self.tags.add(tag)
            self.settings |= {name for name, _ in attrs}
            assert not any((value or "").strip().lower().startswith("javascript:") for _, value in attrs)

        def handle_data(self, data):
            self.text += data

    model = mm.Model(
        {"text": TextBytes(), "label": Labels((word, "b"))}, mm.Core(width=8, depth=1, heads=2), ["text -> label"]
    )
    parser = Parser()
    parser.feed(page(xray(model.eval(), "text -> label", {"text": word})))
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & parser.tags
    assert not {name for name in parser.settings if name.startswith("on")}
    assert "".join(word.split()) in "".join(parser.text.split()) or not seen


@pytest.mark.slow
def test_fault_83d_the_fuzzer_finds_nothing(tmp_path):
    """A few hundred mutated inputs; `python tests/fuzz.py --cases 20000` tries more."""
    doors = "config,weights,tokenizer,bpe,facts,moments,manifest,report,index,shard,trouble,stream,settings,picture,sound,tar"
    settings = ("--cases", "300", "--seed", "1", "--workers", "1", "--doors", doors, "--out", str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "fuzz.py"), *settings], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "failures: 0" in done.stdout


def test_fault_69b_json_never_prints_what_json_does_not_have(capsys):
    from multimodal.cli.output import as_json, show
    from multimodal.heads import Prediction

    show(
        "a -> b",
        Prediction([float("nan"), 1.0], 0.5, probability={"x\x1b[31m": float("nan")}),
        True,
        name="b",
        out=None,
    )

    def refused(name: str) -> None:
        raise AssertionError(name)

    printed = json.loads(capsys.readouterr().out, parse_constant=refused)
    assert printed["answer"] == [None, 1.0]
    assert json.loads(as_json({"a": (float("inf"), {"b": -float("inf")})}), parse_constant=refused) == {
        "a": [None, {"b": None}]
    }


def test_fault_83e_labels_and_names_do_not_steer_a_terminal(monkeypatch, capsys, good, tmp_path):
    from multimodal.cli import main
    from multimodal.cli.output import show
    from multimodal.heads import Prediction

    shutil.copytree(good / "run", tmp_path / "x\x1b[31m$\\frac{$")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(tmp_path / "x\x1b[31m$\\frac{$")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show("a -> b", Prediction("y\x1b]0;z\x07", 0.5, probability={"x\x1b[31m": 1.0}), False, name="b", out=None)
    assert not set("\x1b\x07") & set(capsys.readouterr().out)


def test_fault_80a_what_is_remembered_while_a_model_is_outlined_has_numbers(tokenizers, core, values, tmp_path):
    """As in a new process, where nothing is remembered yet."""
    import multimodal_tokenizers

    folder = mm.Model(tokenizers, core, ["image sound text -> label", "label -> story"]).save(tmp_path / "model")
    for module in (multimodal_tokenizers.image, multimodal_tokenizers.audio, multimodal_tokenizers.text):
        for remembered in vars(module).values():
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()
    model = mm.Model.load(folder)
    for name in ("image", "sound", "text"):
        tokens = model.packer.tokenizers[name](values(0)[name])
        assert not tokens.content.is_meta
    assert not multimodal_tokenizers.placed.grid_positions(1, 2, 3).is_meta
    with torch.device("meta"):
        assert not multimodal_tokenizers.placed.grid_positions(1, 3, 2).is_meta
        assert not multimodal_tokenizers.image._per_channel(0.25).is_meta


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("mask",), "x"),
        (("mask",), {"type": "multimodal.masks:Or", "config": {"left": "x", "right": {}}}),
        (("rotary_base",), ["a", "b", "c"]),
        (("rotary_split",), [1.5, 1, 1]),
        (("dropout",), "0.1"),
        (("qk_norm",), 3),
        (("depth",), True),
    ],
)
def test_fault_83f_a_setting_of_another_kind_is_refused_when_it_is_read(path, value, good, tmp_path):
    shutil.copytree(good / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["core"]["config"][path[0]] = value
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"=.* is no |mask"):
        mm.Model.load(tmp_path / "model")
