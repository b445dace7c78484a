"""Several processes started and watched as one: each case really starts them, kills one or the launcher, and looks who is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from multimodal.shapes import ConfigError
from multimodal.train import launch as launching
from multimodal.train.launch import STOPPED, launch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
ROOT = Path(__file__).resolve().parents[2]

# says who it is, then does as the word of its rank says; `saves` stands for a training that is asked to stop
WORKER = """
import os, signal, sys, time
rank, folder, *words = os.environ["RANK"], *sys.argv[1:]
word = words[int(rank)]
def save(*_):
    time.sleep(0.2)
    open(f"{folder}/saved{rank}", "w").close()
    sys.exit(130)
if word in ("saves", "finishes"):
    signal.signal(signal.SIGINT, save)
    signal.signal(signal.SIGTERM, save)
if word == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"rank {rank} here", flush=True)
print(f"rank {rank} warns", file=sys.stderr, flush=True)
open(f"{folder}/pid{rank}.new", "w").write(str(os.getpid()))
os.rename(f"{folder}/pid{rank}.new", f"{folder}/pid{rank}")
if word in ("fails", "fails-late"):
    time.sleep(0.3 if word == "fails-late" else 0)
    print(f"the reason of {rank}", file=sys.stderr)
    sys.exit(3)
if word == "follows":
    time.sleep(0.3)
    sys.exit(4)
for _ in range(0 if word in ("ends", "finishes") else 600):
    time.sleep(0.1)
open(f"{folder}/ended{rank}", "w").close()
"""


@pytest.fixture
def command(tmp_path) -> Callable[..., list[str]]:
    """command("saves", "fails"): what every process runs, a word for each."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return lambda *words: [sys.executable, "-S", str(script), str(tmp_path), *words]


def pids(folder: Path, count: int, seconds: float = 60) -> list[int]:
    """Process ids, once all have said that they are there."""
    until = time.monotonic() + seconds
    while not all((folder / f"pid{rank}").is_file() for rank in range(count)):
        assert time.monotonic() < until, "the processes did not start"
        time.sleep(0.02)
    return [int((folder / f"pid{rank}").read_text()) for rank in range(count)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"  # nobody may have asked how it ended, where the launcher is gone
    except OSError:
        if Path("/proc/self").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def all_gone(found: list[int], seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, found)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, found))


def meanwhile(act: Callable[[list[int]], None], folder: Path, count: int) -> None:
    """Do this once all processes are there, while the test itself waits for `launch`."""
    threading.Thread(target=lambda: act(pids(folder, count)), daemon=True).start()


