"""Encodes values in a fresh Python process: with another hash seed, in another folder and time zone, in another order.

this process --job--> server (fresh interpreter, own hash seed) --fork--> child: imports the class, encodes --> tokens

The server has imported torch but no user code, so that many tokenizers need only one start of an interpreter. On platforms
without fork it answers one job and ends.
"""

import atexit
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from multimodal.check import report
from multimodal.check.report import CheckedAgain, ConformanceError
from multimodal.composite import Composite, named_kinds
from multimodal.declare import alias, declaration, part_types, rebuild
from multimodal.tokenizer import Tokenizer, Tokens

ZONES = ("KIT-09:17", "KIT+07:41")  # as POSIX writes time zones; nobody's
ANSWER_S = 120  # a process that does not answer within this time has failed


class CannotAsk(Exception):
    """A fresh process cannot encode with this tokenizer; the message says why."""


Reply = Tokens | str  # the tokens, or the error message of encode


def fresh_answers(
    tokenizer: Tokenizer,
    values: Sequence[Any],
    *,
    other_seed: bool,
    other_zone: bool,
    elsewhere: bool,
    backwards: bool,
) -> list[Reply]:
    """The tokens of copies of these values, in their order, from a tokenizer that is rebuilt from its configuration.

    other_seed, other_zone: use another hash seed or time zone than the first server, whose own are not those of this process;
    elsewhere: in an empty folder; backwards: encode the last value first.

    Raises:
        CannotAsk: another process cannot get the class or a value.
    """
    job = _job(tokenizer, values) | {"backwards": backwards, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        (empty := Path(folder) / "empty").mkdir()
        # an empty folder: relative paths and files that only lie here are not found
        job["folder"] = str(empty) if elsewhere else os.getcwd()
        (Path(folder) / "job").write_bytes(pickle.dumps(job))
        seed = _seed() + 1 if other_seed else _seed()
        code = _server(seed, ZONES[other_zone], os.getpid()).ask(folder)
        file = Path(folder) / "answer"
        if not file.is_file():
            raise ConformanceError(f"the fresh process ended with code {code} and gave no tokens")
        status, found = pickle.loads(file.read_bytes())
    if status == "cannot":
        raise CannotAsk(found)
    return [x if isinstance(x, str) else Tokens(*map(torch.from_numpy, x)) for x in found]


def names_a_file(values: Sequence[Any]) -> bool:
    """Whether a value is a relative path of a file, which other folders do not have."""
    for value in values:
        if isinstance(value, (str, Path)):
            try:
                if not Path(value).is_absolute() and Path(value).exists():
                    return True
            except (OSError, ValueError):  # a text that cannot be a path
                continue
    return False


def _seed() -> int:
    """A hash seed other than that of this process."""
    return 11 if os.environ.get("PYTHONHASHSEED") != "11" else 21


def _job(tokenizer: Tokenizer, values: Sequence[Any]) -> dict[str, Any]:
    try:
        # a composite's parts may name kinds of a model: they go with it
        kinds = {"": tokenizer, **named_kinds(tokenizer)}
        sent_kinds = {name: (json.loads(json.dumps(declaration(kind))), kind.files()) for name, kind in kinds.items()}
    except Exception as error:
        raise CannotAsk(f"its configuration cannot be sent to another process: {error}") from None
    modules = {}
    for name in sorted({name for data, _ in sent_kinds.values() for name in part_types(data)}):
        module, _, inside = name.partition(":")
        file = getattr(sys.modules.get(module), "__file__", None)
        if "<locals>" in inside:
            raise CannotAsk(f"{inside} is defined inside a function, where another process does not find it")
        if not file or not Path(file).is_file():
            raise CannotAsk(f"{inside} was typed into a session, which another process cannot import; put it in a file")
        modules[module] = str(Path(file).resolve())
    try:
        sent = [pickle.dumps(value) for value in values]
    except Exception as error:
        raise CannotAsk(f"a value cannot be sent to another process: {error}") from None
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return {
        "path": [os.path.abspath(entry) for entry in sys.path],
        "home": os.getcwd(),
        "modules": modules,
        "package": spec.parent if spec else None,
        "kinds": sent_kinds,
        "values": sent,
    }


class _Server:
    def __init__(self, seed: int, zone: str) -> None:
        path = [os.path.abspath(entry) for entry in sys.path]
        program = f"import sys; sys.path[:] = {path!r}; from multimodal.check.fresh import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": str(seed), "TZ": zone},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)

    def ask(self, folder: str) -> int:
        """Run the job in this folder; returns its exit code."""
        jobs, codes = self.process.stdin, self.process.stdout
        assert jobs is not None
        assert codes is not None
        late = threading.Timer(ANSWER_S, self.process.kill)
        late.start()
        try:
            jobs.write(json.dumps(folder) + "\n")
            jobs.flush()
            line = codes.readline()
        except OSError:  # the server has ended
            line = ""
        finally:
            late.cancel()
        if not line or not hasattr(os, "fork"):
            self.close()
        return int(line) if line else self.process.wait()

    def close(self) -> None:
        _server.cache_clear()
        atexit.unregister(self.close)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # the server has ended
                pipe.close()
        self.process.wait()


