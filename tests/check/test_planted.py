"""Each broken tokenizer of planted.py fails the check that names its fault, and nothing else; PLANTED.md lists them all."""

import re
import tempfile
from pathlib import Path

import pytest

from multimodal.check import TOKENIZER_CHECKS, tokenizer_checks
from multimodal.check.models import CHECKS as IN_MODELS
from multimodal.check.report import run_checks
from tests.check import planted
from tests.check.test_faults_kit import PLANTED as EARLIER

LIST = Path(__file__).with_name("PLANTED.md")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder for what the faults leave behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def report_of(tokenizer, values):
    """What came of the checks that need no model, which is trained."""
    slow = {check.name for check in IN_MODELS}
    return run_checks(
        "", [check for check in tokenizer_checks(tokenizer, values) if str(check) not in slow], raises=False
    )


@pytest.mark.parametrize(
    ("tokenizer", "values", "name", "problem"),
    [pytest.param(*case, id=f"{type(case[0]).__name__}-{case[2]}") for case in planted.PLANTED],
)
def test_a_planted_fault_is_caught_by_the_check_that_names_it(tokenizer, values, name, problem):
    report = report_of(tokenizer, values())
    assert [result.name for result in report.failed] == [name], report
    assert re.search(problem, report.failed[0].detail), report.failed[0].detail


HEALTHY = [
    (planted.Numbers(), planted.lists),
    (planted.ReadNumbers(), planted.lists),
    (planted.Wave(), planted.waves),
    (planted.ReadWave(), planted.waves),
    (planted.Text(), planted.words),
    (planted.ReadText(), planted.words),
    (planted.Kind(), planted.classes),
    (planted.Record(), planted.records),
    (planted.Hot(), planted.lists),
]


@pytest.mark.parametrize(("tokenizer", "values"), HEALTHY, ids=lambda x: type(x).__name__)
def test_what_the_faults_vary_keeps_the_contract(tokenizer, values):
    report = report_of(tokenizer, values())
    assert not report.failed, report


def test_the_list_has_every_planted_tokenizer_with_its_fault_and_its_check():
    rows = re.findall(r"^\| (\w+) \| (.+?) \| (\w+) \|$", LIST.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {(name, check): fault for name, fault, check in rows}
    here = {(type(t).__name__, check): type(t).__doc__ for t, _, check, _ in planted.PLANTED}
    before = {(type(t).__name__, check) for _, t, _, check, _ in EARLIER}
    beside = {("FileOfTheFolder", "fresh_process"), ("GlobalVariable", "fresh_process")}
    assert set(listed) == set(here) | before | beside
    assert {key: listed[key] for key in here} == here
    assert len(listed) >= 100
    assert {check for _, check in listed} <= {check.name for check in TOKENIZER_CHECKS}
