"""Shared fixtures: one thread, a fixed seed, small layouts, models and samples, programs that start at once."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.attention import Layout, Span
from multimodal.masks import MaskInfo
from multimodal_tokenizers import AudioFrames, ImagePatches, Labels, TextBytes

if TYPE_CHECKING:
    from tests.stand_in_hub import Hub

torch.set_num_threads(1)
# float32 on every CPU: those with bfloat16 tiles (AMX) would train and multiply in bfloat16, with other last digits
torch.cpu._is_amx_tile_supported = lambda: False
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped, with the reason shown, where there is no such device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


STORED = ("benchmarks/results", "examples/data", "tests/fixtures")  # what programs write, and tests must not
_before: dict[Path, bytes] = {}


def _stored_files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in STORED for path in (ROOT / folder).rglob("*") if path.is_file()}


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # one process looks, however many test
        _before.update(_stored_files())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A suite that rewrote measured results has failed, whatever its tests say."""
    now = _stored_files() if _before else {}
    changed = sorted(str(path) for path in _before if _before[path] != now.get(path))
    if changed:
        print(f"\nthe tests changed files of the repository: {', '.join(changed)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def lay() -> Callable[..., Layout]:
    """lay([[(3, True), (2, False)], [(4, True)]]): two samples, of two fields and of one; (number of tokens, bidirectional)."""

    def make(samples: Sequence[Sequence[tuple[int, bool]]], device: str = "cpu") -> Layout:
        spans, rows = [], []
        for sample, fields in enumerate(samples):
            flags = [free for count, free in fields for _ in range(count)]
            segments = [i for i, (count, _) in enumerate(fields) for _ in range(count)]
            free = flags.index(False) if False in flags else len(flags)
            spans.append(Span(-1 if any(flags[free:]) else free, len(flags)))
            rows += [
                (sample, order, int(flag), segment)
                for order, (flag, segment) in enumerate(zip(flags, segments, strict=True))
            ]
        columns = torch.tensor(rows, dtype=torch.int32, device=device).T
        return Layout(tuple(spans), MaskInfo(*columns))

    return make


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, mm.Tokenizer]:
    """One of every kind; `text` is bidirectional, `story` causal."""
    return {
        "image": ImagePatches(patch=4, channels=1),
        "text": TextBytes(),
        "story": TextBytes(causal=True),
        "sound": AudioFrames(rate_hz=8000, mels=8, stack=2),
        "label": Labels(("circle", "square", "star")),
    }


@pytest.fixture(scope="session")
def core() -> mm.Core:
    return mm.Core(width=32, depth=2, heads=4, kv_heads=2)


@pytest.fixture(scope="session")
def values() -> Callable[[int], dict[str, object]]:
    """A sample with every field, other in content and in length for every number."""

    def make(number: int) -> dict[str, object]:
        random = np.random.default_rng(number)
        rows, columns = random.integers(4, 13, size=2)
        words = "".join(random.choice(list("abcdefgh "), size=random.integers(1, 12)))
        return {
            "image": random.random((rows, columns)).astype(np.float32),
            "text": words,
            "story": words[::-1] + "!",
            "sound": (random.standard_normal(random.integers(200, 1500)).astype(np.float32) * 0.1, 8000),
            "label": ("circle", "square", "star")[number % 3],
        }

    return make


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """with full_disk(): a file can have at most 4,000 bytes; writing more fails as on a full disk."""
    resource = pytest.importorskip("resource", reason="this system has no limits of processes")

    @contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # or what is first imported here would be kept as bytecode of 4,000 bytes, which later processes cannot read
        bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            sys.dont_write_bytecode = bytecode

    return limited


@pytest.fixture
def lively() -> Callable[[mm.Model], mm.Model]:
    """Fresh weights are so small that most outputs agree by chance; this makes them large enough to tell apart."""

    def enlarge(model: mm.Model) -> mm.Model:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(std=0.2, generator=generator)
        return model.eval()

    return enlarge


def found_by(ranks: int) -> list[dict[str, str]]:
    """The variables by which n processes find each other, as torchrun sets them; none for one."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused.getsockname()[1])}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """program("examples/x.py", "--steps", "3", cwd=folder, ranks=2) -> what the first process wrote to stdout.

    In processes of their own, whose large libraries are imported already (tests/programs/forking.py).

    Raises:
        AssertionError: one did not end with exit code 0; it shows what all wrote.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tokenizers"))),
        "OMP_NUM_THREADS": "1",
    }
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "programs" / "forking.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    jobs, answers = server.stdin, server.stdout
    assert jobs is not None
    assert answers is not None

    def run(*argv: object, cwd: Path = ROOT, ranks: int = 1, seconds: float = 300, **variables: str) -> str:
        said = tmp_path_factory.mktemp("said")
        each = [found | variables for found in found_by(ranks)]
        words = [str(ROOT / str(word)) if i == 0 and word != "-m" else str(word) for i, word in enumerate(argv)]
        job = {"argv": words, "cwd": str(cwd), "ranks": each, "said": str(said), "seconds": seconds}
        print(json.dumps(job), file=jobs, flush=True)
        codes = json.loads(answers.readline())
        all_said = [path.read_text(encoding="utf-8") for path in sorted(said.iterdir())]
        assert codes == [0] * ranks, f"exit codes {codes}\n{''.join(all_said)}"
        return (said / "0.out").read_text(encoding="utf-8")

    with server:  # closes its stdin, and so ends it
        yield run


@pytest.fixture(scope="session")
def running_hub() -> Iterator["Hub"]:
    from tests.stand_in_hub import served

    with served() as hub:
        yield hub


@pytest.fixture
def hub(running_hub: "Hub", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Hub":
    """An empty stand-in for the Hugging Face hub; the test runs in a folder of its own, with a token of the user ann."""
    from huggingface_hub import constants

    for state in (running_hub.repos, running_hub.large, running_hub.asked):
        state.clear()
    running_hub.tokens = {"hf_ann": ("ann", True), "hf_ann_reads": ("ann", False), "hf_bob": ("bob", True)}
    address = running_hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, setting in {
        "ENDPOINT": running_hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": address,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
    }.items():
        monkeypatch.setattr(constants, name, setting)
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    monkeypatch.chdir(tmp_path)
    return running_hub


@pytest.fixture
def say(capsys, home, monkeypatch):
    """say("predict", ...) -> (exit code, stdout, stderr), in the folder that the test module's fixture `home` gives."""
    from multimodal.cli import main  # GPU machines may lack what it needs

    monkeypatch.chdir(home)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(say):
    """The one message on stderr of a command that ends with exit code 2."""

    def run(*arguments: str) -> str:
        code, out, err = say(*arguments)
        assert code == 2, out + err
        assert "Traceback" not in err
        assert err.startswith("multimodal: ")
        return err

    return run