@functools.lru_cache(maxsize=8)
def _server(seed: int, zone: str, owner: int) -> _Server:
    """The server for a hash seed and time zone. `owner` is this process: a fork of it gets a server of its own, not these pipes."""
    return _Server(seed, zone)


def serve() -> None:
    """Answer jobs, one folder a line, until the pipe ends; each in a fork of this process if the platform has fork."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of a user's module must not mix with the answers
    for line in sys.stdin:
        folder = Path(json.loads(line))
        if not hasattr(os, "fork"):
            _answer(folder)
            out.write("0\n")
            out.flush()
            return
        child = os.fork()
        if not child:
            code = 1
            try:
                _answer(folder)
                code = 0
            finally:
                os._exit(code)
        out.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        out.flush()


def _answer(folder: Path) -> None:
    job = pickle.loads((folder / "job").read_bytes())
    try:
        found = "tokens", list(_encoded(job))
    except CannotAsk as error:
        found = "cannot", str(error)
    (folder / "part").write_bytes(pickle.dumps(found))
    (folder / "part").rename(folder / "answer")


def _encoded(job: dict[str, Any]) -> Iterator[Any]:
    report.in_fresh_process = True
    os.chdir(job["home"])
    sys.path[:] = job["path"]
    torch.set_num_threads(job["threads"])
    try:
        for name, file in job["modules"].items():
            _import(name, file, job["package"])
        kinds = {name: rebuild(data, files) for name, (data, files) in job["kinds"].items()}
        tokenizer = kinds.pop("")
        tokenizer = tokenizer.bind(kinds) if isinstance(tokenizer, Composite) else tokenizer
        values = [pickle.loads(value) for value in job["values"]]
    except Exception as error:
        raise CannotAsk(f"another process cannot import it: {type(error).__name__}: {error}") from None
    os.chdir(job["folder"])
    found: dict[int, Any] = {}
    order = range(len(values))
    for i in reversed(order) if job["backwards"] else order:
        try:
            tokens = tokenizer.encode(values[i])
            parts = (tokens.content, tokens.position_NA, *(() if tokens.pairs is None else (tokens.pairs,)))
            found[i] = tuple(part.detach().numpy().copy() for part in parts)
        except Exception as error:  # a user's encode may raise anything
            found[i] = f"{type(error).__name__}: {error}"
    yield from (found[i] for i in order)


def _import(name: str, file: str, package: str | None) -> None:
    """Import a module by its name if that leads to this file, else by its file; the main program as multiprocessing does."""
    if name in sys.modules and name != "__main__":
        return
    # another module of the same name may come first on the path
    spec = None if name == "__main__" else importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == Path(file):
        try:
            importlib.import_module(name)
        except CheckedAgain:
            raise CannotAsk(f"{name} checks its tokenizers while it is imported") from None
        return
    given = "__mp_main__" if name == "__main__" else name
    spec = importlib.util.spec_from_file_location(given, file)
    if spec is None or spec.loader is None:
        raise CannotAsk(f"another process cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    if name == "__main__" and package:
        module.__package__ = package
    sys.modules[given] = sys.modules[name] = module
    with contextlib.suppress(CheckedAgain):
        spec.loader.exec_module(module)
    if name == "__main__":  # its classes were saved under that name
        for part in list(vars(module).values()):
            if getattr(part, "__module__", None) == given and hasattr(part, "from_config"):
                alias(f"__main__:{part.__qualname__}", part)
