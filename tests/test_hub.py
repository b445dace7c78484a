"""Models on the hub: what is pushed, loaded, refused; against a stand-in that speaks HTTP as the hub does."""

import contextlib
import io
import json
import os
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import multimodal as mm
from multimodal import publish
from multimodal.card import card
from multimodal.cli import main
from multimodal.hub import hub_name
from multimodal.publish import Published, files_of
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBPE, TextBytes
from tests.pretrained.tiny import tiny_llama
from tests.stand_in_hub import NOWHERE, Hub, Repo, problems

# of the hub's own client, which sends files as it should no longer
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def shapes(seed: int = 0, names: tuple[str, ...] = ("circle", "square")) -> mm.Model:
    kinds = {"image": ImagePatches(patch=4, channels=1), "label": Labels(names)}
    return mm.Model(kinds, mm.Core(width=16, depth=1, heads=2), ["image -> label"], seed=seed).eval()


def square() -> np.ndarray:
    picture = np.zeros((8, 12), np.float32)
    picture[2:6, 3:9] = 1
    return picture


def same_weights(one: mm.Model, other: mm.Model) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_was_pushed_is_loaded_by_name(hub: Hub) -> None:
    model = shapes()
    done = model.push_to_hub("ann/shapes", message="first")
    assert isinstance(done, Published)
    assert (done.name, done.url, done.private) == ("ann/shapes", f"{hub.url}/ann/shapes", True)
    assert set(done.written) == {"README.md", "config.json", "weights.safetensors"}
    assert hub.repos["ann/shapes"].messages[-1] == "first"
    assert hub.repos["ann/shapes"].branches["main"] == done.commit
    assert hub.repos["ann/shapes"].private
    for loaded in (
        mm.Model.from_hub("ann/shapes"),
        mm.Model.load("ann/shapes"),
        mm.Model.load(f"ann/shapes@{done.commit}"),
    ):
        assert same_weights(model, loaded)
        assert not loaded.training
    answer = mm.Model.load("hf:ann/shapes").predict("image -> label", image=square())
    assert answer.probability == model.predict("image -> label", image=square()).probability


def test_only_the_checkpoint_and_the_card_are_pushed(hub: Hub, tmp_path: Path) -> None:
    model = shapes()
    data = [{"image": square(), "label": name} for name in ("circle", "square")]
    recipe = mm.Recipe(steps=4, batch=2, device="cpu", checkpoint_every=2, workers=0)
    run = mm.fit(
        model,
        {"image -> label": data},
        evaluation={"image -> label": data},
        recipe=recipe,
        folder="secret-run",
        quiet=True,
    )
    Path("secret-run", "model", "notes.txt").write_text("not for others")
    assert run.folder is not None
    assert list(Path("secret-run").glob("checkpoints/*"))  # there is something that must stay here
    say(hub, "push", "secret-run", "ann/shapes")
    there = hub.files("ann/shapes")
    assert sorted(there) == [".gitattributes", "README.md", "config.json", "weights.safetensors"]
    for content in there.values():
        for word in (b"secret-run", str(tmp_path).encode(), os.environ.get("HOME", "?").encode() + b"/", b"exp_avg"):
            assert word not in content
    assert there["weights.safetensors"] == Path("secret-run/model/weights.safetensors").read_bytes()
    assert same_weights(mm.Model.load("secret-run/model"), mm.Model.from_hub("ann/shapes"))


def test_the_files_of_tokenizers_go_along_and_old_ones_are_deleted(hub: Hub) -> None:
    texts = ["a circle", "a square", "a circle and a square"] * 3
    spelled = TextBPE.train(texts, vocab_size=270)
    core = mm.Core(width=16, depth=1, heads=2)
    mm.Model({"text": spelled}, core, ["-> text"]).push_to_hub("ann/words")
    (file,) = [name for name in hub.files("ann/words") if name.startswith("tokenizers/")]
    loaded = mm.Model.from_hub("ann/words")
    assert loaded.packer.tokenizers["text"] == spelled
    done = mm.Model({"text": TextBytes()}, core, ["-> text"]).push_to_hub("ann/words")
    assert done.deleted == (file,)
    assert not [name for name in hub.files("ann/words") if name.startswith("tokenizers/")]
    # the history keeps it
    before = hub.repos["ann/words"].commits
    assert sum(file in files for files in before.values()) == 1


