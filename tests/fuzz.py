"""Mutated inputs through every door: each must end in a value or in an error of ours, within seconds and a gigabyte.

    python tests/fuzz.py --cases 20000 --seed 0 [--doors config,tar] [--workers 2] [--out FOLDER]

Workers are processes of their own with a limit on memory; one that hangs or dies is replaced, and its case is a failure. A case is
a function of seed and number: `--only 1234` runs that one alone, with its traceback. Failing inputs are written to FOLDER.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tokenizers")]
SECONDS, STUCK_S, MEMORY = 10, 25, 2**31  # of a case; before a worker is killed; beyond what the libraries take
NUMBERS = (0, 1, -1, 2, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1)
WORDS = (
    "",
    " ",
    "x",
    "-1",
    "0",
    "1e309",
    "nan",
    "inf",
    "1e4",
    "99999999999999999999",
    "none",
    "true",
    "../..",
    "/",
    "\0",
    "é",
    "\ud800",
)
WORDS += (
    "text -> label",
    "-> label",
    "a->b->c",
    "[1,2]",
    '{"a": 1}',
    "'",
    '"',
    "%s",
    "x" * 300,
    "1,2",
    "()",
    "0x10",
    "1_000",
    "½",
)


class Late(BaseException):
    """A case takes too long."""


def mutated(data: bytes, drawn: random.Random) -> bytes:
    """Some bytes flipped, cut, inserted, copied, or made extreme numbers."""
    found = bytearray(data)
    for _ in range(drawn.choice((1, 1, 2, 4, 16))):
        at = drawn.randrange(len(found) + 1)
        if drawn.random() < 0.5:
            at = min(at, drawn.randrange(512))  # headers are at the front
        size = drawn.choice((1, 1, 2, 4, 8, 64, 1000))
        way = drawn.randrange(8)
        if way == 0 and found:
            found[min(at, len(found) - 1)] ^= 1 << drawn.randrange(8)
        elif way == 1 and found:
            found[min(at, len(found) - 1)] = drawn.choice((0, 255, 127, 128, drawn.randrange(256)))
        elif way == 2:
            del found[at:]
        elif way == 3:
            del found[at : at + size]
        elif way == 4:
            found[at:at] = drawn.randbytes(size)
        elif way == 5:
            found[at:at] = found[max(0, at - size) : at]
        elif way == 6:
            number = drawn.choice(NUMBERS) % 2**64
            kind = drawn.choice(("<B", ">H", "<H", "<I", ">I", "<Q", ">Q"))
            packed = struct.pack(kind, number % 2 ** (8 * struct.calcsize(kind)))
            found[at : at + len(packed)] = packed
        else:
            other = drawn.randrange(len(found) + 1)
            found[at : at + size] = found[other : other + size]
    return bytes(found)


def swapped(data: bytes, drawn: random.Random) -> bytes:
    """JSON with values exchanged, removed or made strange; now and then its bytes are changed as well."""
    from tests.hostile import DEEP, STRANGE, drop, paths, put

    values = json.loads(data)
    strange = [*STRANGE.values(), *NUMBERS, *WORDS]
    for _ in range(drawn.choice((1, 1, 2, 3))):
        places = paths(values, most=8)
        if not places:
            break
        place = drawn.choice(places)
        if drawn.random() < 0.2:
            drop(values, place)
        elif drawn.random() < 0.3:
            found: Any = values
            for key in drawn.choice(places):
                found = found[key]
            put(values, place, json.loads(json.dumps(found)))
        else:
            put(values, place, drawn.choice(strange))
    text = json.dumps(values).encode()
    if drawn.random() < 0.02:
        return text.replace(b"null", DEEP.encode(), 1)
    return mutated(text, drawn) if drawn.random() < 0.1 else text


class Doors:
    """What is good, and the ways in which mutated copies of it are taken in."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        import torch

        import multimodal as mm
        from multimodal.train.state import Checkpoints, TrainingState
        from tests import hostile

        torch.set_num_threads(1)
        self.folder = folder
        self.good = hostile.make_all(folder / "good")
        state = sorted((self.good / "run" / "checkpoints").glob("step-*"))[-1]
        model = hostile.make_model()
        self.trained = TrainingState(model, torch.optim.AdamW(model.parameters(), fused=True), None)
        saved = json.loads((state / "state.json").read_text())
        self.facts = {part: saved[part] for part in ("tokenizers", "core", "tasks", "recipe", "data", "mix")}
        from multimodal.train.processes import Processes

        self.states = Checkpoints(self.good / "run", 2, Processes())
        self.state = state
        self.job = mm.TrainingJob(model=model, data={hostile.TASK: hostile.DATA})
        self.number = 0
        random_array = np.random.default_rng(0)
        self.pictures = dict(self._pictures(random_array))
        self.sounds = dict(self._sounds(random_array))
        self.tables = dict(self._tables())
        good = self.good
        self.doors: dict[str, Callable[[random.Random], tuple[bytes | str, Callable[[], Any]]]] = {
            "config": lambda r: self._in_place(good / "model/config.json", r, lambda: hostile.open_model(good), True),
            "weights": lambda r: self._in_place(
                good / "model/weights.safetensors", r, lambda: hostile.open_model(good)
            ),
            "tokenizer": lambda r: self._in_place(
                good / "tokenizer.json", r, lambda: hostile.open_tokenizer(good), True
            ),
            "bpe": lambda r: self._in_place(
                good / "bpe/tokenizers/text/tokenizer.json", r, lambda: hostile.open_bpe(good), True
            ),
            "facts": lambda r: self._in_place(state / "state.json", r, self._load_state, True),
            "moments": lambda r: self._in_place(state / "state.safetensors", r, self._load_state),
            "manifest": lambda r: self._in_place(state / "manifest.json", r, self._check_state, True),
            "report": lambda r: self._in_place(
                good / "run" / r.choice(("log.jsonl", "config.json")), r, lambda: hostile.open_report(good)
            ),
            "index": lambda r: self._in_place(good / "shards/index.json", r, lambda: hostile.open_shards(good), True),
            "shard": lambda r: self._in_place(
                good / "shards" / r.choice(("000000.tar", "000000.index")), r, lambda: hostile.open_shards(good)
            ),
            "trouble": lambda r: self._in_place(
                good / "trouble/trouble-0.json", r, lambda: hostile.open_spike(good), True
            ),
            "stream": lambda r: self._in_place(
                good / "trouble/stream-0-000.safetensors", r, lambda: hostile.open_spike(good)
            ),
            "table": self._table,
            "tar": self._tar,
            "picture": self._picture,
            "sound": self._sound,
            "settings": self._settings,
            "commands": self._commands,
        }

    def _in_place(self, path: Path, drawn: random.Random, use: Callable[[], Any], values: bool = False) -> Any:
        """A good file is changed, used, and put back."""
        data = path.read_bytes()
        new = swapped(data, drawn) if values and drawn.random() < 0.8 else mutated(data, drawn)

        def run() -> Any:
            path.write_bytes(new)
            try:
                return use()
            finally:
                path.write_bytes(data)

        return new, run

    def _load_state(self) -> Any:
        return self.states.load(self.state, self.trained, self.facts)

    def _check_state(self) -> Any:
        from multimodal.train.state import check_manifest

        return check_manifest(self.state)

    def _fresh(self, name: str) -> Path:
        self.number += 1
        shutil.rmtree(self.folder / "fresh", ignore_errors=True)
        (self.folder / "fresh").mkdir()
        return self.folder / "fresh" / name

    def _tables(self) -> Any:
        from tests.hostile import DATA

        yield "jsonl", "".join(json.dumps(row) + "\n" for row in DATA).encode()
        yield "csv", b'text,label\n"a, b","with ""a"""\ncab,x\n"two\nlines",y\n'
        yield "tsv", b"text\tlabel\nab\tx\ncab\ty\n"
        with contextlib.suppress(ImportError):
            import pyarrow
            import pyarrow.parquet

            data = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table({"text": ["ab", "cab"], "n": [1, 2], "l": [[1], [2, 3]]}), data)
            yield "parquet", data.getvalue()

    def _table(self, drawn: random.Random) -> Any:
        from multimodal.data.tables import open_table

        kind = drawn.choice(sorted(self.tables))
        new = mutated(self.tables[kind], drawn)

        def run() -> Any:
            path = self._fresh(f"table.{kind}")
            path.write_bytes(new)
            return list(open_table(str(path), None).read(0))

        return new, run

    def _tar(self, drawn: random.Random) -> Any:
        from multimodal.data import index_archives

        new = mutated((self.good / "shards" / "000000.tar").read_bytes(), drawn)

        def run() -> Any:
            path = self._fresh("a.tar")
            path.write_bytes(new)
            found = index_archives([path], {"text": "txt", "n": "json", "blob": "bin"}, path.parent / "index")
            try:
                for i in range(len(found)):
                    with contextlib.suppress(ValueError):
                        found[i]
            finally:
                found.close()

        return new, run

    def _pictures(self, drawn: Any) -> Any:
        from PIL import Image

        Image.init()
        array = drawn.integers(0, 255, (12, 16, 3)).astype("uint8")
        for form in sorted(Image.SAVE):
            for mode in ("RGB", "L", "P", "1", "RGBA"):
                data = io.BytesIO()
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Image.fromarray(array).convert(mode).save(data, form)
                    yield f"{form} {mode}", data.getvalue()
        if "PNG" in Image.SAVE:
            data = io.BytesIO()
            Image.fromarray(array).save(data, "GIF", save_all=True, append_images=[Image.fromarray(array[::-1])])
            yield "GIF of two", data.getvalue()

    def _picture(self, drawn: random.Random) -> Any:
        from multimodal_tokenizers import ImagePatches

        new = mutated(self.pictures[drawn.choice(sorted(self.pictures))], drawn)
        return new, lambda: ImagePatches(patch=4, channels=3)(new)

    def _sounds(self, drawn: Any) -> Any:
        import soundfile

        wave = (drawn.standard_normal((900, 2)) * 0.1).astype("float32")
        for form in sorted(soundfile.available_formats()):
            for subtype in sorted(soundfile.available_subtypes(form)):
                data = io.BytesIO()
                with contextlib.suppress(Exception):
                    soundfile.write(data, wave[:, 0], 8000, format=form, subtype=subtype)
                    if data.getvalue():
                        yield f"{form} {subtype}", data.getvalue()

    def _sound(self, drawn: random.Random) -> Any:
        from multimodal_tokenizers import AudioFrames

        new = mutated(self.sounds[drawn.choice(sorted(self.sounds))], drawn)
        return new, lambda: AudioFrames(rate_hz=8000, mels=8)(new)

    def _settings(self, drawn: random.Random) -> Any:
        from multimodal.train import Recipe
        from multimodal.train.settings import Setting, changed

        names = [f"recipe.{field.name}" for field in dataclasses.fields(Recipe)]
        names += [
            "core.width",
            "core.depth",
            "core.heads",
            "core.rotary_split",
            "core.score",
            "tokenizers.text.causal",
            "mix",
        ]
        names += ["tasks.text -> label.weight", "model.seed", "tokenizers.label.names", "steps", "lr", "nobody", ""]
        typed = [f"{drawn.choice(names)}={drawn.choice(WORDS)}" for _ in range(drawn.choice((1, 1, 2)))]
        if drawn.random() < 0.1:
            typed[0] = typed[0].replace("=", drawn.choice(("", "==", " = ")))
        return "\n".join(typed), lambda: changed(self.job, [Setting.parse(text) for text in typed])

    def _commands(self, drawn: random.Random) -> Any:
        from multimodal.cli import main

        paths = [
            "model",
            "run",
            "bpe",
            "trouble",
            "shards",
            "table.jsonl",
            "tokenizer.json",
            "nowhere",
            ".",
            "run/log.jsonl",
            "run/checkpoints",
        ]
        options = [
            "--text",
            "--task",
            "--json",
            "--out",
            "--device",
            "--label",
            "--seed",
            "--max-tokens",
            "--temperature",
            "--help",
            "--plugin",
        ]
        options += [
            "--top-k",
            "--beams",
            "--count",
            "--rows",
            "--fields",
            "--files",
            "--max-bad",
            "--verify",
            "--split",
            "--config",
            "--value",
        ]
        commands = [
            "predict",
            "generate",
            "report",
            "shards",
            "check",
            "replay",
            "plan",
            "transcribe",
            "look",
            "nonsense",
            "",
        ]
        words = [drawn.choice(commands)] + [
            str(self.good / drawn.choice(paths)) for _ in range(drawn.choice((0, 1, 1, 2)))
        ]
        if words[0] == "shards" and len(words) > 2:
            words[2] = str(self.folder / "fresh" / "out")
        for _ in range(drawn.choice((0, 1, 2, 3))):
            words.append(drawn.choice(options))
            if drawn.random() < 0.8:
                words.append(drawn.choice((*WORDS[:-1], "cab", str(self.good / "nowhere.png"))))
        words = [word for word in words if "1e309" not in word or words[0] != "generate"]

        def run() -> Any:
            here = Path.cwd()
            os.chdir(self._fresh("x").parent)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    return main(words)
            except SystemExit as error:
                return error.code
            finally:
                os.chdir(here)

        return json.dumps(words), run


