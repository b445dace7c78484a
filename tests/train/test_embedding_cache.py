"""Vectors of a frozen tower on disk: the same losses, no value twice, never those of other weights, no harm from a kill."""

import copy
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multimodal as mm
from multimodal.shapes import ConfigError
from multimodal.tower import MLPConnector, PixelShuffle, Pooled, Tower, _Inner
from multimodal.train import cached
from multimodal.train.embedding_cache import HEADER, SUFFIX
from multimodal_tokenizers import ImagePatches, Labels, TextBytes

TASK = "image -> shade"
CORE = mm.Core(width=24, depth=2, heads=2)
PATCHES = ImagePatches(patch=2, channels=1, position="rotary")
FROZEN = {"freeze": ("image.frozen_part",)}
PLAIN = {"steps": 8, "batch": 4, "lr": 3e-3, "precision": "float32", "device": "cpu", "quiet": True}


def make(tower: Any = None, seed: int = 0) -> mm.Model:
    tower = tower or Tower(PATCHES, CORE.replace(dropout=0.3, drop_path=0.3), PixelShuffle(2))
    return mm.Model(
        {"image": tower, "shade": Labels(("dark", "bright"))}, mm.Core(width=16, depth=1, heads=2), [TASK], seed=seed
    )


def samples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    sizes = [(8, 8), (4, 8), (8, 4)]
    return [
        {"image": draw.integers(100 * (i % 2), 100 * (i % 2) + 99, (*sizes[i % 3], 1), dtype=np.uint8), "shade": i % 2}
        for i in range(count)
    ]


DATA = [{**sample, "shade": ("dark", "bright")[sample["shade"]]} for sample in samples(12)]
OTHERS = [{**sample, "shade": ("dark", "bright")[sample["shade"]]} for sample in samples(6, seed=1)]


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of values in each call of a tower's forward."""
    calls: list[int] = []
    forward = _Inner.forward

    def counted(self: Any, content_NF: Any, places: Any) -> Any:
        calls.append(len(places.lengths))
        return forward(self, content_NF, places)

    monkeypatch.setattr(_Inner, "forward", counted)
    return calls


def losses(run: mm.Run) -> list[float]:
    return [row["loss"] for row in run.history if "loss" in row]


def records(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{SUFFIX}"))


@pytest.mark.parametrize("more", [{}, {"ema": 0.5}, {"tokens": 64, "batch": 64}], ids=["plain", "ema", "packs"])
def test_training_is_the_same_and_the_tower_is_passed_once(tmp_path: Path, passed: list[int], more: dict[str, Any]):
    settings = {**PLAIN, **FROZEN, "steps": 9, "evaluate_every": 3, **more}
    plain, first, again = make(), make(), make()
    wanted = mm.fit(plain, {TASK: DATA}, evaluation={TASK: OTHERS}, **settings)
    assert sum(passed) > 2 * (len(DATA) + len(OTHERS))
    passed.clear()
    found = mm.fit(first, {TASK: DATA}, evaluation={TASK: OTHERS}, **settings, cache=tmp_path / "vectors")
    assert sum(passed) == len(DATA) + len(OTHERS)
    passed.clear()
    third = mm.fit(again, {TASK: DATA}, evaluation={TASK: OTHERS}, **settings, cache=str(tmp_path / "vectors"))
    assert passed == []
    assert losses(found) == pytest.approx(losses(wanted), abs=1e-5)
    assert losses(third) == pytest.approx(losses(wanted), abs=1e-5)
    assert third.last(f"{TASK} loss") == pytest.approx(wanted.last(f"{TASK} loss"), abs=1e-5)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, atol=1e-4, rtol=0)
    # afterwards nothing is cached, and all learns again
    assert again.embeds["image"].cache is None
    assert all(p.requires_grad for p in again.parameters())


def test_stored_vectors_are_those_of_the_tower_to_the_bit(tmp_path: Path):
    model = make().eval()
    with torch.no_grad(), cached(model, tmp_path) as cache:
        streams = [model.pack(TASK, DATA) for _ in range(2)]
        first, again = (model.rows(stream) for stream in streams)
        assert (cache.computed, cache.read) == (12, 12)
    with torch.no_grad():
        assert torch.equal(first, model.rows(streams[0]))
    assert torch.equal(first, again)


def test_mixed_values_keep_their_order(tmp_path: Path):
    """Some are there, some are not, and one comes twice."""
    model = make().eval()
    with cached(model, tmp_path) as cache:
        model.predict(TASK, [DATA[3], DATA[0]])
        some = [DATA[i] for i in (5, 0, 1, 5, 3, 2)]
        with torch.no_grad():
            rows = model.rows(model.pack(TASK, some))
        assert (cache.computed, cache.read) == (5, 3)
    with torch.no_grad():
        torch.testing.assert_close(rows, model.rows(model.pack(TASK, some)), atol=1e-5, rtol=0)