def test_a_second_push_writes_what_changed(hub: Hub) -> None:
    first = shapes().push_to_hub("ann/shapes")
    again = shapes().push_to_hub("ann/shapes")
    assert (again.commit, again.written) == (first.commit, ())
    assert len(hub.repos["ann/shapes"].commits) == 2  # the one that made it, and ours
    other = shapes(seed=1).push_to_hub("ann/shapes")
    assert set(other.written) == {"config.json", "weights.safetensors"}
    assert other.unchanged == ("README.md",)
    assert same_weights(mm.Model.from_hub("ann/shapes", revision=first.commit), shapes())
    assert same_weights(mm.Model.from_hub("ann/shapes"), shapes(seed=1))


def test_a_branch_is_made(hub: Hub) -> None:
    shapes().push_to_hub("ann/shapes")
    shapes(seed=1).push_to_hub("ann/shapes", revision="second")
    shapes(seed=2).push_to_hub("ann/new", revision="second")
    assert same_weights(mm.Model.load("ann/shapes"), shapes())
    assert same_weights(mm.Model.load("ann/shapes@second"), shapes(seed=1))
    assert same_weights(mm.Model.from_hub("ann/new", revision="second"), shapes(seed=2))
    before = len(hub.repos["ann/shapes"].commits)
    same = shapes().push_to_hub("ann/shapes", revision="third")  # what the main branch has, which a new one begins with
    assert (same.written, same.commit) == ((), hub.repos["ann/shapes"].branches["main"])
    assert hub.repos["ann/shapes"].branches["third"] == same.commit
    assert len(hub.repos["ann/shapes"].commits) == before


def test_another_model_is_not_overwritten_unasked(hub: Hub) -> None:
    repo = hub.repos["ann/old"] = Repo(private=False)
    theirs = {"config.json": (b'{"model_type": "bert"}', False), "model.safetensors": (b"weights", True)}
    first = repo.commit("main", {**theirs, "README.md": (b"mine", False)}, "theirs")
    with pytest.raises(
        mm.ConfigError, match=r"ann/old holds other files; config.json would be overwritten.*overwrite=True"
    ):
        shapes().push_to_hub("ann/old")
    assert repo.branches["main"] == first
    done = shapes().push_to_hub("ann/old", overwrite=True)
    assert set(hub.files("ann/old")) == {"README.md", "config.json", "model.safetensors", "weights.safetensors"}
    assert repo.commits[first]["config.json"][0] == theirs["config.json"][0]
    assert not done.private
    # a checkpoint of this library for other tasks is another model too
    with pytest.raises(mm.ConfigError, match=r"a model for other tasks \(image -> label\)"):
        mm.Model({"text": TextBytes()}, mm.Core(width=16, depth=1, heads=2), ["-> text"]).push_to_hub("ann/old")


def test_a_card_that_was_changed_there_stays(hub: Hub) -> None:
    shapes().push_to_hub("ann/shapes")
    repo = hub.repos["ann/shapes"]
    files = dict(repo.commits[repo.branches["main"]])
    files["README.md"] = files["README.md"][0].replace(b"# shapes", b"# My shapes"), False
    repo.commit("main", files, "by hand")
    done = shapes(seed=1).push_to_hub("ann/shapes", license="mit")
    assert done.kept == ("README.md",)
    assert "README.md" not in done.written
    assert b"# My shapes" in hub.files("ann/shapes")["README.md"]
    assert shapes(seed=1).push_to_hub("ann/shapes", license="mit", overwrite=True).written == ("README.md",)
    assert b"# My shapes" not in hub.files("ann/shapes")["README.md"]


