"""docs/Containerfile, as far as it can be tried without a container: its user, its files, its command, its check of health."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from tests.serve.conftest import EXTRA, make_model

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "Containerfile"


def steps() -> list[tuple[str, str]]:
    """(instruction, arguments) of the last stage's lines and of those before it, in order."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert not any(line.endswith("\\") for line in lines)
    found = [tuple(line.split(" ", 1)) for line in lines]
    return [(name, arguments) for name, arguments in found]


def last_stage() -> list[tuple[str, str]]:
    found = steps()
    return found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]


def only(name: str) -> str:
    (found,) = [arguments for each, arguments in last_stage() if each == name]
    return found


def test_it_runs_as_a_user_without_rights():
    user, group = only("USER").split(":")
    assert int(user) > 0
    assert int(group) > 0
    names = [name for name, _ in last_stage()]
    assert not {"RUN", "COPY", "ADD"} & set(
        names[names.index("USER") :]
    )  # root makes its files, and it cannot change them


def test_what_it_copies_is_there_and_is_all_that_the_package_is_made_of():
    copied = {
        source
        for name, arguments in steps()
        if name == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    named = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == named | {package.split("/")[0] for package in packages}
    (install,) = [arguments for name, arguments in steps() if name == "RUN" and "uv pip install" in arguments]
    extra = re.search(r"'\.\[(\w+)\]'", install)
    assert extra is not None
    assert extra[1] in project["project"]["optional-dependencies"]
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim-\w+", only("FROM"))
    assert version is not None
    assert tuple(map(int, version.groups())) >= (3, 11)
    assert all(arguments.split()[0] == version[0] for name, arguments in steps() if name == "FROM")


def test_its_command_serves(monkeypatch, capsys, tmp_path):
    pytest.importorskip("uvicorn", reason=EXTRA)
    pytest.importorskip("python_multipart", reason=EXTRA)
    from multimodal.cli import main

    # the command that its shell runs, without one that is installed
    (stub := tmp_path / "bin" / "multimodal").parent.mkdir()
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)

    def arguments(*given: str, port: str = only("EXPOSE")) -> list[str]:
        env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "PORT": port}
        command = [*json.loads(only("ENTRYPOINT")), *given]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()

    assert f" PORT={only('EXPOSE')}" in only("ENV")
    program, words = stub.name, arguments()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert program in project["scripts"]
    make_model().save(tmp_path / "digits")
    calls = []

    def recorded(*given, **options):
        calls.append((given, options))
        return 0

    monkeypatch.setattr(sys.modules["multimodal.cli.serve"], "serve_folders", recorded)
    assert main(arguments(str(tmp_path / "digits"), "--rows", "2")) == 0
    ((_, folders, settings), options) = calls[0]
    assert folders == [("digits", tmp_path / "digits")]
    assert (settings.rows, options["host"], options["port"]) == (2, "0.0.0.0", int(only("EXPOSE")))
    assert main(arguments(str(tmp_path / "digits"), port="9001")) == 0
    assert calls[1][1]["port"] == 9001
    assert main(words) == 2
    assert "give one checkpoint or more" in capsys.readouterr().err


def test_its_check_of_health_fails_with_the_service():
    uvicorn = pytest.importorskip("uvicorn", reason=EXTRA)
    pytest.importorskip("starlette", reason=EXTRA)
    from multimodal.serve.app import make_app
    from multimodal.serve.checkpoints import Checkpoint
    from multimodal.serve.settings import Settings

    _, check = only("HEALTHCHECK").split(" CMD ")
    program, option, code = json.loads(check)
    assert (program, option) == ("python", "-c")
    settings = Settings(rows=1, capacity=64, keys=("secret",))
    app = make_app([Checkpoint("tiny", make_model, settings)], settings)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        command, env = [sys.executable, "-c", code], {"PORT": str(port)}
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert subprocess.run(command, env=env, timeout=60).returncode == 0
        app.state.service.stopping = True
        assert subprocess.run(command, env=env, timeout=60, stderr=subprocess.DEVNULL).returncode != 0
        server.should_exit = True
        thread.join(60)


def test_the_lines_that_start_it_are_whole():
    """The comment at its top, and docs/serving.md, mount the weights read-only and name them as the command does."""
    comment = FILE.read_text(encoding="utf-8").split("FROM")[0].replace("\\\n#", "").replace("#", "")
    build, run = (next(line for line in comment.splitlines() if f"docker {verb}" in line) for verb in ("build", "run"))
    words = shlex.split(build)
    assert words[words.index("-f") + 1] == FILE.relative_to(ROOT).as_posix()
    words = shlex.split(run)
    mounts = [words[i + 1].split(":")[1:] for i, word in enumerate(words) if word == "-v"]
    image = words.index(shlex.split(build)[shlex.split(build).index("-t") + 1])
    weights, option, keys = words[image + 1 :]
    assert (option, mounts) == ("--api-key-file", [[weights, "ro"], [keys, "ro"]])
    assert f":{only('EXPOSE')}" in words[words.index("-p") + 1]
    # as many threads as cores, which PyTorch does not know
    assert words[words.index("-e") + 1] == f"OMP_NUM_THREADS={words[words.index('--cpus') + 1]}"
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").replace("\\\n", "")
    (same,) = [line for line in page.splitlines() if "docker run" in line]
    assert shlex.split(same) == words