def test_other_weights_have_other_vectors(tmp_path: Path, passed: list[int]):
    model = make()
    with cached(model, tmp_path):
        model.predict(TASK, DATA)
        passed.clear()
        model.predict(TASK, DATA)
        assert passed == []
        with torch.no_grad():
            next(p for p in model.embeds["image"].frozen_part.core.parameters() if p.dim() == 2).mul_(1.5)
        with torch.no_grad():
            found = model.eval().rows(model.pack(TASK, DATA))
        assert sum(passed) == len(DATA)
        passed.clear()
        copied = copy.deepcopy(model)
        copied.predict(TASK, DATA)
        assert passed == []
    with torch.no_grad():
        assert torch.equal(found, model.rows(model.pack(TASK, DATA)))
    passed.clear()
    copied.predict(TASK, DATA)  # the copy outlives the cache
    assert sum(passed) == len(DATA)


def test_the_declaration_is_in_the_key_but_what_maps_vectors_to_rows_is_not(tmp_path: Path, passed: list[int]):
    first = make(Tower(PATCHES, CORE, PixelShuffle(2)))
    weights = first.embeds["image"].frozen_part.state_dict()
    for tower, computed in (
        (Tower(PATCHES, CORE, PixelShuffle(2)), len(DATA)),
        (Tower(PATCHES, CORE, PixelShuffle(2, MLPConnector(hidden=8))), 0),
        (Tower(PATCHES, CORE.replace(rotary_base=(50.0, 5.0, 5.0)), PixelShuffle(2)), len(DATA)),
        (Tower(PATCHES, CORE, Pooled(16)), len(DATA)),
    ):
        model = make(tower)
        model.embeds["image"].frozen_part.load_state_dict(weights)
        passed.clear()
        with cached(model, tmp_path):
            model.predict(TASK, DATA)
        assert sum(passed) == computed, tower


def test_a_tower_that_learns_is_not_cached(tmp_path: Path, passed: list[int]):
    model, plain = make(), make()
    with cached(model, tmp_path):
        found = mm.fit(model, {TASK: DATA}, **PLAIN)
        assert sum(passed) == PLAIN["steps"] * PLAIN["batch"]
        for weight in model.parameters():
            weight.grad = None
        model.rows(model.pack(TASK, DATA)).sum().backward()  # in evaluation mode, too
    assert losses(found) == losses(mm.fit(plain, {TASK: DATA}, **PLAIN))
    assert all(p.grad is not None for p in model.embeds["image"].frozen_part.parameters())
    assert list(tmp_path.iterdir()) == []


def test_hooks_in_the_tower_are_heeded(tmp_path: Path):
    model = make().eval()
    with torch.no_grad(), cached(model, tmp_path):
        stream = model.pack(TASK, DATA)
        before = model.rows(stream)
        hook = model.embeds["image"].frozen_part.core.blocks[0].register_forward_hook(lambda m, i, out: out + 1)
        assert not torch.allclose(model.rows(stream), before)
        hook.remove()
        assert torch.equal(model.rows(stream), before)


def test_bfloat16_has_its_own_vectors(tmp_path: Path, passed: list[int]):
    model = make().eval()
    with torch.no_grad(), cached(model, tmp_path):
        stream = model.pack(TASK, DATA)
        model.rows(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lower = model.rows(stream)
            assert sum(passed) == 2 * len(DATA)
            assert torch.equal(model.rows(stream), lower)
        model.rows(stream)
    assert sum(passed) == 2 * len(DATA)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.rows(stream), lower)


def test_a_torn_record_is_computed_again(tmp_path: Path, passed: list[int]):
    model = make()
    with cached(model, tmp_path):
        wanted = [x.confidence for x in model.predict(TASK, DATA)]
    (path,) = records(tmp_path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 200, HEADER.size - 1, 0):
        for old in records(tmp_path):
            old.unlink()
        path.write_bytes(whole[:size])
        passed.clear()
        with cached(model, tmp_path):
            found = [x.confidence for x in model.predict(TASK, DATA)]
        assert 0 < sum(passed) <= len(DATA)
        assert found == [pytest.approx(x, abs=1e-6) for x in wanted]
        passed.clear()
        with cached(model, tmp_path):
            model.predict(TASK, DATA)
        assert passed == []