def test_rights_tokens_and_names(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shapes()
    for name, token, message in (
        ("bob/shapes", "hf_ann", r"push: bob/shapes: this token may not write there.*instead of 'bob'"),
        ("ann/shapes", "hf_ann_reads", r"this token may not write there"),
        ("ann/shapes", "hf_nobody", r"the hub does not know this token"),
        ("ann/sha/pes", "hf_ann", r"'ann/sha/pes' is no name on the hub; wanted 'OWNER/NAME'"),
        ("shapes", "hf_nobody", r"push: shapes: the hub does not know this token"),
        ("ann/sha--pes.", "hf_ann", r"is no name on the hub"),
    ):
        with pytest.raises(mm.ConfigError, match=message) as caught:
            model.push_to_hub(name, token=token)
        assert token not in str(caught.value)
    assert hub.repos == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(mm.ConfigError, match=r"there is no token of the hub; .*HF_TOKEN"):
        model.push_to_hub("ann/shapes")
    with pytest.raises(
        mm.ConfigError, match=r"wanted 'OWNER/NAME', such as 'ann/digits': without OWNER/ it is that of"
    ):
        model.push_to_hub("shapes")
    assert model.push_to_hub("mine", token="hf_ann").name == "ann/mine"
    model.push_to_hub("ann/shapes", token="hf_ann", private=False)
    with pytest.raises(mm.ConfigError, match=r"ann/shapes is public already"):
        model.push_to_hub("ann/shapes", token="hf_ann", private=True)


def test_a_private_model_is_loaded_with_its_token_alone(hub: Hub) -> None:
    shapes().push_to_hub("ann/shapes")
    with pytest.raises(mm.CheckpointError, match=r"load: 'ann/shapes' is no folder here, and could not be loaded"):
        mm.Model.from_hub("ann/shapes", token="hf_bob")
    assert same_weights(mm.Model.from_hub("ann/shapes", token="hf_ann"), shapes())


def test_somebody_who_pushes_meanwhile_is_not_overwritten(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes().push_to_hub("ann/shapes")
    repo = hub.repos["ann/shapes"]
    look_up = publish.look_up

    def and_then_a_push(*arguments: Any) -> Any:
        found = look_up(*arguments)
        repo.commit("main", dict(repo.commits[repo.branches["main"]]), "meanwhile")
        return found

    monkeypatch.setattr(publish, "look_up", and_then_a_push)
    with pytest.raises(mm.ConfigError, match=r"somebody else has written to it meanwhile"):
        shapes(seed=1).push_to_hub("ann/shapes")
    assert repo.messages[-1] == "meanwhile"


def test_a_name_that_others_hide_is_taken(hub: Hub) -> None:
    shapes().push_to_hub("ann/shapes")
    hub.repos["ann/hidden"] = hub.repos.pop("ann/shapes")

    class Hidden(dict):
        """A repository that is there, and that nobody sees."""

        def get(self, name: str, default: Any = None) -> Any:
            return None if name == "ann/hidden" else super().get(name, default)

    hub.repos, before = Hidden(hub.repos), hub.repos
    try:
        with pytest.raises(mm.ConfigError, match=r"the name is taken, by a repository that this token may not see"):
            shapes().push_to_hub("ann/hidden")
    finally:
        hub.repos = before


def test_without_a_network_what_was_loaded_before_is_loaded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes().push_to_hub("ann/shapes")
    shapes(seed=1).push_to_hub("ann/later")
    mm.Model.from_hub("ann/shapes")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    assert same_weights(mm.Model.from_hub("ann/shapes"), shapes())
    with pytest.raises(mm.CheckpointError, match="could not be loaded from the hub"):
        mm.Model.from_hub("ann/later")
    with pytest.raises(mm.ConfigError, match=rf"the hub at {NOWHERE} cannot be reached: \w+"):
        shapes().push_to_hub("ann/shapes")


class _Strange(BaseHTTPRequestHandler):
    """What answers is no hub: always with the same text."""

    text = b""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        loop = self.text == b"loop"
        self.send_response(302 if loop else 200)
        if loop:
            self.send_header("Location", self.path)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text)


@pytest.mark.parametrize("text", ["<html>log in</html>", "[]", "null", "3", "{}", '{"id": "ann/x"}', "", "loop"])
def test_what_is_no_hub_is_named_as_such(hub: Hub, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(_Strange, "text", text.encode())
    with ThreadingHTTPServer(("127.0.0.1", 0), _Strange) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        said = rf"ann/x: {url} was reached, but its answer is not a hub's \(\w+: "
        try:
            with pytest.raises(mm.CheckpointError, match=f"load: {said}"):
                mm.Model.from_hub("ann/x")
            with pytest.raises(mm.ConfigError, match=f"push: {said}"):
                shapes().push_to_hub("ann/x")
        finally:
            server.shutdown()


def test_a_model_of_others_is_named_as_such(hub: Hub) -> None:
    repo = hub.repos["ann/bert"] = Repo(private=False)
    repo.commit("main", {"config.json": (b'{"model_type": "bert"}', False)}, "theirs")
    with pytest.raises(
        mm.CheckpointError,
        match=r"'ann/bert' on the hub holds no checkpoint.*of type 'bert'.*mm.pretrained\('ann/bert'\)",
    ):
        mm.Model.load("ann/bert")


def test_nothing_that_a_repository_holds_beside_is_fetched(hub: Hub) -> None:
    shapes().push_to_hub("ann/shapes")
    repo = hub.repos["ann/shapes"]
    more = {"pytorch_model.bin": (b"pickle", False), "modeling.py": (b"raise SystemExit", False)}
    repo.commit("main", {**repo.commits[repo.branches["main"]], **more}, "more")
    hub.asked.clear()
    assert same_weights(mm.Model.from_hub("ann/shapes"), shapes())
    fetched = {path.rpartition("/")[2] for _, path in hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "weights.safetensors"}


def test_a_typing_error_in_a_folder_is_no_name_of_the_hub(hub: Hub) -> None:
    Path("runs").mkdir()
    hub.asked.clear()
    with pytest.raises(mm.CheckpointError, match=r"runs/digts: no config.json here"):
        mm.Model.load("runs/digts")
    assert hub.asked == []
    assert hub_name("runs/digts") is None
    assert hub_name("hf:runs/digts") == hub_name("hf://runs/digts") == hub_name(Path("hf://runs/digts")) == "runs/digts"
    assert hub_name(Path("ann/shapes@v1")) == "ann/shapes@v1"
    for path in ("digits", "./ann/x", "../ann/x", "~/x", "/ann/x", "a/b/c", "ann/", "ann/a b"):
        assert hub_name(path) is None


def test_what_others_could_not_load_is_refused(hub: Hub, tmp_path: Path) -> None:
    folder = shapes(names=("circle", str(tmp_path))).save("here")
    with pytest.raises(mm.ConfigError, match=r"names a path of this machine, .* as tokenizers.label.config.names.1"):
        files_of(folder, "")
    folder = shapes().save("there")
    config = json.loads((folder / "config.json").read_text())
    config["tokenizers"]["label"]["files"] = ["rules.py"]
    (folder / "tokenizers/label").mkdir(parents=True)
    (folder / "tokenizers/label/rules.py").write_text("import os")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        mm.ConfigError, match=r"tokenizers/label/rules.py of .*there is not one of .json, .safetensors, .txt"
    ):
        files_of(folder, "")


def test_where_weights_came_from_is_named_without_its_folder(hub: Hub, tmp_path: Path) -> None:
    model = mm.pretrained(tiny_llama(tmp_path / "secret" / "tiny")).model()
    model.push_to_hub("ann/tiny")
    there = hub.files("ann/tiny")
    assert json.loads(there["config.json"])["origin"]["name"] == "tiny"
    assert b"began with the weights of `tiny`" in there["README.md"]
    assert not [name for name, content in there.items() if b"secret" in content]
    assert mm.Model.from_hub("ann/tiny").export("hf", tmp_path / "again").is_dir()
    model.origin = {**model.origin, "name": "theirs/tiny", "revision": "c" * 40}  # type: ignore[dict-item]
    model.push_to_hub("ann/tiny2")
    text = hub.files("ann/tiny2")["README.md"].decode()
    assert f"began with the weights of `theirs/tiny`, commit `{'c' * 40}`" in text
    assert ModelCard(text).data.base_model == "theirs/tiny"


def test_the_card_has_the_metadata_and_the_figures_of_the_run(hub: Hub) -> None:
    model = shapes()
    data = [{"image": square() * i, "label": name} for i, name in enumerate(("circle", "square"))]
    recipe = mm.Recipe(steps=6, batch=2, device="cpu", workers=0, evaluate_every=2, best="image -> label loss")
    task = {"image -> label": data}
    run = mm.fit(model, task, evaluation=task, recipe=recipe, folder="run", quiet=True)
    measured = [row for row in run.history if "image -> label loss" in row]
    assert len(measured) >= 3
    text = card(model, "ann/shapes", run="run", license="apache-2.0", datasets=["ann/squares"])
    assert problems(text) == []
    read = ModelCard(text).data  # the hub's own reader
    assert (read.library_name, read.license, read.datasets) == ("multimodal-stream", "apache-2.0", ["ann/squares"])
    assert read.pipeline_tag == "image-classification"
    figures = {result.metric_type: result.metric_value for result in read.eval_results or []}
    last = measured[-1]
    assert figures == {  # four digits
        "loss": pytest.approx(last["image -> label loss"], rel=1e-3),
        "accuracy": last["image -> label exact"],
    }
    assert all(len(str(value).strip("0.")) <= 4 for value in figures.values())
    assert f"at step {last['step']}" in text
    for shown in (
        "| `image -> label` | 2 |",
        "6 of 6 steps",
        f"{model.parameter_counts()['all']:,} parameters",
        "patch=4",
        "a picture (grey), read at its own size",
        "one of 2 classes: `circle, square`",
        "| `image -> label` | 2 | exact |",  # of two held-out samples
        "answers with one of the classes of `label`, whatever it reads",
        "of the held-out data of the run alone",
    ):
        assert shown in text
    assert "- not for maps" in card(model, "ann/shapes", limits="not for\nmaps")
    best = min(measured, key=lambda row: row["image -> label loss"])
    text = card(model, "ann/shapes", run="run", best=True)
    assert f"at step {best['step']}" in text
    assert f"| loss | {best['image -> label loss']:.4g} |" in text
    assert "license" not in ModelCard(text).data.to_dict()
    with pytest.raises(mm.ConfigError, match="holds no log of a run"):
        card(model, "ann/shapes", run="nowhere")


def test_a_bad_license_is_refused_before_anything_is_written(hub: Hub) -> None:
    with pytest.raises(
        mm.ConfigError, match=r"the hub refused it: Invalid metadata in README.md.\n- .license. must be one of"
    ):
        shapes().push_to_hub("ann/shapes", license="none of yours")
    assert set(hub.files("ann/shapes")) == {".gitattributes"}


def test_the_code_of_the_card_runs(hub: Hub) -> None:
    kinds = {
        "image": ImagePatches(patch=4, channels=1),
        "sound": AudioFrames(rate_hz=8000, mels=8),
        "text": TextBytes(),
        "label": Labels(("circle", "square")),
    }
    Image.fromarray(np.uint8(255 * square())).save("image.png")
    soundfile = pytest.importorskip("soundfile")
    soundfile.write("sound.wav", np.sin(np.arange(2000) / 5).astype(np.float32), 8000)
    core, ran = mm.Core(width=16, depth=1, heads=2), []
    for task in (
        "image -> label",
        "image text -> label",
        "text -> text",
        mm.Task("sound -> text", mm.CTC()),
        "image <-> text",
        mm.Task("image -> image", mm.Masked(0.5)),
    ):
        model = mm.Model(kinds, core, [task])
        pattern = next(iter(model.tasks))
        name = f"ann/m{len(ran)}"
        model.push_to_hub(name)
        text = hub.files(name)["README.md"].decode()
        assert problems(text) == []
        code = text.split("```python\n")[1].split("```")[0]
        exec(compile(code, pattern, "exec"), {})
        commands = text.split("```bash\n")[2].split("```")[0].splitlines()
        assert commands[-1] == f"multimodal serve {name}"
        if len(commands) > 1:
            assert say(hub, *shlex.split(commands[0])[1:])[0] == 0
        ran.append(pattern)
    assert len(ran) == 6


def say(hub: Hub, *words: str) -> tuple[int, str, str]:
    """A command in this process, which must not fail by a bug."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    assert code in (0, 2), err.getvalue()
    return code, out.getvalue(), err.getvalue()


def test_push_on_the_command_line(hub: Hub) -> None:
    shapes().save("model")
    code, out, err = say(hub, "push", "model", "ann/shapes", "--dry-run")
    assert code == 0
    assert "# shapes" in out
    assert "weights.safetensors" in out
    assert "nothing was sent" in err
    assert err.endswith("the card says nothing of: licence (--license), data set (--dataset), limits (--limits)\n")
    assert hub.asked == []
    assert 'from_hub("ann/shapes")' in say(hub, "push", "model", "shapes", "--dry-run")[1]  # the owner of the token
    said = ("--license", "mit", "--dataset", "ann/squares", "--limits", "drawings alone")
    _, out, err = say(hub, "push", "model", "ann/shapes", "--dry-run", *said)
    assert "- drawings alone" in out
    assert "the card says nothing" not in err
    Path("token").write_text("hf_ann\n")
    os.environ.pop("HF_TOKEN")
    code, out, err = say(hub, "push", "model", "shapes", "--dry-run")
    assert (code, out) == (2, "")
    assert "wanted 'OWNER/NAME'" in err
    assert "there is no token" in say(hub, "push", "model", "ann/shapes")[2]
    code, out, _ = say(hub, "push", "model", "ann/shapes", "--token-file", "token", "--no-private", "--license", "mit")
    assert code == 0
    assert "public, commit" in out
    assert ModelCard(hub.files("ann/shapes")["README.md"].decode()).data.license == "mit"
    found = json.loads(
        say(hub, "push", "model", "ann/shapes", "--token-file", "token", "--license", "mit", "--json")[1]
    )
    assert found["written"] == []
    Path("token").write_text("two words")
    assert (
        "holds 2 words; wanted the token alone" in say(hub, "push", "model", "ann/shapes", "--token-file", "token")[2]
    )
    assert "there is no such file" in say(hub, "push", "model", "ann/shapes", "--token-file", "none")[2]


def test_commands_take_a_name_in_place_of_a_checkpoint(hub: Hub) -> None:
    done = shapes().push_to_hub("ann/shapes", private=False)
    Image.fromarray(np.uint8(255 * square())).save("image.png")
    code, out, err = say(hub, "predict", "ann/shapes", "--image", "image.png", "--json")
    assert code == 0, err
    assert json.loads(out)["answer"] == shapes().predict("image -> label", image="image.png").value
    assert f"ann/shapes of the hub, commit {done.commit}" in err
    assert say(hub, "verify", f"ann/shapes@{done.commit}", "--image", "image.png")[0] == 0
    code, out, err = say(hub, "look", "ann/shapes", "--image", "image.png")
    assert code == 0, err
    assert Path("xray.png").is_file()  # not in the cache
    assert "could not be loaded from the hub" in say(hub, "predict", "ann/none", "--image", "image.png")[2]
    Path("runs").mkdir()
    assert "there is no folder runs/x; a model on the hub is hf:runs/x" in say(hub, "predict", "runs/x")[2]