def work(options: argparse.Namespace, start: int, step: int, said: Any) -> None:
    """Every step-th case from `start`: a line of JSON about each, before and after it."""
    from multimodal.shapes import CheckpointError, ConfigError, MediaError, ShapeError, StreamError

    ours = (CheckpointError, ConfigError, MediaError, ShapeError, StreamError)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        doors = Doors(folder)
        chosen = options.doors.split(",") if options.doors else sorted(doors.doors)
        virtual = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            if sys.platform == "linux"
            else 0
        )
        if virtual:
            resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY, resource.RLIM_INFINITY))

        def late(*_: Any) -> None:
            raise Late

        signal.signal(signal.SIGALRM, late)
        warnings.simplefilter("ignore")
        said(ready=True)
        for number in range(start, options.cases, step):
            drawn = random.Random(f"{options.seed}/{number}")
            door = chosen[number % len(chosen)]
            said(number=number, door=door)
            data: bytes | str = b""
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            trace = ""
            try:
                data, run = doors.doors[door](drawn)
                run()
                found = "value"
            except ours as error:
                found = type(error).__name__
                if len(str(error)) > 20_000:
                    found, trace = "failure: a message of more than 20,000 characters", str(error)[:500]
            except Late:
                found, trace = f"failure: more than {SECONDS} s", traceback.format_exc()
            except BaseException as error:
                frames = [
                    f
                    for f in traceback.extract_tb(error.__traceback__)
                    if "multimodal" in f.filename and "fuzz" not in f.filename
                ]
                where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
                found, trace = f"failure: {type(error).__name__} at {where}", traceback.format_exc()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown > 2**20 and not trace:  # KiB
                found, trace = "failure: more than 1 GiB", f"{grown} KiB"
            if trace:
                keep(options.out, door, number, data, trace)
                if options.only is not None:
                    print(trace, file=sys.stderr)
            said(done=number, door=door, found=found)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(out: str, door: str, number: int, data: bytes | str, trace: str) -> None:
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{door}-{number}.input").write_bytes(
        data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    )
    (folder / f"{door}-{number}.txt").write_text(trace, encoding="utf-8", errors="backslashreplace")


