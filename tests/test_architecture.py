"""Imports are arrows, and no arrow points back. The table is the architecture: a new module needs a row in it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each row: a module, and what it may import of this project. A package (data, trainers, scripts, tests) is one row, and
# so are all the files of kernels/ that are ops. Rows stand in reading order: a module imports only what stands above.
OP = "kernels.<op>"
ENGINE = ["kernels.device", "autograd", "functional"]
LIBRARY = [
    *ENGINE,
    "extras",
    "files",
    "optim",
    "parallel",
    "tokenizer",
    "chat",
    "model",
    "scaling",
    "checkpoint",
    "hub",
    "lora",
    "losses",
    "generate",
    "data",
]
ARROWS = {
    "kernels": [],
    "kernels.device": [],
    "kernels.jit": ["kernels.device"],
    "kernels.kernel": ["kernels.device"],
    "kernels.cuda": ["kernels.device", "kernels.jit"],
    "kernels.numba_cuda": ["kernels.device", "kernels.cuda"],
    "kernels.graph": ["kernels.device"],
    "kernels.blas": ["kernels.device"],
    # Nothing of another op: Numba's cache does not see an edit in a second file, and only jit.py is hashed into it.
    OP: ["kernels.device", "kernels.jit", "kernels.kernel", "kernels.cuda", "kernels.numba_cuda"],
    "autograd": ["kernels.device"],
    "functional": ["kernels.device", "kernels.blas", OP, "autograd"],
    "optim": ["kernels.device", OP],
    "parallel": ["kernels.device", "kernels.jit"],
    "op_examples": [],
    "extras": [],
    "files": [],
    "sandbox": [],
    "tokenizer": ["files"],
    "chat": ["files", "tokenizer", "sandbox"],
    "model": ENGINE,
    "scaling": ["model"],
    "checkpoint": ["kernels.device"],
    "hub": ["kernels.device", "functional", "files", "chat", "model", "checkpoint"],
    "lora": [*ENGINE, "kernels.blas", "files", "model", "checkpoint", "hub"],
    "losses": ENGINE,
    "data": [*ENGINE, "checkpoint", "extras", "files", "optim", "tokenizer", "chat", "data"],
    "generate": [*ENGINE, "model", "losses"],
    "batching": [*ENGINE, "model", "generate"],
    "server": ["extras", "tokenizer", "chat", "batching"],
    "trainers": [*LIBRARY, "kernels.graph", "trainers"],
    "harness": [*LIBRARY, "trainers"],
    "report": ["extras", "data"],
    "pipeline": [*LIBRARY, "trainers", "report"],
    "scripts": [
        *LIBRARY,
        "server",
        "report",
        "pipeline",
        "op_examples",
        "trainers",
        "scripts",
        "kernels",
        "kernels.kernel",
        "kernels.cuda",
        "kernels.blas",
        OP,
    ],
    "tests": [
        *LIBRARY,
        "harness",
        "batching",
        "server",
        "report",
        "pipeline",
        "op_examples",
        "trainers",
        "tests",
        "kernels",
        "kernels.jit",
        "kernels.kernel",
        "kernels.cuda",
        "kernels.numba_cuda",
        "kernels.graph",
        "kernels.blas",
        OP,
    ],
}


def module_of(path):
    """The import name of a file: kernels/device.py is minillm.kernels.device."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("minillm", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [p for folder in ("minillm", "kernels", "scripts", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]
FILES.append(ROOT / "setup.py")
MODULES = {module_of(p) for p in FILES}


def row_of(module):
    """The row of the table that a module of this project belongs to."""
    parts = module.removeprefix("minillm.").split(".")
    if parts[0] != "kernels" or len(parts) == 1:
        return parts[0]
    return ".".join(parts[:2]) if ".".join(parts[:2]) in ARROWS else OP


