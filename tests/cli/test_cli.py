"""Every command from start to end, in this process, on a model that a recipe file trains for three steps."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import multimodal as mm
from multimodal import declare
from multimodal.attention import DensePlan
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBPE, TextBytes

soundfile = pytest.importorskip("soundfile")  # GPU machines may lack these, and run the tests marked cuda alone
pytest.importorskip("cyclopts")

from multimodal.cli import main  # noqa: E402
from multimodal.cli.arguments import value_from  # noqa: E402
from multimodal.cli.output import printable, show  # noqa: E402

RECIPE = '''
from dataclasses import dataclass

import numpy as np

import multimodal as mm
from multimodal.train.job import TrainingJob
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes


@dataclass(frozen=True)
class Grey(ImagePatches):
    """A kind of this file's own."""

    patch: int = 4
    channels: int = 1


def recipe():
    model = mm.Model(
        {
            "image": Grey(),
            "text": TextBytes(),
            "sound": AudioFrames(rate_hz=8000, mels=8),
            "label": Labels(("dark", "light")),
        },
        mm.Core(width=32, depth=1, heads=2),
        ["image -> label", "image -> text", "sound my_words:text -> label"],
    )
    data = [
        {"image": np.full((8, 8), i % 2, np.float32), "label": ("dark", "light")[i % 2], "text": "ab"} for i in range(8)
    ]
    return TrainingJob(
        model=model,
        data={"image -> label": data, "image -> text": data},
        evaluation={"image -> label": data},
        recipe=mm.Recipe(steps=9, batch=4, precision="float32", device="cpu"),
    )
