"""scripts/mutants.py: the table fits the sources, and a fault that the tests miss is said to have survived."""

import asyncio
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts/mutants.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_there_are_many_and_each_is_another():
    assert len({(m.file, m.old, m.new) for m in script.MUTANTS}) == len(script.MUTANTS) >= 90
    assert script.TESTS.keys() == {m.file for m in script.MUTANTS} >= script.AREAS.keys()
    assert all((ROOT / path).exists() for tests in script.TESTS.values() for path in tests)


@pytest.mark.parametrize("mutant", script.MUTANTS, ids=lambda m: f"{m.file}: {m.fault}")
def test_the_table_fits_the_sources(mutant):
    """Whoever edits a line that a mutant lives in edits the mutant too."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    mutated = mutant.applied(text)
    compile(mutated, mutant.file, "exec")
    assert mutated != text
    assert len(set(mutated.splitlines()) - set(text.splitlines())) <= 1, "a fault is one line, changed or gone"
    assert re.match(r"\w+: ", mutant.fault), "a fault begins with the name by which its tests are chosen"


def test_a_mutant_whose_text_is_gone_is_named():
    mutant = script.Mutant("a.py", "x + 1", "x - 1", "next: a sign")
    assert mutant.applied("y = x + 1") == "y = x - 1"
    for text, count in (("y = x", 0), ("y = x + 1 + x + 1", 2)):
        with pytest.raises(
            ValueError, match=f"mutant 'next: a sign': a.py should have its text once, .* {count} times"
        ):
            mutant.applied(text)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Two functions, of which the tests know one."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # these tests need none, and start four times as fast
    (tmp_path / "engine.py").write_text("def twice(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "test_engine.py").write_text("import engine\n\n\ndef test_twice():\n    assert engine.twice(3) == 6\n")
    return tmp_path


TESTS = {"engine.py": ["test_engine.py"]}


def mutants(*rows):
    return [script.Mutant("engine.py", *row) for row in rows]


def test_what_no_test_notices_has_survived(project, capsys):
    rows = mutants(
        ("2 * x", "3 * x", "twice: thrice"),
        ("x / 2", "x / 3", "half: a third"),
    )
    done = script.run(project, rows, TESTS, jobs=2)
    assert {mutant.fault: outcome for mutant, outcome in done} == {
        "twice: thrice": ("killed", "test_engine.py::test_twice"),
        "half: a third": ("passed", ""),
    }
    out = capsys.readouterr().out
    assert re.search(r"/2 killed .* engine.py  twice: thrice  \[test_engine.py::test_twice\]\n", out)
    assert re.search(r"/2 SURVIVED .* engine.py  half: a third\n", out)
    assert re.search(r"engine.py +1 of 2 killed\n", out)
    assert (project / "engine.py").read_text().count("2") == 2, "the checkout itself was mutated"


def test_each_area_is_judged_by_its_own_tests(project, capsys):
    (project / "data.py").write_text("def third(x):\n    return x / 3\n")
    (project / "test_data.py").write_text(
        "import data\nimport engine\n\n\ndef test_all():\n    assert data.third(engine.half(6)) == 1\n"
    )
    rows = [*mutants(("x / 2", "x / 4", "half: a quarter")), script.Mutant("data.py", "x / 3", "x / 4", "third: no")]
    done = script.run(project, rows, TESTS | {"data.py": ["test_data.py"]}, jobs=1)
    assert [outcome for _, outcome in done] == [("passed", ""), ("killed", "test_data.py::test_all")]


def test_a_hang_is_ended(project):
    (project / "test_engine.py").write_text("def test_hang():\n    while True:\n        pass\n")
    assert asyncio.run(script.run_tests(project, ["test_engine.py"], 0.5)).word == "timeout"


def test_tests_that_fail_anyway_prove_nothing(project):
    (project / "test_engine.py").write_text("def test_no():\n    assert False\n")
    with pytest.raises(ValueError, match=r"without any fault, .*::test_no fails"):
        script.run(project, mutants(("2 * x", "3 * x", "twice: thrice")), TESTS, jobs=1)


def test_wrong_options_and_the_exit_status(monkeypatch, capsys):
    assert script.main(["--list", "--only", "rms_norm"]) == 0
    assert "eps stands outside the root" in capsys.readouterr().out
    assert script.main(["--list", "--only", "ppo.py", "DPO.py"]) == 0
    out = capsys.readouterr().out
    assert "ppo.py" in out and "dpo.py" in out and "pack.py" not in out
    for wrong, message in (
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--only", "zebra"], "no mutant has 'zebra'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            script.main(wrong)
        assert message in capsys.readouterr().err
    mutant = script.MUTANTS[0]
    for word, status in (("passed", 1), ("killed", 0), ("timeout", 0)):
        monkeypatch.setattr(script, "run", lambda *args, word=word: [(mutant, script.Outcome(word, ""))])
        assert script.main([]) == status
    assert "1 of 1 killed" in capsys.readouterr().out
