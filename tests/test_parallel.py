"""Updates that workers share: the gradient of the whole batch, the same bits on any machine, errors that are told."""

import functools
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import lora
from minillm.autograd import no_grad
from minillm.data.conversations import Ranking
from minillm.data.pack import Batch
from minillm.kernels import jit
from minillm.model import Config, build
from minillm.parallel import in_shares
from minillm.trainers import dpo, ppo, reward
from minillm.trainers.common import next_token_backward

ROOT = Path(__file__).parents[1]
V, T = 11, 6


def small(seed=0, dtype=np.float64, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return build(Config(V, initializer_range=0.3, max_position_embeddings=64, **{**sizes, **options}), seed, dtype)


def rows(rng, n):
    """Packed rows of two documents, some of them without any target."""
    tokens = rng.integers(0, V, (n, T + 1)).astype(np.int32)
    start = np.where(np.arange(T) < rng.integers(0, T, (n, 1)), 0, rng.integers(0, 2, (n, 1)))
    mask = rng.random((n, T)) < rng.choice([0.0, 0.2, 1.0], (n, 1))
    return Batch(tokens, np.maximum.accumulate(start, 1).astype(np.int32), mask)


def rankings(rng, n, most):
    """Rankings of 2 to `most` answers of unequal lengths."""
    found = []
    for _ in range(n):
        answers = [rng.integers(0, V, 2 + rng.integers(1, 9)) for _ in range(rng.integers(2, most + 1))]
        ids = [(ids.tolist(), np.arange(len(ids)) >= 2) for ids in answers]
        example = Ranking(ids, rng.random(), rng.random())
        found.append(example._replace(reference=tuple(rng.standard_normal(2))))
    return found


def experience(rng, n):
    """A round of PPO with random numbers in place of those that a policy would have."""
    batch = rows(rng, n)
    batch.mask[0, :2] = True  # an update is of at least one token
    shape = {"logp": -1.0, "white": 0.0, "value": 0.0, "returns": 0.0}
    floats = {name: mean + rng.standard_normal(batch.mask.shape) for name, mean in shape.items()}
    return ppo.Experience(*batch, *[None] * 9)._replace(**dict.fromkeys(UNUSED, batch.mask), **floats)


UNUSED = ("score", "reference_logp", "kl", "reward", "advantage")


def update(kind, seed, n, workers, tmp_path, **options):
    """(gradient, metrics) of one update of `n` rows or examples."""
    rng, told = np.random.default_rng(seed), {"out": tmp_path, "workers": workers}
    model = small(head="scalar" if kind in ("reward", "value") else "lm", **options)
    if kind == "rows":
        metrics = {"loss": next_token_backward(model, rows(rng, n), 2, workers)}
    elif kind == "reward":
        config = reward.RewardConfig(model=tmp_path, data=(tmp_path,), micro_batch_size=2, **told)
        metrics = reward.backward(model, rankings(rng, n, 4), config, 0)
    elif kind in ("policy", "value"):
        config = ppo.PPOConfig(model=tmp_path, reward=tmp_path, prompts=(tmp_path,), micro_batch_size=2, **told)
        backward = ppo.policy_backward if kind == "policy" else functools.partial(ppo.value_backward, clip=0.2)
        metrics = backward(model, experience(rng, n), config)
    else:
        config = dpo.DPOConfig(model=tmp_path, data=(tmp_path,), micro_batch_size=2, **told)
        metrics = dpo.backward(model, rankings(rng, n, 2), config, 0)
    return model.flat_grad, metrics


@pytest.mark.parametrize("kind", ["rows", "reward", "dpo", "policy", "value"])
def test_shares_add_up_to_the_whole_update(kind, tmp_path):
    """Ragged shares, fewer rows than workers, rows without a target: gradient and metrics of one worker."""

    @settings(max_examples=12)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(2, 4))
    def check(seed, n, workers):
        whole, expected = update(kind, seed, n, 1, tmp_path)
        gradient, metrics = update(kind, seed, n, workers, tmp_path)
        np.testing.assert_allclose(gradient, whole, rtol=0, atol=1e-12 * abs(whole).max())
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-12)

    check()