'''

COMMANDS = [
    "train",
    "report",
    "predict",
    "generate",
    "transcribe",
    "serve",
    "look",
    "check",
    "verify",
    "shards",
    "plan",
    "search",
    "replay",
    "export",
]


@contextmanager
def forgotten_imports():
    """What a command imports from a temporary folder, adds to the path or learns as a class is forgotten again."""
    modules, classes = set(sys.modules), set(declare._defined)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield
    for name in set(sys.modules) - modules:
        if "pytest-of" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    for name in set(declare._defined) - classes:
        if not name.startswith("multimodal"):
            del declare._defined[name]


@pytest.fixture(autouse=True)
def _clean_imports():
    with forgotten_imports():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a recipe, its trained run, and files to ask about."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "drawn.py").write_text(RECIPE)
    Image.fromarray(np.full((8, 8), 230, np.uint8)).save(folder / "light.png")
    np.save(folder / "light.npy", np.full((8, 8), 0.9, np.float32))
    soundfile.write(folder / "beep.wav", np.sin(np.arange(2000) / 5).astype(np.float32), 8000)
    with forgotten_imports():
        assert main(["train", str(folder / "drawn.py"), "--set", "steps=3", "--folder", str(folder / "run")]) == 0
    mm.Model(
        {"image": ImagePatches(patch=4, channels=1), "label": Labels(tuple("abcdefg"))},
        mm.Core(width=32, depth=1, heads=2),
        ["image -> label"],
    ).save(folder / "plain")
    return folder


PLUGIN = ("--plugin", "drawn.py")
ASK = ("predict", "run", *PLUGIN, "--task", "image -> label")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(say, command) -> None:
    code, out, _ = say(command, "--help")
    assert code == 0
    assert f"Example: multimodal {command} " in out


def test_help_lists_the_commands(say) -> None:
    code, out, _ = say("--help")
    assert code == 0
    assert all(f" {command} " in out for command in COMMANDS)
    assert "--debug" in out


def test_version(say) -> None:
    from multimodal.versions import package_version

    assert say("--version")[:2] == (0, package_version() + "\n")


def test_train_saves_and_says_where(say, tmp_path) -> None:
    folder = tmp_path / "other"
    settings = (
        "--set",
        "steps=2",
        "--set",
        "betas=0.8,0.9",
        "--set",
        "core.depth=2",
        "--set",
        "tasks.image->label.weight=2",
    )
    code, out, _ = say("train", "drawn.py", *settings, "--folder", str(folder))
    assert code == 0
    for line in (f"model   {folder / 'model'}", f"curves  {folder / 'curves.png'}", f"log     {folder / 'log.jsonl'}"):
        assert line in out
    assert "exactly right on held-out data: image -> label" in out
    config = json.loads((folder / "config.json").read_text())
    assert (config["recipe"]["steps"], config["recipe"]["batch"], config["recipe"]["betas"]) == (2, 4, [0.8, 0.9])
    model = json.loads((folder / "model" / "config.json").read_text())
    assert config["core"]["config"]["depth"] == model["core"]["config"]["depth"] == 2
    assert [task["weight"] for task in model["tasks"]] == [2.0, 1.0, 1.0]


def test_a_run_that_ended_is_not_trained_over(say, refused, tmp_path) -> None:
    ask = ("train", "drawn.py", "--set", "steps=2", "--folder", str(tmp_path / "twice"))
    assert say(*ask)[0] == 0
    weights = (tmp_path / "twice" / "model" / "weights.safetensors").read_bytes()
    assert "twice holds a training run that went to its end; choose another folder (--folder)" in refused(*ask)
    code, out, _ = say(*ask, "--resume")
    assert code == 0
    assert "resuming at step 2" in out
    assert (tmp_path / "twice" / "model" / "weights.safetensors").read_bytes() == weights
    assert [path.name for path in tmp_path.iterdir()] == ["twice"]


def test_the_same_command_goes_on_with_a_run_that_was_stopped(say, refused, tmp_path, monkeypatch) -> None:
    from multimodal.train import job

    ask = ("train", "drawn.py", "--set", "steps=6", "--folder", str(tmp_path / "run"))
    fit = job.fit

    def interrupted(*arguments, **options):
        """A fit that is asked to stop after its third step, as by Ctrl-C."""
        stop = [lambda row: row["step"] == 3 and os.kill(os.getpid(), signal.SIGINT)]
        return fit(*arguments, **{**options, "trackers": stop})

    with monkeypatch.context() as patch:
        patch.setattr(job, "fit", interrupted)
        code, out, _ = say(*ask)
    assert code == 130
    assert "fit: stopped after step 3 of 6" in out
    assert f"To go on: multimodal train drawn.py --set=steps=6 --folder {tmp_path / 'run'} --resume\n" in out
    assert "recipe.lr was 0.001 and is 0.1" in refused(*ask, "--set", "lr=0.1")
    code, out, _ = say(*ask)
    assert code == 0
    assert "resuming at step 3" in out
    assert say(*ask[:-1], str(tmp_path / "whole"))[0] == 0
    for path in ("model/weights.safetensors", "curves.png"):
        assert (tmp_path / "run" / path).is_file()
    one, other = ((tmp_path / name / "model" / "weights.safetensors").read_bytes() for name in ("run", "whole"))
    assert one == other


def test_parameters_of_the_recipe_function_are_settings(say, refused, tmp_path) -> None:
    text = RECIPE.replace("def recipe():", "def recipe(count: int = 8):").replace("in range(8)", "in range(count)")
    (tmp_path / "sized.py").write_text(text)
    ask = ("train", str(tmp_path / "sized.py"), "--folder", str(tmp_path / "run"), "--set", "steps=1")
    assert say(*ask, "--set", "count=6")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["image -> label"] == 6
    assert "recipe() takes count; did you mean 'count'?" in refused(*ask, "--set", "coumt=6")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stpes=3", "Recipe has no setting 'stpes'; it has steps, epochs, batch"),
        ("steps=few", "--set steps=few: 'few' is no int"),
        ("core.dept=3", "--set core.dept=3: Core has no setting 'dept'; it has width, depth"),
        ("batch=0", "Recipe: batch=0 must be a whole number, 1 or more"),
    ],
)
def test_train_refuses_settings(refused, setting, message) -> None:
    """Every mistake is in tests/train/test_job.py; here is what comes of it on the command line."""
    assert message in refused("train", "drawn.py", "--set", setting)


def test_train_for_tensorboard(say, tmp_path) -> None:
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    folder = tmp_path / "run"
    code, out, _ = say("train", "drawn.py", "--set", "steps=1", "--folder", str(folder), "--tensorboard")
    assert code == 0
    assert f"board   tensorboard --logdir {folder / 'tensorboard'}" in out
    assert len(list((folder / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_train_with_a_tracker_that_is_none(refused) -> None:
    assert "--track wand: wanted one of tensorboard, wandb" in refused("train", "drawn.py", "--track", "wand")


def test_train_suggests_a_rate(say, refused, tmp_path) -> None:
    code, out, _ = say("train", "drawn.py", "--find-lr", "--set", "batch=4", "--folder", str(tmp_path / "run"))
    assert code == (1 if "the loss fell at no rate" in out else 0)
    assert code == 1 or "train   multimodal train drawn.py --set=batch=4 --set=lr=" in out
    assert (tmp_path / "run" / "learning-rates.png").read_bytes()[:4] == b"\x89PNG"
    assert "--find-lr runs in one process" in refused("train", "drawn.py", "--find-lr", "--processes", "2")


def test_settings_are_searched(say, refused, tmp_path) -> None:
    pytest.importorskip("optuna", reason="the optional package optuna is not installed")
    folder = tmp_path / "search"
    ask = ("search", "drawn.py", "--range", "core.depth=1,2", "--measure", "image -> label loss", "--set", "steps=2")
    code, out, _ = say(*ask, "--trials", "2", "--folder", str(folder))
    assert code == 0
    best = re.search(r"best    (\S+): image -> label loss (\d\.\d{4})\n", out)
    assert Path(best[1]).parent == folder
    assert (folder / "search.png").read_bytes()[:4] == b"\x89PNG"
    train = shlex.split(re.search(r"train   (multimodal train .*)\n", out)[1])
    assert train[1:4] == ["train", "drawn.py", "--set=steps=2"]
    # the command that is printed gives the value that is printed
    assert f"image -> label loss {best[2]}" in say(*train[1:], "--folder", str(tmp_path / "again"))[1]
    found = json.loads(say(*ask, "--trials", "2", "--folder", str(folder), "--json")[1])
    assert found["trials"][found["best"]]["folder"] == best[1]
    assert [trial["state"] for trial in found["trials"]] == ["finished", "finished"]
    assert shlex.join(train) == found["train"]
    assert "--range core.dept=1,2: Core has no setting 'dept'" in refused(*ask[:3], "core.dept=1,2", *ask[4:])
    assert "holds another search: ranges.core.depth was '1,2', now '1,3'" in refused(
        *ask[:3], "core.depth=1,3", *ask[4:], "--folder", str(folder)
    )


def test_runs_are_compared(say, refused, home, tmp_path) -> None:
    out_file = tmp_path / "pictures" / "both.png"
    assert say("train", "drawn.py", "--set", "steps=2", "--set", "lr=0.5", "--folder", str(tmp_path / "other"))[0] == 0
    code, out, _ = say("report", "run", str(tmp_path / "other"), "--out", str(out_file))
    assert code == 0
    assert f"picture  {out_file}" in out
    assert "3 of 3" in out
    assert any(line.split() == ["recipe.lr", "0.001", "0.5"] for line in out.splitlines())
    with Image.open(out_file) as picture:
        assert picture.size[0] > 800
    shown = json.loads(say("report", "run", str(tmp_path / "other"), "--out", str(out_file), "--json")[1])
    assert [run["steps"] for run in shown["runs"]] == [3, 2]
    assert shown["differences"] == {"recipe.steps": [3, 2], "recipe.lr": [0.001, 0.5]}
    assert "plain holds no log.jsonl" in refused("report", "plain")
    assert "wanted the name of a picture that ends in .png" in refused("report", "run", "--out", "both.jpg")


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_go_on_after_a_kill(tmp_path, home, program) -> None:
    """The launcher and with it both processes are killed; the same command ends with the bits of a run that was left alone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    settings = [f"--set={setting}" for setting in ("steps=12", "batch=8", "checkpoint_every=2", "lr=1e-2")]

    def train(name: str) -> list[str]:
        return ["-m", "multimodal", "train", "drawn.py", *settings, "--folder", str(tmp_path / name)]

    def launch(name: str) -> subprocess.Popen:
        command = [sys.executable, *train(name), "--processes", "2"]
        return subprocess.Popen(
            command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def losses(name: str) -> list[float]:
        rows = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    program(*train("whole"), cwd=home, ranks=2)
    program(*train("alone"), cwd=home)
    cut = launch("cut")
    until = time.monotonic() + 300
    while not list((tmp_path / "cut" / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < until
        assert cut.poll() is None, cut.communicate()
        time.sleep(0.02)
    cut.kill()
    cut.communicate(timeout=100)  # ends when the last process has closed its end
    again = launch("cut")
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert "resuming at step" in out
    assert "2 processes" in out
    assert out.count("loss    ") == 1  # only one of them speaks
    assert losses("cut") == losses("whole")
    one, other = ((tmp_path / name / "model" / "weights.safetensors").read_bytes() for name in ("cut", "whole"))
    assert one == other
    assert losses("alone") == pytest.approx(losses("whole"), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none", None, "there is no file none.py"),
        ("lacks", "def recpie(): pass", "defines no function recipe(); did you mean 'recpie'?"),
        ("returns", "def recipe(): return 3", "recipe() of returns.py returned int; wanted a TrainingJob or a mapping"),
        ("typo", "def recipe(): return {'modle': 1}", "returned an unknown 'modle'; known are model, data"),
        ("part", "def recipe(): return {'data': {}}", "recipe() of part.py returned no 'model'; it returned data"),
        ("kind", "def recipe(): return {'model': 1, 'data': {}}", "TrainingJob: model is int, wanted a Model"),
        ("breaks", "x = 1\nimport nothing_there", "breaks.py, line 2: ModuleNotFoundError: No module named"),
        ("json", "", "json.py: a module cannot be imported under the name 'json', or another has it; rename the file"),
    ],
)
def test_train_refuses_files(refused, monkeypatch, tmp_path, name, text, message) -> None:
    if text is not None:
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert message in refused("train", f"{name}.py")


def test_a_mapping_is_a_job_too(say, tmp_path) -> None:
    text = RECIPE.replace("return TrainingJob(", "return dict(").replace("mm.Recipe(", "dict(")
    (tmp_path / "as_mapping.py").write_text(text)
    assert say("train", str(tmp_path / "as_mapping.py"), "--set", "steps=1", "--folder", str(tmp_path / "run"))[0] == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_loss_that_is_not_finite_is_one_message(refused, tmp_path) -> None:
    text = RECIPE.replace("    data = [", "    next(model.parameters()).data.fill_(float('inf'))\n    data = [")
    (tmp_path / "diverges.py").write_text(text)
    err = refused("train", str(tmp_path / "diverges.py"), "--folder", str(tmp_path / "run"))
    assert "fit: step 1: the loss is nan, the gradient norm nan; multimodal replay " in err
    assert "step-0000001 shows its samples; lower lr=0.001 if no sample is to blame" in err


def test_predict_shows_classes_as_bars(say, home) -> None:
    code, out, _ = say("predict", "plain", "--image", "light.png")
    answer = mm.Model.load(home / "plain").predict("image -> label", image=str(home / "light.png"))
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == answer.value
    assert len(lines) == 1 + 5 + 1  # the answer, the likeliest five of seven, and what was left out
    assert lines[1].split() == [
        answer.value,
        "█" * round(24 * answer.confidence),
        f"{100 * answer.confidence:.1f}",
        "%",
    ]
    assert lines[-1] == "  and 2 more"


def test_predict_as_json(say, home) -> None:
    code, out, _ = say(*ASK, "--image", "light.png", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["task"] == "image -> label"
    assert shown["answer"] == max(shown["probability"], key=shown["probability"].get)
    assert sum(shown["probability"].values()) == pytest.approx(1)


def test_predict_takes_the_run_or_the_model_folder_and_arrays(say) -> None:
    first = say(*ASK, "--image", "light.npy", "--json")[1]
    assert say("predict", "run/model", *ASK[2:], "--image", "light.npy", "--json")[1] == first
    assert say("predict", "run", *PLUGIN, "--task", "image->label", "--image", "light.npy", "--json")[1] == first


def test_predict_finds_the_task_by_its_fields(say) -> None:
    code, out, _ = say("predict", "run", *PLUGIN, "--sound", "beep.wav", "--my-words", "hello", "--json")
    assert code == 0
    assert json.loads(out)["task"] == "sound my_words:text -> label"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("--imge", "light.png"), ["--imge: task 'image -> label' reads --image; did you mean 'image'?"]),
        ((), ["task 'image -> label' reads --image; give it"]),
        (("--image", "dark.png"), ["--image: ", "encode: there is no file 'dark.png'"]),
        (("--image", "drawn.py"), ["--image: ", "cannot read 'drawn.py' as a picture"]),
    ],
)
def test_predict_refuses_fields(refused, arguments, messages) -> None:
    err = refused(*ASK, *arguments)
    assert all(message in err for message in messages), err


def test_predict_refuses_tasks(refused) -> None:
    ask = ("predict", "run", *PLUGIN)
    assert "there is no task 'image -> lable'; there are 'image -> label'" in refused(*ask, "--task", "image -> lable")
    err = refused(*ask, "--image", "light.png")
    assert "several tasks read image; choose one with --task: 'image -> label', 'image -> text'" in err
    err = refused(*ask, "--imag", "light.png")
    assert "no task reads just imag; did you mean 'image'?; there are 'image -> label'" in err


def test_missing_checkpoints(refused) -> None:
    assert "there is no folder runn; did you mean 'run'?" in refused("predict", "runn", "--image", "light.png")
    assert "run/checkpoints holds no model: neither config.json nor model/config.json" in refused(
        "verify", "run/checkpoints"
    )


def test_a_class_of_ones_own_needs_its_file(refused) -> None:
    err = refused("predict", "run", "--image", "light.png")
    assert "'drawn:Grey' is not installed" in err
    assert "Here: --plugin FILE.py, the file that defines it." in err


def test_a_class_saved_by_a_script_is_found_in_its_file(say, refused, home) -> None:
    script = home / "as_script"
    mm.Model.load(home / "plain").save(script)
    config = json.loads((script / "config.json").read_text())
    config["tokenizers"]["image"]["type"] = "__main__:Grey"
    (script / "config.json").write_text(json.dumps(config))
    assert "a script that was run; it is the file to give" in refused("predict", "as_script", "--image", "light.png")
    assert say("predict", "as_script", *PLUGIN, "--image", "light.png")[0] == 0


def test_generate_writes_the_same_for_the_same_seed(say, home) -> None:
    ask = ("generate", "run", *PLUGIN, "--image", "light.png", "--max-tokens", "6", "--temperature", "0.8", "--json")
    answers = [json.loads(say(*ask, "--seed", seed)[1])["answer"] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]
    model = mm.Model.load(home / "run" / "model")
    sample = {"image": str(home / "light.png")}
    wanted = model.generate("image -> text", [sample], max_tokens=6, temperature=0.8, seed=1)[0]
    assert answers[0] == wanted.value


def test_generate_says_when_it_was_cut(say) -> None:
    _, out, err = say("generate", "run", *PLUGIN, "--image", "light.png", "--max-tokens", "2")
    assert "(stopped at --max-tokens 2, before its end)" in err
    assert out.strip()


def test_generate_needs_a_task_that_writes(refused) -> None:
    err = refused("generate", "plain", "--image", "light.png")
    assert "no task of this model writes token by token; use predict. There are 'image -> label'" in err


@pytest.fixture(scope="module")
def artist(home) -> mm.Model:
    """A model with random weights that writes texts, pictures (from codes and from features) and sounds; saved as `artist`."""
    draw = torch.Generator().manual_seed(0)
    pictures = [torch.rand(3, 4, 6, generator=draw) for _ in range(8)]
    sounds = [(0.3 * torch.randn(1600, generator=draw), 8000) for _ in range(4)]
    kinds = {
        "label": Labels(("a", "b")),
        "text": TextBPE.train(["the red cat sat on a mat and the dog ran to the red door"], vocab_size=290),
        "drawing": Codes.train(ImagePatches(patch=2), pictures, size=8, quiet=True),
        "painting": ImagePatches(patch=2, channels=1, size=(4, 6)),
        "sound": Codes.train(AudioFrames(rate_hz=8000, mels=8, stack=2), sounds, size=8, quiet=True),
    }
    painting = mm.Task("label -> painting", mm.FlowMatching(width=16, depth=1, steps=4))
    tasks = ["label -> text", "label -> drawing", "label -> speech:sound", painting, "text -> label"]
    model, weights = (
        mm.Model(kinds, mm.Core(width=32, depth=2, heads=2), tasks).eval(),
        torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                weight.normal_(std=0.2, generator=weights)  # fresh weights hardly care what they read
    model.save(home / "artist")
    return model


def asked(answer: str, command: str = "generate") -> tuple[str, ...]:
    return (command, "artist", "--task", f"label -> {answer}", "--label", "a", "--device", "cpu")


def split(typed: str) -> list[str]:
    """Words as a shell would give them, ~ for a blank inside of one."""
    return [word.replace("~", " ") for word in typed.split()]


def text(*options: str) -> tuple[str, ...]:
    """The command that writes a text, of 24 tokens unless the options say otherwise."""
    return (*asked("text"), *(() if "--max-tokens" in options else ("--max-tokens", "24")), *options)


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        ("--max-tokens 5", {"max_tokens": 5}),
        ("--begin the", {"begin": "the"}),
        ("--stop on", {"stop": "on"}),
        ("--stop on --stop K", {"stop": ("on", "K")}),
        ("--only the,cat --only dog", {"sampler": mm.generate.Only(("the", "cat", "dog"))}),
        ("--one-of cat,~dog,the", {"sampler": mm.generate.OneOf(("cat", "dog", "the"))}),
        ("--no-repeat 1", {"sampler": mm.NoRepeat(1)}),
        ("--repetition 2", {"sampler": mm.generate.Repetition(2.0)}),
        ("--temperature 0.8 --seed 3", {"temperature": 0.8, "seed": 3}),
        ("--top-k 3 --seed 2", {"sampler": mm.TopK(3), "seed": 2}),
        ("--top-p 0.5 --seed 2", {"sampler": mm.TopP(0.5), "seed": 2}),
        ("--min-p 0.3 --seed 2", {"sampler": mm.generate.MinP(0.3), "seed": 2}),
        ("--beams 4", {"beams": 4}),
        (
            "--beams 6 --length-penalty 4 --one-of d,the~red~cat",
            {"beams": 6, "length_penalty": 4.0, "sampler": mm.generate.OneOf(("d", "the red cat"))},
        ),
        ("--beams 3 --no-repeat 1", {"beams": 3, "sampler": mm.NoRepeat(1)}),
        ("--guidance 3", {"guidance": 3.0}),
        (
            "--min-p 0.02 --top-p 0.9 --top-k 20 --temperature 1.5 --no-repeat 2 --repetition 2",
            {
                "sampler": mm.generate.Repetition(2.0)
                | mm.NoRepeat(2)
                | mm.Temperature(1.5)
                | mm.TopK(20)
                | mm.TopP(0.9)
                | mm.generate.MinP(0.02)
            },
        ),
    ],
)
def test_every_option_reaches_the_model(say, artist, typed, options) -> None:
    def wanted(**options) -> dict:
        answer = artist.generate("label -> text", label="a", **{"max_tokens": 24, **options})
        answers = [
            {"answer": x.value, "confidence": x.confidence, "complete": x.complete, "ended": x.ended}
            | {"tokens": len(x.tokens), "probability": {}}
            for x in (answer, *answer.others)
        ]
        others = {"others": answers[1:]} if answer.others else {}
        return {"task": "label -> text", "seed": options.get("seed", 0), **answers[0], **others}

    if "sampler" in options and "seed" not in options and "beams" not in options and "top" not in typed:
        options = {**options, "sampler": options["sampler"] | mm.generate.Greedy()}
    code, out, err = say(*text(*split(typed)), "--json")
    assert code == 0, err
    assert json.loads(out) == wanted(**options)
    together = {"beams": {"beams", "length_penalty"}}  # without beams there is nothing to rank
    without = [wanted(**{k: v for k, v in options.items() if k not in together.get(key, {key})}) for key in options]
    assert json.loads(out) not in [*without, wanted()]  # each option makes a difference here


def test_temperature_comes_before_the_choice_of_candidates(say, artist) -> None:
    ask = {"label": "a", "max_tokens": 24, "seed": 1}
    first, last = (
        artist.generate("label -> text", sampler=sampler, **ask).value
        for sampler in (mm.Temperature(2.0) | mm.TopP(0.6), mm.TopP(0.6) | mm.Temperature(2.0))
    )
    typed = text("--seed", "1", "--top-p", "0.6", "--temperature", "2", "--json")
    assert json.loads(say(*typed)[1])["answer"] == first != last


def test_how_an_answer_ended_is_reported(say, artist) -> None:
    ended = {}
    for typed in ("--max-tokens 3", "--stop on", "--one-of cat"):
        shown = json.loads(say(*text(*typed.split()), "--json")[1])
        ended[shown["ended"]] = (shown["complete"], shown["tokens"])
    cat = len(artist.packer.tokenizers["text"]("cat"))
    assert ended == {"max_tokens": (False, 3), "stop string": (True, ended["stop string"][1]), "stop": (True, cat)}


@pytest.mark.parametrize(
    "options", [(), ("--beams", "3"), ("--stop", "sh"), ("--temperature", "1.5", "--begin", "the")]
)
def test_a_terminal_sees_the_text_while_it_is_written(say, artist, monkeypatch, options) -> None:
    whole = say(*text(*options))[1]
    parts, write = [], sys.stdout.write
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "write", lambda text: (parts.append(text), write(text))[1])
    _, seen, err = say(*text(*options))
    assert seen == printable(whole)
    assert len([part for part in parts if part]) > (2 if "--beams" in options else 5) - ("--beams" in options)
    assert ("before its end" in err) == ("--stop" not in options)
    parts.clear()
    say(*text(*options), "--json")
    assert len([part for part in parts if part.strip()]) == 1


def test_what_would_steer_a_terminal_is_shown(say, artist, monkeypatch) -> None:
    assert printable("a\tb\n\x1b[31m\x07\x7f\x9b ä") == "a\tb\n␛[31m␇␡\ufffd ä"
    evil = "\x1b]0;owned\x07"
    typed = text("--begin", evil, "--max-tokens", "1")
    assert evil in say(*typed)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "␛]0;owned␇" in say(*typed)[1]


def test_an_error_in_the_middle_of_a_text_has_its_own_line(say, artist, monkeypatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, err = say(*text("--only", "XYX", "--no-repeat", "1"))
    assert code == 2
    assert out == "XY\n"
    assert "leaves no candidate" in err
    assert err.count("\n") == 1


def test_nobody_reading_is_no_traceback(home, artist, monkeypatch, capsys) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(text()) == 141
        monkeypatch.undo()
    assert "Traceback" not in capsys.readouterr().err


def test_several_answers_have_seeds_in_a_row(say, artist) -> None:
    ask = text("--top-k", "5")
    rows = [json.loads(line) for line in say(*ask, "--seed", "7", "--count", "3", "--json")[1].splitlines()]
    alone = [json.loads(say(*ask, "--seed", str(seed), "--json")[1]) for seed in (7, 8, 9)]
    assert [{**row, "confidence": 0} for row in rows] == [{**row, "confidence": 0} for row in alone]
    assert [row["confidence"] for row in rows] == pytest.approx([row["confidence"] for row in alone])
    assert len({row["answer"] for row in rows}) == 3
    _, out, err = say(*ask, "--seed", "7", "--count", "3")
    assert out == "".join(f"== seed {row['seed']}\n{row['answer']}\n" for row in rows)
    cut = [row["seed"] for row in rows if not row["complete"]]
    assert cut
    assert err.splitlines() == [f"(seed {seed}: stopped at --max-tokens 24, before its end)" for seed in cut]


def pixels(image_CYX: torch.Tensor) -> np.ndarray:
    return (image_CYX * 255).round().byte().permute(1, 2, 0).squeeze(2).numpy()


@pytest.mark.parametrize(("kind", "mode"), [("drawing", "RGB"), ("painting", "L")])
@pytest.mark.parametrize("command", ["generate", "predict"])
def test_pictures_are_files(say, artist, tmp_path, kind, mode, command) -> None:
    code, out, err = say(*asked(kind, command), "--out", str(tmp_path / "new" / "folder"))
    assert code == 0, err
    path = tmp_path / "new" / "folder" / f"{kind}.png"
    assert out == f"{path}\n"
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", mode, (6, 4))
        assert np.array_equal(np.asarray(image), pixels(artist.generate(f"label -> {kind}", label="a").value))


@pytest.mark.parametrize("command", ["generate", "predict"])
def test_sounds_are_files_named_by_their_field(say, artist, tmp_path, command) -> None:
    shown = json.loads(say(*asked("speech:sound", command), "--out", str(tmp_path), "--json")[1])
    wanted, rate_hz = artist.generate("label -> speech:sound", label="a").value
    assert shown["file"] == str(tmp_path / "speech.wav")
    assert "answer" not in shown
    assert shown["tokens"] > 3
    wave, rate = soundfile.read(shown["file"], dtype="float32")
    assert rate == rate_hz == 8000
    assert np.allclose(wave, wanted.numpy(), atol=2**-15)
    assert np.abs(wave).max() > 100 * 2**-15


def test_no_file_is_overwritten(say, artist, home, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    ask = ("generate", str(home / "artist"), *asked("drawing")[2:], "--out", ".")
    assert say(*ask)[1] == "drawing.png\n"
    before = Path("drawing.png").read_bytes()
    Path("drawing-3.png").write_text("mine")
    rows = say(*ask, "--temperature", "1", "--count", "3", "--json")[1].splitlines()
    assert [json.loads(row)["file"] for row in rows] == ["drawing-2.png", "drawing-4.png", "drawing-5.png"]
    assert Path("drawing.png").read_bytes() == before
    assert Path("drawing-3.png").read_text() == "mine"
    for seed, row in enumerate(rows):
        wanted = artist.generate("label -> drawing", label="a", temperature=1.0, seed=seed).value
        with Image.open(json.loads(row)["file"]) as image:
            assert np.array_equal(np.asarray(image), pixels(wanted))
    shown = json.loads(say(*ask, "--beams", "2", "--json")[1])
    assert [shown["file"], shown["others"][0]["file"]] == ["drawing-6.png", "drawing-7.png"]
    assert (shown["ended"], shown["tokens"]) == ("length", 6)
    assert 0 < shown["others"][0]["confidence"] <= shown["confidence"]


def test_features_are_drawn_by_their_seed(say, artist, tmp_path) -> None:
    out = (*asked("painting"), "--out", str(tmp_path))
    assert len(say(*out, "--count", "2", "--temperature", "0.9")[1].splitlines()) == 2
    for seed, name in enumerate(("painting", "painting-2")):
        with Image.open(tmp_path / f"{name}.png") as image:
            wanted = artist.generate("label -> painting", label="a", temperature=0.9, seed=seed).value
            assert np.array_equal(np.asarray(image), pixels(wanted))


@pytest.mark.slow
def test_a_new_process_finds_the_head_that_writes_features(artist, home, tmp_path) -> None:
    code = (
        f"import sys; from multimodal.cli import main; sys.exit(main({[*asked('painting'), '--out', str(tmp_path)]!r}))"
    )
    root = Path(mm.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tokenizers")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'painting.png'}\n", "")


def test_with_a_folder_texts_are_files_too(say, artist, tmp_path) -> None:
    whole = say(*text())[1]
    assert say(*text(), "--out", str(tmp_path))[1] == f"{tmp_path / 'text.txt'}\n"
    assert (tmp_path / "text.txt").read_bytes().decode() + "\n" == whole
    shown = json.loads(say(*text(), "--out", str(tmp_path), "--json")[1])
    assert (shown["answer"] + "\n", shown["file"]) == (whole, str(tmp_path / "text-2.txt"))


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3),
        torch.tensor([[[0.5, float("nan")]]]),
        torch.full((1, 2, 2), 1.5),
        torch.full((1, 2, 2), -0.5),
        np.float32(3),
    ],
)
def test_other_arrays_are_npy_files_or_json(value, tmp_path, capsys) -> None:
    show("a -> b", mm.Prediction(value, 0.5), False, name="b", out=tmp_path)
    assert capsys.readouterr().out == f"{tmp_path / 'b.npy'}\n"
    assert np.array_equal(np.load(tmp_path / "b.npy"), np.asarray(value), equal_nan=True)
    show("a -> b", mm.Prediction(value, 0.5), True, name="b", out=None)
    answer = np.asarray(json.loads(capsys.readouterr().out)["answer"], dtype=np.float32)  # null is NaN here
    assert answer == pytest.approx(np.asarray(value), nan_ok=True)


def test_predict_says_when_a_text_was_cut(say, artist, monkeypatch) -> None:
    answer = artist.generate("label -> text", label="a", max_tokens=3)
    monkeypatch.setattr(mm.Model, "predict", lambda *_: [answer])
    _, out, err = say(*asked("text", "predict"))
    assert out == f"{answer.value}\n"
    assert "(cut before its end; generate --max-tokens writes more)" in err


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--max-tokens 0", "generate: max_tokens=0 and beams=1 must be at least 1"),
        ("--temperature -1", "generate: temperature=-1.0 must be at least 0"),
        ("--top-k 0", "TopK: k=0 leaves no candidate"),
        ("--top-p 1.5", "TopP: p=1.5 must be above 0 and at most 1"),
        ("--min-p 2", "MinP: p=2.0 must be from 0 to 1"),
        ("--no-repeat 0", "NoRepeat: size=0 must be at least 1"),
        ("--temperature 0 --top-p 0.5", "--temperature 0 draws nothing, so --top-p must be left out, or it raised"),
        ("--beams 0", "generate: max_tokens=256 and beams=0 must be at least 1"),
        (
            "--beams 2 --temperature 1",
            "--beams 2 looks for the likeliest answer; leave out --temperature",
        ),
        (
            "--beams 2 --temperature 1 --no-repeat 2",
            "--beams 2 looks for the likeliest answer; leave out --temperature",
        ),
        ("--beams 2 --top-k 3 --min-p 0.1", "--beams 2 looks for the likeliest answer; leave out --top-k and --min-p"),
        ("--beams 2 --guidance 2", "generate: beams=2 with guidance=2.0; use one of them"),
        ("--beams 2 --stop x", "generate: beams=2 with stop=('x',); use one of them"),
        ("--beams 2 --repetition 1", "which --repetition does not change; use --no-repeat"),
        ("--length-penalty 2", "--length-penalty 2 ranks beams; give --beams too, such as 4"),
        ("--beams 2 --length-penalty 11", "generate: length_penalty=11.0 must be from -10 to 10"),
        ("--beams 2 --length-penalty=-1e300", "generate: length_penalty=-1e+300 must be from -10 to 10"),
        ("--seed=-1", f"--seed -1 must be a whole number from 0 to {2**63 - 1}"),
        ("--guidance nan", "--guidance nan is not finite"),
        ("--only a --one-of b", "--only lists words and --one-of whole answers; use one of them"),
        ("--only a~b", "Only: words=('a b',) must be one word or more, without blanks"),
        ("--one-of a,,b", "--one-of '': "),
        ("--count 0", "--count 0 must be at least 1"),
        ("--count 2", "--count 2: nothing is drawn, so all would be the same; give --temperature"),
        (f"--seed {2**64}", f"--seed {2**64} must be a whole number from 0 to {2**63 - 1}"),
        ("--stop=", "generate: a stop string is empty"),
        ("--begin the --stop h", "begin already holds one of stop=('h',)"),
        ("--out beep.wav", "--out beep.wav: beep.wav is a file, not a folder"),
        ("--out beep.wav/in", "--out beep.wav/in: beep.wav is a file, not a folder"),
        ("--task text->label --text the", "task 'text -> label': Classify answers at once; use predict"),
        ("--task label->drawing --stop x", "stop strings need a kind that is text, and 'drawing' is not"),
        ("--task label->drawing --only a", "--only 'a': Codes.encode: "),
        (
            "--task label->drawing --begin no.png",
            "--begin: Codes.encode: ImagePatches.encode: there is no file 'no.png'",
        ),
        ("--task label->painting --top-k 2", "FlowMatching writes features; beams and samplers choose among tokens"),
        ("--task label->painting --count 2 --temperature 0", "--count 2: nothing is drawn"),
    ],
)
def test_generate_refuses(refused, artist, typed, message) -> None:
    words = [word.replace("~", " ") for word in typed.split()]
    err = refused(
        "generate", "artist", "--label", "a", *(() if "--task" in typed else ("--task", "label -> text")), *words
    )
    assert message in err
    assert err.count("\n") == 1


def test_help_of_generate_is_in_groups_of_one_line_each(say, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = say("generate", "--help")[1]
    assert (
        out.index("─ Parameters") < out.index("─ What is written") < out.index("─ Drawing") < out.index("─ Searching")
    )
    lines = out[out.index("─ What is written") :].splitlines()
    inside = [line for line in lines if line.startswith("│")]
    assert len(inside) == 16
    assert all(line.startswith("│ --") for line in inside)


def test_verify_passes(say) -> None:
    code, out, _ = say("verify", "run", *PLUGIN, "--image", "light.png")
    assert code == 0
    assert "ok  image -> text" in out
    assert "invented: image (ndarray values, beside what was given), text (str values), sound (tuple values)" in out
    assert out.endswith("passed\n")


def test_verify_fails_on_a_leak(say, monkeypatch) -> None:
    leak = mm.masks.Causal() | mm.masks.Prefix()
    monkeypatch.setattr("multimodal.core.plan_layers", lambda rule, own, layout, **_: (DensePlan(leak, layout), {}))
    code, out, _ = say("verify", "plain", "--json")
    result = json.loads(out)
    assert code == 1
    assert not result["passed"]
    assert "gradient" in {row["check"] for row in result["rows"] if not row["passed"]}
    assert say("verify", "plain")[1].endswith("FAILED\n")


def test_verify_refuses_unknown_fields(refused) -> None:
    err = refused("verify", "run", *PLUGIN, "--lable", "dark")
    assert (
        "--lable: no task has such a field; there are --image --label --my_words --sound --text; did you mean 'label'?"
        in err
    )


@pytest.mark.slow
def test_check_passes_for_ours_and_for_a_file(say) -> None:
    code, out, _ = say("check", "drawn.py:Grey", "--config", '{"patch": 8}')
    assert code == 0, out
    assert "Grey(patch=8" in out
    assert "packed_is_alone" in out


@pytest.mark.slow
def test_check_takes_the_kinds_that_parts_name(say, refused, home) -> None:
    talks = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in ("ab", "c", "def")
    ]
    talks = [[*talk, {"role": "user", "content": "x"}] for talk in talks]
    (home / "talks.jsonl").write_text("".join(json.dumps({"turns": talk}) + "\n" for talk in talks))
    arguments = ("check", "multimodal_tokenizers:Chat", "--values", "talks.jsonl", "--column", "turns")
    code, out, err = say(*arguments, "--kind", "text=multimodal_tokenizers:TextBytes")
    assert code == 0, out + err
    assert "give it, as --kind text=multimodal_tokenizers:TextBytes" in refused(*arguments)
    assert "wanted NAME=module:Class" in refused(*arguments, "--kind", "text")
    labels = ("check", "multimodal_tokenizers:Labels", "--config", '{"names": ["a", "b"]}')
    assert "Labels has no parts that could name a kind" in refused(
        *labels, "--kind", "a=multimodal_tokenizers:TextBytes"
    )


@pytest.mark.slow
def test_check_fails_by_name(say, home) -> None:
    (home / "early.py").write_text(
        "from dataclasses import dataclass\nimport torch\nfrom multimodal import Tokenizer, Tokens, at_times\n\n"
        "@dataclass(frozen=True)\nclass Early(Tokenizer):\n    feature_size = 2\n\n"
        "    def encode(self, value):\n"
        "        count = int(value)\n"
        "        return Tokens(torch.ones(count, 2), at_times(torch.arange(float(count)) - 5))\n"
    )
    code, out, _ = say("check", "early.py:Early", "--value", "3", "--value", "5")
    assert code == 1
    assert "FAILED   time_from_zero" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("drawn",), "'drawn' is not module:Class or path/to/file.py:Class"),
        (("no_such_module:Class",), "cannot import 'no_such_module'"),
        (("drawn.py:Gray",), "drawn.py has no tokenizer 'Gray'; it has Grey"),
        (("multimodal_tokenizers:Labels",), "Labels cannot be made from --config {}: "),
        (("multimodal_tokenizers:Labels", "--config", "{"), "--config {: this is no JSON"),
        (("multimodal_tokenizers:Labels", "--config", "[]"), "--config []: wanted a JSON object"),
        (("multimodal_tokenizers:ImagePatches", "--config", '{"pach": 1}'), "did you mean 'patch'?"),
        (("multimodal_tokenizers:ImagePatches", "--value", "no.png"), "--value: ImagePatches.encode: there is no file"),
        (("multimodal_tokenizers:Labels", "--config", '{"names": ["a"]}'), "Labels accepted 1 of the pictures"),
    ],
)
def test_check_refuses(refused, arguments, message) -> None:
    assert message in refused("check", *arguments)


def test_values_are_texts_files_or_json(tmp_path) -> None:
    text = TextBytes()
    assert value_from(text, "[1, 2]", "--text") == "[1, 2]"
    image = ImagePatches(patch=2, channels=1)
    (tmp_path / "x.json").write_text("[[0.5, 0.5], [0.5, 0.5]]")
    for given in (str(tmp_path / "x.json"), "[[0.5, 0.5], [0.5, 0.5]]"):
        assert np.array_equal(value_from(image, given, "--image"), np.full((2, 2), 0.5, np.float32))
    assert value_from(Labels(("a", "b"), several=True), '["a"]', "--tags") == ["a"]


def test_wrong_commands_and_options(refused) -> None:
    assert 'Unknown command "predcit". Did you mean "predict"?' in refused("predcit")
    assert "CHECKPOINT requires an argument" in refused("predict")
    assert "--max-tokens" in refused("generate", "plain", "--max-tokens", "many")


def test_debug_shows_where(say) -> None:
    code, _, err = say("predict", "runn", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "CheckpointError: there is no folder runn" in err


def test_an_error_in_somebody_elses_code_is_named_with_its_line(say, monkeypatch) -> None:
    monkeypatch.setattr(mm.Model, "predict", lambda *_: 1 / 0)
    code, _, err = say("predict", "plain", "--image", "light.png")
    assert code == 2
    assert "test_cli.py, line" in err
    assert "ZeroDivisionError: division by zero (--debug shows the traceback)" in err


def test_ctrl_c_is_no_traceback(say, monkeypatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mm.Model, "predict", interrupted)
    code, _, err = say("predict", "plain", "--image", "light.png")
    assert (code, err) == (130, "interrupted\n")
