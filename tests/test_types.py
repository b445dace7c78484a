"""The types of the public names are complete: a user's file passes pyright's strict rules without a comment to ignore any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import multimodal as mm

HERE = Path(__file__).parent
PROGRAM = HERE / "programs" / "typed.py"


def findings(program: str, folder: Path) -> list[str]:
    """What pyright says of a program under its strict rules."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    settings = {
        "typeCheckingMode": "strict",
        "include": ["program.py"],
        "extraPaths": [str(HERE.parent), str(HERE.parent / "tokenizers")],
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        pytest.skip(f"pyright does not start here: {(done.stdout + done.stderr)[-300:]}")
    return [f"{item['range']['start']['line'] + 1}: {item['message']}" for item in found["generalDiagnostics"]]


@pytest.mark.slow
def test_a_users_program_passes_strict_rules(tmp_path: Path) -> None:
    pytest.importorskip("pyright")
    program = PROGRAM.read_text(encoding="utf-8")
    assert "ignore" not in program
    assert not findings(program, tmp_path)
    # and the rules are strict: a wrong type and an unknown name are found
    wrong = program + "\nmodel.predict(3)\nprint(mm.no_such_name)\n"
    found = findings(wrong, tmp_path)
    assert any("int" in line for line in found)
    assert any("no_such_name" in line for line in found)


def test_the_names_for_type_checkers_are_those_at_run_time() -> None:
    """`__init__.pyi` and `__init__.py` name the same."""
    lines = (HERE.parent / "multimodal" / "__init__.pyi").read_text(encoding="utf-8").splitlines()
    typed = {line.rsplit(" as ", 1)[1] for line in lines if " as " in line}
    public = {name for name in dir(mm) if not name.startswith("__")}
    assert typed == public, typed ^ public
