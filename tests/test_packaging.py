"""
The kernels live in kernels/ and are imported as `minillm.kernels`: from a bare checkout, an editable install, a built
wheel, and a built wheel while the current directory is a checkout.

The builds go through the hooks that pip calls, and the wheels are unpacked as pip unpacks them, so that no test here
needs the network or an environment of its own.
"""

import email
import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import minillm

ROOT = Path(__file__).parents[1]


def python(code, cwd, path=(), **environment):
    """What `code` prints last, read as JSON, in a new interpreter with `path` on its path and no `minillm` installed.

    -S leaves the .pth files unread, through which the running environment may hold an editable install of `minillm`.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
    clean["PYTHONPATH"] = os.pathsep.join(map(str, [*path, *site.getsitepackages()]))
    command = [sys.executable, "-S", "-c", code]
    run = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# Where the package and a kernel come from, and the sources of the CUDA kernels beside it.
ORIGIN = """
import json, pathlib, minillm, minillm.kernels.device as device
kernels = pathlib.Path(device.__file__).parent
print(json.dumps([minillm.__file__, device.__file__, sorted(p.name for p in kernels.glob("probe.*"))]))
"""


def origin(package, kernels):
    return [str(package / "__init__.py"), str(kernels / "device.py"), ["probe.cu", "probe.cuh"]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources with two CUDA files, so that a build leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("checkout").resolve()
    for folder in ("minillm", "kernels", "tests", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("probe.cu", "probe.cuh"):
        (copy / "kernels" / name).write_text("// a kernel\n")
    return copy


def build(hook, checkout, folder):
    """The wheel that the build backend's `hook` makes, and the folder that it is unpacked into."""
    code = f"import json, setuptools.build_meta as backend; print(json.dumps(backend.{hook}({str(folder)!r})))"
    wheel = folder / python(code, checkout)
    unpacked = folder / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    return wheel, unpacked


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    wheel, unpacked = build("build_wheel", checkout, tmp_path_factory.mktemp("wheel").resolve())
    # The published distribution `kernels`, installed beside ours, must not be taken for our kernels.
    (unpacked / "kernels").mkdir()
    (unpacked / "kernels/__init__.py").write_text("raise ImportError('these are not our kernels')")
    return wheel, unpacked


def test_the_wheel_holds_the_package_and_nothing_else(checkout, wheel):
    names = {name for name in zipfile.ZipFile(wheel[0]).namelist() if ".dist-info/" not in name}
    sources = {f"minillm/{p.relative_to(checkout / 'minillm').as_posix()}" for p in checkout.glob("minillm/**/*.py")}
    sources |= {
        f"minillm/kernels/{p.name}" for suffix in ("py", "cu", "cuh") for p in checkout.glob(f"kernels/*.{suffix}")
    }
    assert names == sources
    assert {"minillm/kernels/probe.cu", "minillm/kernels/probe.cuh", "minillm/kernels/device.py"} <= names


def test_the_wheel_names_its_version_and_licence(wheel):
    (info,) = wheel[1].glob("*.dist-info")
    metadata = email.message_from_string((info / "METADATA").read_text(encoding="utf-8"))
    assert (metadata["Name"], metadata["Version"]) == ("minillm-train", minillm.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert (info / "licenses/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_import_from_a_bare_checkout(checkout, tmp_path):
    expected = origin(checkout / "minillm", checkout / "kernels")
    assert python(ORIGIN, tmp_path, [checkout]) == expected
    assert python(ORIGIN, checkout) == expected


def test_import_from_an_installed_wheel(wheel, tmp_path):
    package = wheel[1] / "minillm"
    assert python(ORIGIN, tmp_path, [wheel[1]]) == origin(package, package / "kernels")


def test_import_from_a_checkout_beside_an_installed_wheel(checkout, wheel):
    assert python(ORIGIN, checkout, [wheel[1]]) == origin(checkout / "minillm", checkout / "kernels")


def test_import_from_an_editable_install(checkout, tmp_path):
    _, unpacked = build("build_editable", checkout, tmp_path)
    # An editable wheel is a .pth file, which takes effect in site folders only.
    code = f"import site; site.addsitedir({str(unpacked)!r})\n{ORIGIN}"
    assert python(code, tmp_path, [unpacked]) == origin(checkout / "minillm", checkout / "kernels")


def test_the_import_is_light(tmp_path):
    code = "import json, sys, minillm, minillm.kernels; print(json.dumps(sorted(sys.modules)))"
    assert {"numba", "cupy", "matplotlib"}.isdisjoint(python(code, tmp_path, [ROOT]))


@pytest.mark.parametrize(
    "name, given, seen",
    [
        ("OMP_WAIT_POLICY", {}, "passive"),
        ("OMP_WAIT_POLICY", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("GOMP_SPINCOUNT", {}, "3000"),
        ("OPENBLAS_THREAD_TIMEOUT", {}, "4"),
        ("OPENBLAS_THREAD_TIMEOUT", {"OPENBLAS_THREAD_TIMEOUT": "20"}, "20"),
    ],
)
def test_the_import_lets_idle_threads_sleep(tmp_path, name, given, seen):
    code = f"import json, os, minillm; print(json.dumps(os.environ['{name}']))"
    assert python(code, tmp_path, [ROOT], **given) == seen
