"""What is timed beside our kernels computes the same. (Skipped where PyTorch is not installed: it is no dependency.)"""

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from minillm.kernels.adamw import schedule_for
from minillm.kernels.kernel import KERNELS
from tests.test_kernels import call

torch = pytest.importorskip("torch", reason="PyTorch is not installed: it is only what the kernels are timed against")

spec = importlib.util.spec_from_file_location("torch_kernels", Path(__file__).parents[1] / "scripts/torch_kernels.py")
torch_kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(torch_kernels)

BY_NAME = {kernel.name: kernel for kernel in KERNELS}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """torch.compile would only take time here."""
    monkeypatch.setattr(torch, "compile", lambda f: f)


def largest_error(name, args, kwargs, dtype, exact):
    """The largest relative error of PyTorch's results (on the CPU) against the exact ones."""
    args = [x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in args]
    worst = 0
    for function in torch_kernels.MAKERS[name](torch, args, kwargs).values():
        results = function(*(torch_kernels.tensor(x) for x in args))
        results = args[0] if name == "adamw_inplace" else results  # p, in place
        for r, e in zip(results if isinstance(results, tuple) else (results,), exact, strict=True):
            r = r.detach().float().numpy() if torch.is_tensor(r) else r
            assert r.shape == e.shape
            worst = max(worst, np.abs(r.astype(np.float64) - e).max() / np.abs(e).max())
    return worst


PLAIN = ["rms_norm_backward", "swiglu_forward", "swiglu_backward", "rope", "embedding_forward", "embedding_backward"]


@pytest.mark.parametrize("name", PLAIN)
def test_the_same_result(name):
    args, kwargs = BY_NAME[name].example(np.random.default_rng(5), "ragged")
    assert 0 < largest_error(name, args, kwargs, np.float32, call(BY_NAME[name], "reference", args, kwargs)) < 1e-5


def test_the_norm():
    args, kwargs = BY_NAME["rms_norm_forward"].example(np.random.default_rng(5), "ragged")
    y, _ = BY_NAME["rms_norm_forward"].reference(*args)
    assert 0 < largest_error("rms_norm_forward", args, kwargs, np.float32, (y,)) < 1e-5


def test_a_first_update_of_adamw():
    """PyTorch's counts its own steps and begins with moments of 0."""
    p, _, _, g = np.random.default_rng(0).standard_normal((4, 50))
    args = p, 0 * p, 0 * p, g, schedule_for(p, 0.01, 0.9, 0.95, 0.1, 1)
    constants = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    exact = BY_NAME["adamw_inplace"].reference(p.copy(), *args[1:], **constants)[:1]
    assert 0 < largest_error("adamw_inplace", (p, 0 * p, 0 * p, *args[3:]), constants, np.float32, exact) < 1e-6


def test_cross_entropy():
    logits, targets = np.random.default_rng(0).standard_normal((5, 33)), np.array([3, 0, 32, 7, 7])
    _, log_total, x_target, _, _ = BY_NAME["cross_entropy_forward"].reference(logits, targets, 1.0)
    exact = (log_total - x_target,)
    assert 0 < largest_error("cross_entropy_forward", (logits, targets, 1.0), {}, np.float32, exact) < 1e-5


def test_attention(monkeypatch):
    """PyTorch's FlashAttention back end for CPUs stands in for the GPU's."""
    back_ends = torch_kernels._back_ends
    monkeypatch.setattr(
        torch_kernels, "_back_ends", lambda *a: {k: v for k, v in back_ends(*a).items() if "cuDNN" not in k}
    )
    rng = np.random.default_rng(0)
    do, q = rng.standard_normal((2, 2, 32, 4, 16))
    k, v = rng.standard_normal((2, 2, 32, 4, 16))
    start = np.zeros((2, 32), np.int32)
    o, lse = BY_NAME["attention_forward"].reference(q, k, v, start, 0.25)
    assert 0 < largest_error("attention_forward", (q, k, v, start, 0.25), {}, ml_dtypes.bfloat16, (o,)) < 0.02
    args = (do, q, k, v, o, lse, start, 0.25)
    exact = BY_NAME["attention_backward"].reference(*args)
    assert 0 < largest_error("attention_backward", args, {}, ml_dtypes.bfloat16, exact) < 0.03
    assert torch_kernels.MAKERS["attention_forward"](torch, (q,), {}) == {}  # float32 has no such kernel
