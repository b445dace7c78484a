"""The tests that a run of pytest skipped, one id a line: `python .ci/skipped.py junit.xml`."""

import sys
from pathlib import Path
from xml.etree import ElementTree

for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    if case.find("skipped") is not None:
        # a file that skips itself as a whole has no class, and its module as the name
        module, name = (case.get("classname"), case.get("name")) if case.get("classname") else (case.get("name"), None)
        path = Path(*str(module).split(".")).with_suffix(".py")
        print(path.as_posix() if name is None else f"{path.as_posix()}::{name}")
