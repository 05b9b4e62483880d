"""The README says what is true: its examples print what stands below them, its table of files is in reading order."""

import contextlib
import io
import re
import textwrap
from pathlib import Path

import pytest

from tests.test_architecture import ARROWS, OP, row_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
CODE, OUTPUT = r"^```python\n((?:(?!```)[^\n]*\n)*)```\n", r"\n((?:    [^\n]*\n|\n(?=    ))+)"
EXAMPLES = re.findall(CODE + OUTPUT, README, re.MULTILINE)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_prints_what_stands_below_it(code, printed, monkeypatch):
    """Word for word, and numbers to a tenth: they differ a little between processors."""
    monkeypatch.chdir(ROOT)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        exec(compile(code, "README.md", "exec"), {"__name__": "README"})
    found, expected = told.getvalue(), textwrap.dedent(printed)
    assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (found, expected)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.1)


def test_the_examples_are_found():
    assert len(EXAMPLES) == 3
    assert all(text in code for text, (code, _) in zip(("AdamW", "F.attention", "on_cpu"), EXAMPLES, strict=True))


def test_the_table_of_files_is_in_reading_order():
    """No row imports a row below it, and every module has one; numba_cuda is imported when it is first called."""
    cells = re.findall(r"^\| (`.*?) \|", README, re.MULTILINE)
    cells = cells[next(i for i, cell in enumerate(cells) if "kernels/device.py" in cell) :]
    seen = []
    for cell in cells:
        folder = ""
        for name in re.findall(r"`([^`]+)`", cell):
            folder = name[: name.rfind("/") + 1] or folder
            if name.endswith((".py", "/")) and not name.startswith("tests/") and folder != "tests/":
                module = (folder + name.rpartition("/")[2]).removesuffix(".py").rstrip("/").replace("/", ".")
                seen.append(row_of(module if module.startswith("minillm") else f"minillm.{module}"))
    places = {}
    for place, row in enumerate(seen):
        places.setdefault(row, place)
    rows = set(ARROWS) - {"kernels", "scripts", "tests"}
    assert set(places) == rows
    for row in rows - {"kernels.numba_cuda"}:
        below = [other for other in ARROWS[row] if other != "kernels.numba_cuda" and places[other] > places[row]]
        assert not below, f"{row} imports {below}, which the README names later"
    assert places[OP] < places["autograd"]
