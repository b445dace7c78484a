"""`check --values`: every file of a folder or row of a table, with the names of those that fail."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

import multimodal as mm
from multimodal.check.folder import check_values, values_of
from multimodal.cli import main
from multimodal_tokenizers import ImagePatches, TextBytes
from tests.check.planted import Numbers


@dataclass(frozen=True)
class FirstThree(Numbers):
    """Reads three numbers of each list, in silence."""

    decode = mm.Tokenizer.decode

    def encode(self, value):
        return super().encode(value[:3] if isinstance(value, list) else value)


@dataclass(frozen=True)
class FailsOnSeven(Numbers):
    """Puts two tokens at one place, only where a list holds a 7."""

    decode = mm.Tokenizer.decode

    def encode(self, value):
        tokens = super().encode(value)
        return mm.Tokens(tokens.content, tokens.position_NA * (7 not in value))


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i in range(6):
        draw = np.random.default_rng(i).integers(0, 255, (8, 8 + 4 * (i % 2)), dtype=np.uint8)
        Image.fromarray(draw).save(tmp_path / ("deep/er" if i % 2 else "") / f"{i}.png")
    (tmp_path / ".hidden.png").write_bytes(b"x")
    return tmp_path


def test_every_file_of_a_folder_is_checked_and_the_broken_ones_are_named(pictures):
    kind = ImagePatches(patch=4, channels=1)
    done = []
    found = check_values(kind, str(pictures), progress=lambda *done_of: done.append(done_of))
    assert found.passed, found
    assert [(count, total) for count, total, _ in done] == [
        (i, 6) for i in range(1, 7)
    ]  # the hidden file is none of them
    assert "deep/er/1.png" in [name for _, _, name in done]
    assert "on 0.png" in found.report.who
    whole = (pictures / "2.png").read_bytes()
    (pictures / "2.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "notes.doc").write_bytes(b"no picture")
    found = check_values(kind, str(pictures))
    assert [(name, check) for name, check, _ in found.failed] == [("2.png", "encode"), ("notes.doc", "encode")]
    assert "7 values, 5 pass" in str(found)
    assert "FAILED   2.png: encode: ImagePatches.encode: " in str(found)


def test_rows_of_tables_are_values_too(tmp_path):
    rows = [{"text": "one", "notes": [1, 2]}, {"text": "two", "notes": [3]}, {"text": "", "notes": [200]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    found = check_values(Numbers(), str(tmp_path / "a.jsonl"), "notes")
    assert [(name, check) for name, check, _ in found.failed] == [("row 3", "encode")]
    assert "ids run from 200 to 200" in found.failed[0][2]
    assert found.report is not None
    assert not found.report.failed
    assert [n for n, _, _ in check_values(TextBytes(), str(tmp_path / "a.jsonl"), "text").failed] == ["row 3"]
    with pytest.raises(mm.ConfigError, match=r"--column tex: .* has text, notes; did you mean 'text'"):
        values_of(Numbers(), str(tmp_path / "a.jsonl"), "tex")
    (tmp_path / "one.csv").write_text("word\nday\nnight\n", encoding="utf-8")
    assert values_of(TextBytes(), str(tmp_path / "one.csv")).read(1) == "night"
    assert values_of(TextBytes(), str(tmp_path / "a.jsonl")).read(1) == rows[1]


def test_a_value_that_breaks_a_check_is_named_with_the_check(tmp_path):
    for i, numbers in enumerate(([1, 2, 3, 4], [1, 2, 3, 5], [7, 8, 9])):
        (tmp_path / f"{i}.json").write_text(json.dumps(numbers), encoding="utf-8")
    failed = check_values(FirstThree(), str(tmp_path)).failed
    assert [(name, check) for name, check, _ in failed] == [("1.json", "values_differ")]
    assert "the tokens of 0.json" in failed[0][2]
    failed = check_values(FailsOnSeven(), str(tmp_path)).failed
    assert [(name, check) for name, check, _ in failed] == [("2.json", "places_differ")]


def test_the_command_prints_it_and_refuses_what_fits_no_folder(tmp_path, pictures, capsys):
    kind = ["check", "multimodal_tokenizers:ImagePatches", "--config", '{"patch": 4, "channels": 1}']
    (pictures / "0.png").write_bytes(b"broken")
    assert main([*kind, "--values", str(pictures)]) == 1
    assert "6 values, 5 pass\n  FAILED   0.png: encode: " in capsys.readouterr().out
    for more, problem in (
        (["--values", str(tmp_path / "none")], "there is no file or folder"),
        (["--column", "a"], "give that too"),
        (["--values", str(pictures), "--column", "a"], "is a folder, whose files are the values"),
        (["--values", str(pictures), "--value", "a.png"], "give one of them"),
    ):
        assert main([*kind, *more]) == 2
        assert problem in capsys.readouterr().err