@pytest.mark.parametrize("at", [0, HEADER.size - 2, HEADER.size + 5], ids=["magic", "header", "numbers"])
def test_a_damaged_record_is_computed_again(tmp_path: Path, passed: list[int], at: int):
    model = make()
    with cached(model, tmp_path):
        wanted = [x.confidence for x in model.predict(TASK, DATA)]
    (path,) = records(tmp_path)
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)
    for computed in (1 if at > HEADER.size else len(DATA), 0):
        passed.clear()
        with cached(model, tmp_path):
            found = [x.confidence for x in model.predict(TASK, DATA)]
        assert sum(passed) == computed
        assert found == [pytest.approx(x, abs=1e-6) for x in wanted]


def test_a_full_disk_and_a_deleted_folder_cost_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make()
    with cached(model, tmp_path / "deleted") as cache:
        wanted = [x.confidence for x in model.predict(TASK, DATA)]
        cache.close()
    with cached(model, tmp_path / "deleted") as cache:
        shutil.rmtree(tmp_path / "deleted")
        assert [x.confidence for x in model.predict(TASK, DATA)] == wanted
    made = Path.open

    def full(path: Path, mode: str = "r", **rest: Any) -> Any:
        if mode == "xb":
            raise OSError(28, "No space left on device")
        return made(path, mode, **rest)

    monkeypatch.setattr(Path, "open", full)
    with cached(model, tmp_path / "full"), pytest.warns(UserWarning, match="No space left"):
        assert [x.confidence for x in model.predict(TASK, DATA)] == wanted


def _predict(folder: Path, first: int) -> None:
    torch.set_num_threads(1)
    with cached(make(), folder) as cache:
        for i in range(6):
            cache.model.predict(TASK, [DATA[(first + i) % 12]])


def test_two_processes_write_at_once(tmp_path: Path, passed: list[int]):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_predict, args=(tmp_path, first)) for first in (0, 6)]
    model = make()
    with cached(model, tmp_path):
        model.predict(TASK, DATA[:1])  # the folder is read before the others write
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert len(records(tmp_path)) == 3
        passed.clear()
        model.predict(TASK, DATA)
        assert passed == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_each_process_writes_its_own_file(tmp_path: Path, passed: list[int]):
    model = make()
    with cached(model, tmp_path):
        model.predict(TASK, DATA[:2])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                model.predict(TASK, DATA[2:4])
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        model.predict(TASK, DATA[4:6])
        assert len(records(tmp_path)) == 2
    passed.clear()
    other = make()
    with cached(other, tmp_path) as cache:
        other.predict(TASK, DATA[:6])
        assert (cache.computed, passed) == (0, [])


def test_nothing_to_cache_is_refused(tmp_path: Path):
    for freeze in ((), ("image.connector",), ("image.frozen_part.core",)):
        with pytest.raises(ConfigError, match=r"freezes none; add \"image\.frozen_part\", or leave cache out"):
            mm.fit(make(), {TASK: DATA}, **PLAIN, freeze=freeze, cache=tmp_path / "vectors")
    assert not (tmp_path / "vectors").exists()
    plain = mm.Model({"text": TextBytes()}, CORE, ["-> text"])
    with pytest.raises(ConfigError, match=r"no kind of this model is a Tower.* mm\.Tower\.of\("):
        mm.fit(plain, {"-> text": [{"text": "a"}]}, **PLAIN, freeze=("text",), cache="vectors")
    with (
        pytest.raises(ConfigError, match=r"no kind of this model is a Tower.* mm\.Tower\.of\("),
        cached(plain, tmp_path),
    ):
        pass
    with pytest.raises(ConfigError, match="use parallel='ddp'"):
        mm.Recipe(cache="vectors", parallel="fsdp")
    (tmp_path / "file").write_text("a")
    with pytest.raises(ConfigError, match="cannot be made"):
        mm.fit(make(), {TASK: DATA}, **PLAIN, **FROZEN, cache=tmp_path / "file")


def test_a_run_may_be_resumed_with_a_cache(tmp_path: Path):
    """The folder of vectors changes no sample, so a run that began without one goes on with one."""
    settings = {**PLAIN, **FROZEN, "folder": tmp_path / "run"}

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mm.fit(make(), {TASK: DATA}, **settings, checkpoint_every=2, trackers=[stop])
    run = mm.fit(make(), {TASK: DATA}, **settings, checkpoint_every=2, resume=True, cache=tmp_path / "vectors")
    assert run.finished
    straight = mm.fit(make(), {TASK: DATA}, **PLAIN, **FROZEN)
    assert losses(run)[-5:] == pytest.approx(losses(straight)[-5:], abs=1e-5)