def imports(module, tree, is_package):
    """(line, name, relative) of every import in `tree`, wherever it stands. A name may be a module's or an object's."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield node.lineno, submodule if submodule in MODULES else base, node.level > 0
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            yield from ((node.lineno, a.value, False) for a in node.args if isinstance(a, ast.Constant))


def complaints(module, source, is_package=False):
    """One line for each import in `source` that the architecture forbids to `module`."""
    found = []
    row = row_of(module)
    if module not in ("minillm", "setup") and row not in ARROWS:
        found.append(f"{module}: give it a row in ARROWS")
    for line, name, relative in imports(module, ast.parse(source), is_package):
        top = name.split(".")[0]
        if top == "kernels":
            found.append(f"{module}:{line}: import minillm.kernels, not kernels")
        elif top in ("cupy", "cupyx", "cupy_backends") and row != "kernels.device":
            found.append(f"{module}:{line}: only kernels.device imports CuPy")
        elif top in ("minillm", "scripts", "tests") and name != "minillm":
            if row_of(name) not in ARROWS.get(row, []):
                found.append(f"{module}:{line}: {row} must not import {row_of(name)}")
            if row.startswith("kernels") and not relative:
                found.append(f"{module}:{line}: kernels import each other relatively")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_follow_the_arrows(path):
    assert complaints(module_of(path), path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_rows_import_only_rows_above_them():
    rows = list(ARROWS)
    for position, (row, allowed) in enumerate(ARROWS.items()):
        above = rows[:position] + [row] * (row in ("data", "trainers", "scripts", "tests"))
        assert set(allowed) <= set(above), row


@pytest.mark.parametrize(
    "module, source",
    [
        ("minillm.autograd", "import minillm.functional"),
        ("minillm.autograd", "from .functional import linear"),
        ("minillm.autograd", "from . import kernels"),
        ("minillm.autograd", "from .kernels.attention import attention"),
        ("minillm.model", "def f():\n    from minillm.losses import dpo_loss"),
        ("minillm.losses", "from minillm.model import Llama"),
        ("minillm.data.pack", "from ..model import Llama"),
        ("minillm.data.pack", "from minillm.losses import dpo_loss"),
        ("minillm.functional", "import scripts.train"),
        ("minillm.functional", "from tests.gradcheck import gradcheck"),
        ("minillm.functional", "import minillm.tests.gradcheck"),
        ("minillm.functional", "import cupy as cp"),
        ("minillm.functional", "from cupyx.scipy import special"),
        ("minillm.functional", "import importlib\ncp = importlib.import_module('cupy')"),
        ("minillm.functional", "from minillm.unheard_of import x"),
        ("minillm.unheard_of", "import numpy"),
        ("minillm.kernels.device", "from .kernel import Kernel"),
        ("minillm.kernels.attention", "from .swiglu import swiglu"),
        ("minillm.kernels.attention", "from ..autograd import Tensor"),
        ("minillm.kernels.attention", "from minillm.kernels.device import xp_of"),
        ("scripts.train", "from tests.gradcheck import gradcheck"),
        ("tests.test_model", "import scripts.train"),
        ("tests.test_model", "import kernels"),
        ("tests.test_model", "from kernels.device import xp_of"),
        ("setup", "import minillm.autograd"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("minillm.kernels.attention", "import numpy as np\nfrom .device import xp_of\nfrom .jit import jit"),
        ("minillm.kernels.attention", "from . import device, jit, kernel"),
        ("minillm.kernels.device", "import cupy"),
        ("minillm.autograd", "from .kernels.device import xp_of"),
        ("minillm.functional", "from .kernels.attention import attention\nfrom .autograd import op"),
        ("minillm.data.pack", "from .clean import clean"),
        ("minillm.trainers.sft", "from .. import __version__, losses\nfrom ..model import Llama"),
        ("tests.test_model", "import minillm\nfrom minillm.model import Llama\nfrom tests.gradcheck import gradcheck"),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert complaints(module, source) == []