@pytest.mark.parametrize("options", [{"architecture": "gpt2"}, {"activation_checkpointing": True, "qk_norm": True}])
def test_every_architecture_can_be_shared(options, tmp_path):
    (whole, _), (gradient, _) = (update("rows", 1, 5, workers, tmp_path, **options) for workers in (1, 3))
    np.testing.assert_allclose(gradient, whole, rtol=0, atol=1e-12 * abs(whole).max())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_can_be_shared(quantize):
    batch, found = rows(np.random.default_rng(3), 5), []
    for workers in (1, 2):
        adapted = lora.adapt(small(hidden_size=64, intermediate_size=64), rank=2, quantize=quantize)
        adapted.flat += 0.1
        next_token_backward(adapted, batch, 0, workers)
        found.append(adapted.flat_grad)
    assert found[0].any()
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-12 * abs(found[0]).max())


def test_a_twin_has_the_weights_and_its_own_gradient():
    model = small()
    twin = model.twin()
    model.flat += 1
    for name, p in model.parameters.items():
        assert np.shares_memory(twin.parameters[name].data, p.data)
        assert not np.shares_memory(twin.parameters[name].grad, model.flat_grad)
    assert all(np.shares_memory(tensor.grad, twin.flat_grad) for tensor in twin.used.values())


def test_gradients_are_added_to_those_that_are_there():
    model, batch = small(), rows(np.random.default_rng(0), 4)
    next_token_backward(model, batch, 0, 2)
    once = model.flat_grad.copy()
    next_token_backward(model, batch, 0, 2)
    np.testing.assert_allclose(model.flat_grad, 2 * once, rtol=1e-12)


PRINT_BITS = """
import minillm, hashlib, numpy as np
from minillm.data.pack import Batch
from minillm.model import Config, build
from minillm.trainers.common import next_token_backward
model, rng = build(Config(512, num_hidden_layers=1, hidden_size=256)), np.random.default_rng(0)
batch = Batch(rng.integers(0, 512, (3, 129)).astype(np.int32), np.zeros((3, 128), np.int32), np.ones((3, 128), bool))
for _ in range(2):
    model.flat_grad[...] = 0
    next_token_backward(model, batch, 0, 2)
    print(hashlib.sha256(model.flat_grad.tobytes()).hexdigest())
"""


def test_the_bits_do_not_depend_on_the_number_of_threads():
    found = []
    for threads in ("1", "2"):
        names = ("NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads) | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run([sys.executable, "-c", PRINT_BITS], env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        found += ended.stdout.split()
    assert len(found) == 4 and len(found[0]) == len(hashlib.sha256().hexdigest())
    assert len(set(found)) == 1


@pytest.mark.parametrize("where", [0, 1, 2])
def test_an_error_in_any_share_is_the_callers_and_ends_all_threads(where):
    def fail(model, share):
        if where in share:
            raise MemoryError(f"share {where}")

    before = threading.active_count()
    with pytest.raises(MemoryError, match=f"^share {where}$"):
        in_shares(small(), fail, [0, 1, 2], 3)
    assert threading.active_count() == before
    assert in_shares(small(), lambda model, share: share, [0, 1, 2], 2) == [[0, 2], [1]]


def test_kernels_run_on_one_thread_inside_shares_and_on_all_outside():
    def chosen(*_):
        return jit._alone.get(), threading.get_ident()

    found = in_shares(small(), chosen, [0, 1, 2], 3)
    assert all(alone for alone, _ in found) and len({thread for _, thread in found}) > 1
    assert not chosen()[0]
    assert in_shares(small(), chosen, [0], 1) == [chosen()]


def test_no_grad_reaches_every_share():
    def recorded(model, share):
        return model(np.array([share])).requires_grad

    model = small()
    for workers in (1, 3):
        with no_grad():
            assert not any(in_shares(model, recorded, [0, 1, 2], workers))
        assert all(in_shares(model, recorded, [0, 1, 2], workers))


def test_serial_and_parallel_kernels_have_a_cache_each():
    """Numba's cache does not tell them apart, so one cache for both would give either of them for the other."""
    kernel = jit.prange_jit(lambda x: x)
    serial, parallel = kernel.compiled(True), kernel.compiled(False)
    assert Path(serial.stats.cache_path).parent != Path(parallel.stats.cache_path).parent