class Worker:
    """A process that works, and the case it is at."""

    def __init__(self, options: argparse.Namespace, start: int, step: int) -> None:
        self.step, self.at, self.door, self.over = step, start - step, "", False
        words = ["--cases", options.cases, "--seed", options.seed, "--doors", options.doors, "--out", options.out]
        command = [sys.executable, __file__, "--start", start, "--step", step, *words]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path[:2]), "RUST_BACKTRACE": "0"}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=self.log)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.rest, self.heard = b"", time.monotonic() + 120  # until it is ready

    def read(self) -> list[dict[str, Any]]:
        assert self.process.stdout is not None
        data = self.process.stdout.read() or b""
        *lines, self.rest = (self.rest + data).split(b"\n")
        found = [json.loads(line) for line in lines if line]
        for row in found:
            self.heard = time.monotonic()
            self.at, self.door = row.get("number", self.at), row.get("door", self.door)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--doors", default="")
    parser.add_argument("--out", default=str(Path(tempfile.gettempdir()) / "fuzz-failures"))
    parser.add_argument("--only", type=int)
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        options.cases = options.only + 1
        work(options, options.only, 1, lambda **row: print(row))
        return 0
    if options.start is not None:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a door prints is no report
        work(options, options.start, options.step, lambda **row: print(json.dumps(row), file=out, flush=True))
        return 0
    begun = time.monotonic()
    results: dict[str, Counter[str]] = {}
    workers = [Worker(options, i, options.workers) for i in range(min(options.workers, options.cases))]
    while any(not worker.over for worker in workers):
        time.sleep(0.05)
        for i, worker in enumerate(workers):
            if worker.over:
                continue
            code = worker.process.poll()
            for row in worker.read():
                if "found" in row:
                    results.setdefault(row["door"], Counter())[row["found"]] += 1
            stuck = time.monotonic() - worker.heard > STUCK_S
            if code is None and not stuck:
                continue
            if code == 0:
                worker.over = True
                continue
            worker.process.kill()
            worker.process.wait()
            worker.log.seek(0)
            said = worker.log.read()[-3000:].decode(errors="replace")
            if worker.at < 0 or not worker.door:
                print(f"a worker did not begin: {said}")
                return 1
            what = "failure: hangs" if stuck else f"failure: the process dies ({code})"
            results.setdefault(worker.door, Counter())[what] += 1
            keep(options.out, worker.door, worker.at, f"--only {worker.at} --seed {options.seed}", f"{what}\n{said}")
            workers[i] = Worker(options, worker.at + worker.step, worker.step)
            workers[i].door = worker.door
    seconds = time.monotonic() - begun
    failed = 0
    for door, counts in sorted(results.items()):
        failures = {name: n for name, n in counts.items() if name.startswith("failure")}
        failed += sum(failures.values())
        errors = ", ".join(
            f"{name} {n}" for name, n in sorted(counts.items()) if name != "value" and name not in failures
        )
        print(f"{door:<10} {sum(counts.values()):>6} cases  {counts['value']:>6} values  errors: {errors or 'none'}")
        for name, n in sorted(failures.items()):
            print(f"           {n:>6} {name}")
    total = sum(sum(counts.values()) for counts in results.values())
    print(
        f"{total} cases in {seconds:.0f} s ({total / seconds:.0f} a second), failures: {failed}"
        + (f", in {options.out}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
