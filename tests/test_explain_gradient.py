"""scripts/explain_gradient.py: every op has a page, what it says is so, and a wrong gradient is called wrong."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minillm import autograd, functional, lora, op_examples
from minillm.autograd import op

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/explain_gradient.py"
OPS = op_examples.ops_of(autograd, functional, lora)

spec = importlib.util.spec_from_file_location("explain_gradient", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


# ------------------------------------------------------------------ every op


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_page_and_a_right_gradient(name):
    page = script.explain(OPS[name])
    text = script.as_text(page)
    assert page.ok, page.verdict
    assert text.isascii() and max(map(len, text.splitlines())) <= 122  # headings of a kernel file move in by 2
    parts = dict(page.parts)
    assert parts["Equation"] == op_examples.sections(OPS[name])["equation"]
    assert "?" not in parts["Kept in memory until the way back"], "an array that the way back holds under no name"
    path, line = page.source.split(":")
    source = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert source[int(line) - 1] == "@op" and source[int(line)].startswith(f"def {name}(")


def test_the_page_says_what_is_kept_and_how_large_it_is():
    parts = dict(script.explain(OPS["rms_norm"]).parts)  # B = 2, D = 3, T = 4
    kept = [line.split() for line in parts["Kept in memory until the way back"].splitlines()]
    assert ["r", "(8,)", "float64", "64"] in kept
    assert ["x", "x", "(2,", "4,", "3)", "float64", "192"] in kept
    assert "280 bytes, 64 of them held by the way back alone. The inputs have 216." in " ".join(kept[-1])
    kept = dict(script.explain(OPS["linear"]).parts)["Kept in memory until the way back"]
    assert "336 bytes, 0 of them" in kept  # `flat` is a view of x
    assert "Measured: no array" in dict(script.explain(OPS["add"]).parts)["Kept in memory until the way back"]


def test_the_page_has_the_derivation_of_the_kernel_file_without_its_rungs():
    title, text = script.explain(OPS["rms_norm"]).parts[2]
    assert "kernels/rms_norm.py" in title
    assert "Contract\n  x (..., D)" in text and "r moves by -r^3 (x . e) / D" in text and "numba" not in text


def test_the_signature_is_what_a_caller_sees():
    assert script.signature(OPS["linear_cross_entropy"]).startswith(
        "linear_cross_entropy(hidden, weight, targets, *, w"
    )
    page = script.explain(OPS["concat"])
    assert "inputs[1][0, 0, 0]" in dict(page.parts)["Check of the example, in float64"]


def test_another_seed_draws_another_example():
    pages = [script.explain(OPS["mul"], seed) for seed in (0, 0, 1)]
    assert pages[0] == pages[1] != pages[2]


# ------------------------------------------------------------------ ops that are wrong


def double(factor):
    """y = 2 x whose way back multiplies by `factor`."""

    @op
    def double(x):
        """y = 2 x.

        dx = 2 g.
        Keeps nothing.
        Example: double(randn(A, B))
        """
        return 2 * x, (lambda g: factor * g,)

    return double


ONE_ELEMENT = np.array([[2.0, 2.0, 2.0], [2.0, -2.0, 2.0]])  # none of the elements that the page picks to show


@pytest.mark.parametrize("factor", [-2.0, 2.0002, 0.0, np.nan, ONE_ELEMENT], ids=str)
def test_a_wrong_gradient_is_found(factor, monkeypatch, capsys):
    monkeypatch.setattr(script, "OPS", {"double": double(factor)})
    assert script.main(["double"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("WRONG: double's gradient for x ")
    if factor is ONE_ELEMENT:
        assert any(line.startswith("  worst of 6: x[1, 1] ") for line in lines)
    assert script.main(["--all"]) == 1
    assert "WRONG: double's gradient" in capsys.readouterr().out


def test_the_same_op_with_the_right_gradient_passes(monkeypatch, capsys):
    monkeypatch.setattr(script, "OPS", {"double": double(2.0)})
    assert script.main(["double"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("OK: double agrees ")


# ------------------------------------------------------------------ the command line


def test_the_script_runs_from_anywhere_with_nothing_on_the_path(tmp_path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, SCRIPT, "attention"]
    run = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "o_i = sum_j p_ij v_j" in run.stdout and "ds_ij = p_ij (dp_ij - delta_i)" in run.stdout
    assert "\n  lse " in run.stdout and "\n  q[0, 0, 0, 0] " in run.stdout
    assert run.stdout.splitlines()[-1].startswith("OK: attention agrees ")


def test_all_writes_every_op(tmp_path, capsys):
    assert script.main(["--all", "--out", str(tmp_path / "gradients.md")]) == 0
    assert "all gradients are right" in capsys.readouterr().out
    lines = (tmp_path / "gradients.md").read_text(encoding="utf-8").splitlines()
    assert [line[4:] for line in lines if line.startswith("### ")] == list(OPS)
    assert [line.split("]")[0][3:] for line in lines if line.startswith("- [")] == list(OPS)
    assert "## minillm/autograd.py: reductions" in lines and "## minillm/functional.py: norms" in lines


def test_list_has_every_op_with_its_equation(capsys):
    assert script.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(OPS)
    split = next(line for line in lines if line.startswith("split "))
    assert (
        split.split(maxsplit=1)[1]
        == "y_1, y_2, ... = x cut along an axis into pieces of these sizes (views, not copies)"
    )


@pytest.mark.parametrize("name, hint", [("atention", "did you mean attention?"), ("zzz", "--list prints the names")])
def test_an_unknown_op_is_one_line(name, hint, capsys):
    assert script.main([name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"explain_gradient.py: there is no op {name!r}; {hint}\n"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "required"),
        (["add", "--all"], "not allowed"),
        (["add", "--out", "page.md"], "--out goes with --all"),
        (["--all", "--out", "no/such/folder/page.md"], "No such file"),
        (["add", "--seed", "-1"], "--seed must not be negative"),
        (["add", "--seed", "x"], "invalid int"),
    ],
)
def test_a_wrong_option_is_refused(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "OPS", {"add": OPS["add"]})
    with pytest.raises(SystemExit) as stop:
        script.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and complaint in line
