"""scripts/gpu_check.sh without a GPU: what an interpreter of ours is asked to run, and what is said of how it ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.kernels import cuda

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_check.sh"
PYTHON = """#!/usr/bin/env bash
case "$2" in
    *check_device*) exit 0 ;;
esac
echo "${*//$'\\n'/; }" >> "$CALLS"
case "$*" in
    *"$FAILS"*) exit 3 ;;
    *"$HANGS"*) sleep 60 ;;
esac
"""


@pytest.fixture
def check(tmp_path):
    """check(fails=, hangs=, seconds=) -> (exit status, what was printed, the commands that were run)."""
    for name, text in (("python", PYTHON), ("nvidia-smi", "#!/usr/bin/env bash\necho ${CAPABILITY:-8.0}\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def check(fails="nothing", hangs="nothing", seconds=480, capability="8.0"):
        calls.write_text("")
        told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "CALLS": str(calls)}
        told |= {"FAILS": fails, "HANGS": hangs, "SECONDS_IN_ALL": str(seconds), "CAPABILITY": capability}
        command = ["bash", str(SCRIPT), str(tmp_path / "out")]
        found = subprocess.run(command, env=os.environ | told, capture_output=True, text=True, timeout=60)
        assert found.stderr == ""
        return found.returncode, found.stdout, calls.read_text().splitlines()

    return check


def test_every_part_is_run_and_what_passed_is_not_run_again(check):
    status, printed, calls = check(fails="--dtype float32")
    assert status == 1 and "FAILED: kernels-float32 (3)\n" in printed and "all parts passed" not in printed
    assert [call.split()[0] for call in calls] == ["-c", "-m"] + ["scripts/bench_kernels.py"] * 2 + [
        "scripts/bench_training.py"
    ] * 6 + ["scripts/tune_attention.py", "scripts/bench_kernels.py"]
    status, printed, calls = check()
    assert status == 0 and printed.endswith("all parts passed\n") and printed.count("passed before") == 12
    assert len(calls) == 1 and "--dtype float32 --check --json" in calls[0]
    _, printed, calls = check(capability="9.0")  # what Hopper alone has
    assert len(calls) == 1 and calls[0].endswith("--kernels cuda_wgmma")


def test_all_kernels_are_compiled_before_the_first_is_launched(check, monkeypatch, capsys):
    """The very text that is run, on a compiler that only notes what it is asked for."""
    ahead = []
    monkeypatch.setattr(cuda, "compile_ahead", ahead.extend)
    exec(re.search(r"^compile_all='(.*?)'$", SCRIPT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1], {})
    assert sorted(source.name for source in ahead) == sorted(path.name for path in cuda.FOLDER.glob("*.cu"))
    assert f" instances of {len(ahead)} files\n" in capsys.readouterr().out
    _, printed, calls = check(fails="compile_ahead")
    assert "compile_ahead" in calls[0] and "FAILED: compile (3)\n" in printed and len(calls) == 12


def test_without_a_gpu_it_says_so_and_begins_nothing(tmp_path):
    """And without what the benchmarks do not need: a machine with a GPU may have no way to install it."""
    for name in ("tyro", "matplotlib", "uvicorn"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    told = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(["bash", str(SCRIPT), str(tmp_path / "out")], env=told, capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == "" and not (tmp_path / "out").exists()
    assert re.fullmatch(r"gpu_check.sh: .*(CuPy|GPU).*\n", found.stderr)


def test_a_part_that_hangs_ends_with_the_time(check):
    status, printed, calls = check(hangs="pytest", seconds=3)
    assert status == 1 and len(calls) == 2
    assert re.search(r"FAILED: device \(cut off after \d s\)\nFAILED: kernels-bfloat16 \(no time left\)\n", printed)