def test_each_knows_who_it_is_and_only_the_first_is_heard(tmp_path, capfd, monkeypatch):
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    code = (
        "import json, os; e = os.environ; "
        f"open(f'{tmp_path}/' + e['RANK'], 'w').write(json.dumps({{n: e[n] for n in {names}}})); print('rank', e['RANK'])"
    )
    assert launch([sys.executable, "-S", "-c", code], 3) == 0
    environments = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for rank, environment in enumerate(environments):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "3"
        assert (environment["MASTER_ADDR"], environment["OMP_NUM_THREADS"]) == ("127.0.0.1", str(max(1, cores // 3)))
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1
    assert capfd.readouterr().out == "rank 0\n"


def test_requested_threads_stay(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launching._environment(2)["OMP_NUM_THREADS"] == "7"


def test_one_that_fails_ends_the_others_and_says_why(command, tmp_path, capfd):
    assert launch(command("waits", "saves", "fails"), 3) == 3
    assert (tmp_path / "saved1").is_file()  # it was asked before it was made to
    err = capfd.readouterr().err
    assert "multimodal: process 2 of 3 ended with exit code 3; the others were ended. Its last lines:" in err
    assert err.rstrip().endswith("rank 2 here\n  rank 2 warns\n  the reason of 2")
    assert err.startswith("rank 0 warns")
    assert "rank 1" not in err
    assert all_gone(pids(tmp_path, 3))


def test_the_first_process_does_not_say_it_twice(command, capfd):
    assert launch(command("fails-late", "fails"), 2) == 3
    err = capfd.readouterr().err
    assert err.count("the reason of 0") == 1
    assert "process 0 of 2 ended with exit code 3" in err
    assert "the reason of 1" not in err


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_is_killed_is_named_and_not_those_that_it_brings_down(command, tmp_path, capfd, killed):
    words = ["follows", "follows"]
    words[killed] = "waits"
    meanwhile(lambda found: os.kill(found[killed], signal.SIGKILL), tmp_path, 2)
    assert launch(command(*words), 2) == 128 + signal.SIGKILL
    assert f"process {killed} of 2 was killed by SIGKILL, as systems short of memory do" in capfd.readouterr().err
    assert all_gone(pids(tmp_path, 2))


def test_one_that_does_not_listen_is_killed_after_a_time(command, tmp_path):
    meanwhile(lambda found: os.kill(found[1], signal.SIGKILL), tmp_path, 2)
    assert launch(command("deaf", "waits"), 2, grace_s=0.3) == 128 + signal.SIGKILL
    assert all_gone(pids(tmp_path, 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_reaches_all_and_all_save(command, tmp_path, capfd, number):
    before = signal.getsignal(number)
    meanwhile(lambda _: os.kill(os.getpid(), number), tmp_path, 2)
    assert launch(command("saves", "saves"), 2) == STOPPED
    assert (tmp_path / "saved0").is_file()
    assert (tmp_path / "saved1").is_file()
    assert "multimodal:" not in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_third_request_kills(command, tmp_path):
    def insist(_: list[int]) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    meanwhile(insist, tmp_path, 2)
    assert launch(command("deaf", "deaf"), 2) == STOPPED
    assert all_gone(pids(tmp_path, 2))
    assert not list(tmp_path.glob("ended*"))


def test_one_that_stopped_and_saved_ends_no_other(command, tmp_path):
    """All stop after the same step; one that writes the checkpoint takes longer than the others."""
    meanwhile(lambda found: os.kill(found[1], signal.SIGTERM), tmp_path, 2)
    threading.Timer(1.5, lambda: os.kill(pids(tmp_path, 2)[0], signal.SIGTERM)).start()
    assert launch(command("saves", "saves"), 2, grace_s=0.1) == STOPPED
    assert (tmp_path / "saved0").is_file()


@pytest.mark.slow
def test_none_outlives_a_launcher_that_was_killed(command, tmp_path):
    """One is asked and saves, one does not listen and is gone after its time of grace."""
    script = tmp_path / "worker.py"
    script.write_text(
        WORKER.replace("for _ in", "from multimodal.train.launch import *; end_with_launcher(0.5)\nfor _ in")
    )
    code = (
        f"from multimodal.train.launch import launch; launch({[c for c in command('saves', 'deaf') if c != '-S']!r}, 2)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tokenizers")])}
    launcher = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    found = pids(tmp_path, 2)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait(10)
    assert all_gone(found, 60)
    assert (tmp_path / "saved0").is_file()
    assert not (tmp_path / "saved1").exists()


def test_what_cannot_be_launched_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--processes 0: wanted 1 or more"):
        launch(["true"], 0)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="already one of several"):
        launch(["true"], 2)


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        ((1, -signal.SIGKILL), 1),  # the first lost its connection to the second
        ((1, 1), 0),
        ((0, STOPPED, 2), 2),
        ((STOPPED, 0), None),
    ],
)
def test_who_is_to_blame_of_those_that_ended_together(codes, blamed):
    workers = [SimpleNamespace(rank=rank, code=code, ended=True) for rank, code in enumerate(codes)]
    found = launching._first_to_fail(workers, [])  # type: ignore[arg-type]
    assert (None if found is None else found.rank) == blamed
