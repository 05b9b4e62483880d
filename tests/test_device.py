"""Everything runs on a GPU: on a stand-in for CuPy that refuses what CuPy would (tests/fake_cupy.py), with the kernels'
references; and where there is a GPU, on that."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import io
import json
import math
import runpy
import sys
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from minillm import functional as F
from minillm import hub, lora
from minillm.autograd import Tensor, backward, no_grad
from minillm.batching import Batcher, Row
from minillm.generate import generate, next_probabilities
from minillm.harness import score
from minillm.kernels import attention, cuda, device
from minillm.kernels.adamw import step_inplace
from minillm.kernels.kernel import KERNELS
from minillm.model import Config, build
from minillm.optim import AdamW, clip_grad_norm, clip_scale, gpu_clip_scale
from minillm.pipeline import SIZES, PipelineConfig, Stage, read_notes
from minillm.trainers import best_of_n, common, reward
from minillm.trainers import run as run_module
from minillm.trainers.common import Settings
from tests import fake_cupy
from tests.cuda_on_cpu import on_cpu
from tests.fake_cupy import OnCpu, installed
from tests.test_cuda import check_resources
from tests.world import TOKENIZER, TRAINERS, config, left, make_world

ROOT = Path(__file__).parents[1]
V = TOKENIZER.vocab_size
pytestmark = pytest.mark.filterwarnings("ignore:no cublasLt")  # the stand-in has CuPy's matmul alone
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 48}
KINDS = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen": {"attention_bias": True, "qk_norm": True, "sliding_window": 5, "window_layers": (1,)},
    "gpt2": {"architecture": "gpt2"},
    "scalar": {"head": "scalar", "activation_checkpointing": True},
}
BRIEF = {"log_every": 2, "eval_every": 100, "save_every": 0, "save_minutes": 0.0, "samples": 0, "micro_batch_size": 2}


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setenv("MINILLM_KERNELS", "reference")
    monkeypatch.setattr(run_module, "_git_commit", lambda: None)  # a process for each run, to no purpose here


@pytest.fixture
def cupy():
    with installed() as module:
        yield module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def small(kind="llama", seed=0, dtype=np.float32):
    return build(Config(vocab_size=V, **SMALL | KINDS[kind]), seed, dtype)


def rows_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def close(found, expected, **tolerance):
    """Rows of metrics are the same, but for what a clock says."""
    assert [list(row) for row in found] == [list(row) for row in expected]
    for a, b in zip(found, expected, strict=True):
        for name in a.keys() - {"tokens_per_second"}:
            assert a[name] == pytest.approx(b[name], **tolerance), (name, a["step"])


# ------------------------------------------------------------------ the stand-in


def test_the_stand_in_refuses_arrays_of_the_host(cupy):
    x, host = cupy.ones((2, 3)), np.ones((2, 3))
    for call in (
        lambda: x + host, lambda: host + x, lambda: host @ x.T, lambda: x[np.array([0])], lambda: np.exp(x),
        lambda: x.__setitem__(slice(0, 1), host), lambda: cupy.where(host > 0, x, 0), lambda: np.concatenate([x, x]),
        lambda: np.asarray(x), lambda: cupy.maximum(x, host), lambda: x.__iadd__(host), lambda: cupy.matmul(x, host.T),
        lambda: cupy.exp(host), lambda: [0, 1][x[0, 0]],
    ):  # fmt: skip
        with pytest.raises(TypeError):
            call()
    with pytest.raises(TypeError, match="max\\(\\)"):
        x.max(initial=0)
    assert (np.float32(2) * x).dtype == np.float64 and (2.0 * x.astype(np.float32)).dtype == np.float32


def test_the_stand_in_counts_what_waits_for_the_gpu(cupy):
    x = cupy.arange(3)
    for call in (
        lambda: float(x[0]), lambda: int(x[0]), lambda: bool(x[0]), lambda: x.item, lambda: x.get(), lambda: x.tolist(),
        lambda: str(x), lambda: x[x > 0], lambda: cupy.asnumpy(x), lambda: f"{x[0]}", lambda: cupy.flatnonzero(x),
        lambda: math.sqrt(x[1]), lambda: max(x[0], x[1]),
    ):  # fmt: skip
        cupy.synchronized.clear()
        with cupy.allow_synchronize(True):
            found = call()
        if not callable(found):
            assert cupy.synchronized and "test_device.py" in cupy.synchronized[0]
            with pytest.raises(AssertionError, match="waits for the GPU"), cupy.allow_synchronize(False):
                call()


def test_an_asynchronous_copy_arrives_when_it_is_waited_for(cupy):
    x = cupy.full(2, 5.0)
    later = device.Later(x)
    x += 1  # the copy stands before it in the GPU's order
    assert np.isnan(later._array).all()
    with cupy.allow_synchronize(False):
        assert later.get().tolist() == [5, 5]


def test_the_stand_in_has_bfloat16_as_cupy_has(cupy):
    x = cupy.ones((2, 3), fake_cupy.BFLOAT16)
    assert (x + x).dtype == x.dtype == cupy.exp(x).dtype == (2 * x).dtype == x.sum(0).dtype == (x @ x.T).dtype
    assert cupy.where(x > 0, x, x).dtype == np.float32 == (x + cupy.ones(3, np.float32)).dtype
    with pytest.raises(TypeError):
        x[None] @ x[None].swapaxes(1, 2)
    with pytest.raises(TypeError):
        cupy.add.at(x, cupy.zeros(1, int), x[:1])


def test_the_stand_in_has_nothing_that_cupy_has_not():
    real = pytest.importorskip("cupy")

    def parameters(function):
        return [p.name for p in inspect.signature(function).parameters.values()]

    with installed() as fake:
        ours = {name: value for name, value in vars(fake).items() if not name.startswith("_")}
    missing = [name for name in ours if not hasattr(real, name) and name not in ("synchronized", "allow_synchronize")]
    missing += [
        name for name in vars(fake_cupy.ndarray) if not name.startswith("_") and not hasattr(real.ndarray, name)
    ]
    assert missing == []
    for name in fake_cupy._PUBLIC.split():
        if inspect.isfunction(theirs := getattr(real, name)) and "kwargs" not in parameters(theirs):
            assert parameters(ours[name]) == parameters(theirs), name


# ------------------------------------------------------------------ models


def batch_of(rng, rows=3, width=11):
    return rng.integers(0, V, (rows, width)), np.sort(rng.integers(0, 4, (rows, width)), 1).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_gives_the_same_numbers_on_the_gpu(kind, cupy):
    rng = np.random.default_rng(0)
    host = small(kind)
    gpu = host.to("cuda")
    assert gpu.device == "cuda" and host.device == "cpu" and gpu.to("cuda") is gpu
    assert np.array_equal(gpu.flat.get(), host.flat) and not np.shares_memory(gpu.flat._array, host.flat)
    tokens, start = batch_of(rng)
    start = np.minimum(start, np.arange(tokens.shape[1], dtype=np.int32))
    outputs = {}
    for model in (host, gpu):
        with cupy.allow_synchronize(False):
            out = model(tokens, start)
            g = device.beside(
                np.ones(out.shape, out.dtype) * np.linspace(-1, 1, out.shape[-1], dtype=out.dtype), model.flat
            )
            backward([out], [g])
        outputs[model.device] = device.to_host(out.data), device.to_host(model.flat_grad)
    for a, b in zip(outputs["cpu"], outputs["cuda"], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-6)
    assert outputs["cpu"][1].any()
    back = gpu.to("cpu")
    assert np.array_equal(back.flat, host.flat)
    np.testing.assert_allclose(back(tokens, start).data, outputs["cpu"][0], rtol=1e-6, atol=1e-6)


def test_bad_ids_and_positions_are_told_before_they_reach_the_gpu(cupy):
    gpu = small().to("cuda")
    for tokens, start, told in (
        (np.array([[1, V]]), None, f"id {V} at position"),
        (np.zeros((1, 49), int), None, "49 tokens are more than"),
        (np.zeros((1, 3), int), np.array([[0, 1, 0]]), "never decrease"),
    ):
        with pytest.raises(ValueError, match=told):
            gpu.hidden(tokens, start)


def test_one_threads_recording_leaves_the_checks_of_others(cupy):
    """A graph is recorded without checks of ids; who computes meanwhile in another thread has theirs."""

    def elsewhere():
        device.check_ids("embedding", cupy.asarray(np.array([9])), 3)
        with pytest.raises(ValueError, match="id 9"):
            device.raise_flags()

    with device.already_checked(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        device.check_ids("embedding", cupy.asarray(np.array([9])), 3)
        device.raise_flags()
        pool.submit(elsewhere).result()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_activations_have_the_precision_and_everything_else_is_float32(name, cupy):
    rng = np.random.default_rng(1)
    model = small().to("cuda", name)
    hidden = model.hidden(*batch_of(rng))
    assert hidden.dtype == np.dtype(name) and model.flat.dtype == model.flat_grad.dtype == np.float32
    assert model.new_cache(1, 4).keys.dtype == np.dtype(name) and model.cos.dtype == np.float32
    targets = rng.integers(0, V, hidden.shape[:2])
    loss = F.linear_cross_entropy(hidden, model.head, targets)
    logp, entropy = F.linear_token_logprobs(hidden, model.head, targets, entropy=True)
    assert loss.dtype == logp.dtype == entropy.dtype == np.float32
    assert common.scalar_head(small("scalar").to("cuda", name), hidden).dtype == np.float32
    loss.backward()
    assert model.flat_grad.get().any()


def test_what_is_ignored_costs_no_logits_and_sizes_are_few(cupy):
    """Counts of targets differ from batch to batch, and a product of 301 rows is slower than one of 512."""
    rng = np.random.default_rng(4)
    hidden, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 100, 8), (20, 8)))
    for used, kept in ((1, 256), (256, 256), (301, 512), (690, 700), (700, 700), (0, 0)):
        targets = np.full(700, -1)
        targets[rng.permutation(700)[:used]] = rng.integers(0, 20, used)
        rows, h, t = F._compressed(cupy.asarray(hidden), targets)
        assert len(h) == len(t) == kept and (rows is None) == (used == 700)
        assert np.array_equal(np.sort(t.get()[t.get() >= 0]), np.sort(targets[targets >= 0]))
        found = {}
        for where, array in (("cpu", np.asarray), ("cuda", cupy.asarray)):
            x, w = (Tensor(array(a), requires_grad=True) for a in (hidden, weight))
            ids = np.where(targets < 0, -100, targets).reshape(7, 100)
            loss = F.linear_cross_entropy(x, w, ids) + F.linear_token_logprobs(x, w, ids).sum()
            loss.backward()
            found[where] = [device.to_host(a) for a in (loss.data, x.grad, w.grad)]
        for a, b in zip(*found.values(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_layers_window_is_moved_once(cupy, monkeypatch):
    moved, move = [], cupy.asarray
    monkeypatch.setattr(cupy, "asarray", lambda x, *rest, **kw: moved.append(x) or move(x, *rest, **kw))
    model = small("qwen").to("cuda")
    moved.clear()
    tokens = np.zeros((2, 9), int)
    model.hidden(tokens)
    arrays = [x for x in moved if isinstance(x, np.ndarray)]
    assert len([x for x in arrays if x.shape == (2, 9)]) == 2  # `start` of layers with and without a window
    assert len([x for x in arrays if x.shape == (18,)]) == 1  # the tokens


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "scalar"])
def test_adapters_are_the_same_on_the_gpu(kind, quantize, cupy, tmp_path):
    tokens, start = batch_of(np.random.default_rng(2))
    start = np.minimum(start, np.arange(tokens.shape[1], dtype=np.int32))
    found = {}
    for where in ("cpu", "cuda"):
        model = lora.adapt(small(kind).to(where), rank=2, quantize=quantize, seed=1)
        assert model.device == where and lora.switched_off(model).device == where
        for name, p in model.parameters.items():
            if name.endswith(lora._B):
                p.data[...] = device.beside(np.full(p.shape, 0.01, np.float32), p.data)
        out = model(tokens, start)
        backward([out], [device.beside(np.ones(out.shape, np.float32), model.flat)])
        plain = lora.merge(model)
        folder = lora.save_adapter(model, tmp_path / where)
        again = lora.load_adapter(small(kind).to(where), folder, quantize)
        arrays = out.data, model.flat_grad, plain(tokens, start).data, again(tokens, start).data
        found[where] = [device.to_host(x) for x in (*arrays, lora.switched_off(model)(tokens, start).data)]
        assert plain.device == where and lora.memory(model)["total"] > 0
    for a, b in zip(*found.values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="moved before it gets an adapter"):
        model.to("cpu")


def test_float64_is_computed_by_the_references(cupy, monkeypatch):
    """The CUDA kernels take 32 bits at most, and float64 is what they are checked against."""
    tokens, host = np.zeros((1, 3), int), small("gpt2", dtype=np.float64)
    expected = host(tokens).data
    monkeypatch.delenv("MINILLM_KERNELS")
    for dtype, chosen in (("float64", "reference"), ("float32", "cuda"), ("bfloat16", "cuda")):
        assert step_inplace.choose(cupy.zeros(1, np.dtype(dtype))) == chosen
    np.testing.assert_allclose(host.to("cuda")(tokens).data.get(), expected, rtol=1e-10)


# ------------------------------------------------------------------ the optimizer


def test_the_optimizer_neither_waits_nor_differs(cupy):
    rng = np.random.default_rng(3)
    models = {where: small(dtype=np.float64).to(where) for where in ("cpu", "cuda")}
    optimizers = {where: AdamW(model.parameters, lr=0.1) for where, model in models.items()}
    assert len(optimizers["cuda"].gradients) == 1
    for scale in (1.0, 0.01, 1.0, math.nan):
        g = rng.standard_normal(models["cpu"].flat.size)
        g[7] = g[7] if scale == scale else scale
        if scale == scale:
            models["cpu"].flat_grad[...] = scale * g
            optimizers["cpu"].step(scale=min(1.0, 1.0 / optimizers["cpu"].grad_norm()))
        models["cuda"].flat_grad[...] = cupy.asarray(scale * g)
        with cupy.allow_synchronize(False):
            norm = optimizers["cuda"].grad_norm()
            optimizers["cuda"].step(scale=gpu_clip_scale(norm, 1.0, 0.5))
            optimizers["cuda"].zero_grad()
        np.testing.assert_allclose(models["cuda"].flat.get(), models["cpu"].flat, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(optimizers["cuda"].v.get(), optimizers["cpu"].v, rtol=1e-12)
        assert optimizers["cuda"].steps == optimizers["cpu"].steps
    state = {name: device.to_host(x) if name in "mv" else x for name, x in optimizers["cuda"].state_dict().items()}
    other = AdamW(models["cpu"].parameters, lr=0.1)
    other.load_state_dict(state)
    assert other.steps == 3 and np.array_equal(other.m, optimizers["cuda"].m.get())


@pytest.mark.parametrize("kernels", ["reference", "fastest"])
def test_an_update_of_scattered_memory_by_a_number_of_the_host(kernels, cupy, monkeypatch):
    """Every parameter in memory of its own, and two of them neighbours; an update that is left out is not counted."""
    if kernels == "fastest":
        monkeypatch.delenv("MINILLM_KERNELS")
    rng, places = np.random.default_rng(5), {"a": (3, 5), "b": (7,), "c": (4, 4), "d": (1, 2)}
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in places.items()}
    found = {}
    for where, array in (("cpu", np.array), ("cuda", cupy.asarray)):
        both = array(np.zeros(9, np.float32)), array(np.zeros(9, np.float32))
        parameters = {name: Tensor(array(x), requires_grad=True) for name, x in start.items()}
        for name, part in (("b", slice(0, 7)), ("d", slice(7, 9))):
            memory, grad = (x[part].reshape(places[name]) for x in both)
            memory[...] = array(start[name])
            parameters[name] = Tensor(memory, requires_grad=True)
            parameters[name].grad = grad
        parameters = {name: parameters[name] for name in "abdc"}
        optimizer = AdamW(parameters, lr=0.1, rates=lambda name, p: 0.5 if name == "c" else 1.0)
        assert (len(optimizer.runs), len(optimizer.stretches)) == (4, 3)
        gradients = np.random.default_rng(6)
        with on_cpu(OnCpu()) as backend, cupy.allow_synchronize(False):
            for scale in (0.5, math.nan, 2, math.inf, np.float32(1)):
                for name, p in parameters.items():
                    p.grad[...] = array(gradients.standard_normal(places[name]).astype(np.float32))
                optimizer.step(scale=scale)
        assert optimizer.steps == 3
        names = [instance.split("<")[0] for _, instance in backend.launched]
        assert names == (["advance", *["step"] * 3] * 5 if (where, kernels) == ("cuda", "fastest") else [])
        found[where] = [device.to_host(p.data) for p in parameters.values()]
    for a, b in zip(*found.values(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_leaves_the_update_out(cupy):
    norm = cupy.asarray(2.0)
    for loss in (math.inf, cupy.asarray(-math.inf), cupy.asarray(math.nan)):
        assert math.isnan(gpu_clip_scale(norm, 1.0, loss))
    assert gpu_clip_scale(norm, 1.0, cupy.asarray(3.0)).item() == 0.5 and gpu_clip_scale(norm, 5.0).item() == 1
    assert gpu_clip_scale(norm, None).item() == 1 == gpu_clip_scale(cupy.asarray(0.0), None).item()
    assert math.isnan(gpu_clip_scale(cupy.asarray(math.inf), None))


def test_clipping_by_name_is_the_same(cupy):
    g = np.random.default_rng(0).standard_normal((5, 7))
    host, gpu = Tensor(np.zeros((5, 7)), True), Tensor(cupy.zeros((5, 7)), True)
    for factor, limit in ((1.0, 1.0), (1.0, 100.0), (math.inf, 1.0)):
        host.grad, gpu.grad = g * factor, cupy.asarray(g * factor)
        before = clip_grad_norm({"w": host}, limit)
        with cupy.allow_synchronize(False):
            norm = clip_grad_norm({"w": gpu}, limit)
        assert norm.item() == pytest.approx(before) and np.allclose(gpu.grad.get(), host.grad, equal_nan=True)


def test_adamw_with_a_scale_on_the_gpu_is_adamw(cupy):
    args, options = step_inplace.example(np.random.default_rng(0), "ragged", np.float32)
    there = [cupy.asarray(x) for x in args]
    step_inplace.reference(*args, **options)
    with cupy.allow_synchronize(False):
        step_inplace(*there, **options | {"scale": cupy.asarray(options["scale"])})
    for a, b in zip(args, there, strict=True):
        np.testing.assert_allclose(b.get(), a, rtol=1e-6)


# ------------------------------------------------------------------ texts


def test_texts_are_the_same(cupy):
    prompts = [[5, 6, 7], [9], [4, 4, 4, 4, 4, 2]]
    told = {
        "max_new_tokens": 9,
        "temperature": 0.9,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 3,
        "stop_tokens": [8],
    }
    for kind in ("llama", "gpt2", "qwen"):
        host = small(kind)
        expected, found = (generate(model, prompts, **told) for model in (host, host.to("cuda")))
        assert [t.ids.tolist() for t in found] == [t.ids.tolist() for t in expected]
        uncached = generate(host.to("cuda"), prompts, cache=False, **told)
        assert [t.ids.tolist() for t in uncached] == [t.ids.tolist() for t in expected]
        np.testing.assert_allclose(
            next_probabilities(host.to("cuda"), prompts[0]), next_probabilities(host, prompts[0]), rtol=1e-5
        )


def test_texts_that_are_decoded_together_are_the_same(cupy):
    prompts = [[5, 6, 7], [9], [4, 4, 4, 4, 4, 2], [3, 3]]
    found = {}
    for where in ("cpu", "cuda"):
        pieces = found[where] = {}
        with Batcher(small().to(where), TOKENIZER, size=2) as batcher:
            rows = [
                Row(
                    prompt=p,
                    max_new_tokens=5 + n,
                    seed=n,
                    alternatives=2,
                    echo=True,
                    listener=pieces.setdefault(n, []).append,
                )
                for n, p in enumerate(prompts)
            ]
            batcher.submit(rows)
            batcher.drain(60)
            batcher.thread.join()
    for n in range(len(prompts)):
        (mine,), (theirs,) = found["cuda"][n], found["cpu"][n]
        assert mine.error is None and mine.text == theirs.text and mine.finish == theirs.finish
        assert [t.id for t in mine.tokens] == [t.id for t in theirs.tokens]


def test_scores_for_the_harness_are_the_same(cupy):
    pairs = [([1, 2, 3], [4, 5]), ([7], [8, 9, 10])]
    host = small()
    expected, found = (score(model, pairs, 0) for model in (host, host.to("cuda")))
    assert [s.greedy for s in found] == [s.greedy for s in expected]
    np.testing.assert_allclose([s.logprob for s in found], [s.logprob for s in expected], rtol=1e-5)


# ------------------------------------------------------------------ trainers


def brief(world, name, out, **options):
    """A run of few updates, evaluated at its ends."""
    short = {"pretrain": {"tokens": 4 * 4 * 24}, "ppo": {"episodes": 8, "value_warmup": 1, "flight_record": 0}}
    return config(world, name, out, **BRIEF | short.get(name, {"epochs": 1.5}) | options)


on_the_host = {}


@pytest.fixture
def expected(world, tmp_path_factory):
    """expected(name, **options) -> (parameters, rows of metrics) of such a run on the CPU."""

    def expected(name, **options):
        key = name, *sorted(options)
        if key not in on_the_host:
            out = tmp_path_factory.mktemp("host") / "out"
            model, _ = TRAINERS[name].train(brief(world, name, out, **options))
            on_the_host[key] = model.flat, rows_of(out)
        return on_the_host[key]

    return expected


@pytest.mark.parametrize("name, options", [*((name, {}) for name in TRAINERS), ("reward", {"pooling": "mean"})])
def test_a_trainer_does_the_same_on_the_gpu_without_waiting(name, options, world, expected, tmp_path, monkeypatch):
    """The same rows and model; and from the first update to the end nothing waits for the GPU but, when an update has
    been told to it, for the numbers of the one before. (PPO waits for the texts that it samples, and for the KL that
    says whether the policy goes on.)"""
    options = {"samples": 1, **options}
    flat, rows = expected(name, **options)
    during, between, reads, steps, read = [], [], [], run_module.Run.steps, run_module.Run._read

    def watched(self, *args):
        for step in steps(self, *args):
            between.append(len(fake_cupy.synchronized))
            with fake_cupy.allow_synchronize(name == "ppo"):
                yield step
            during.append(len(fake_cupy.synchronized) - between[-1])

    def reading(self, left):
        reads.append((self.step, len(self.updates) - left))
        read(self, left)

    monkeypatch.setattr(run_module.Run, "steps", watched)
    monkeypatch.setattr(run_module.Run, "_read", reading)
    with installed() as cupy:
        before = len(cupy.synchronized)
        gpu, _ = TRAINERS[name].train(brief(world, name, tmp_path / "cuda", device="cuda", **options))
        assert gpu.device == "cuda" and before < len(cupy.synchronized)  # evaluations do wait
        np.testing.assert_allclose(gpu.flat.get(), flat, rtol=1e-5, atol=1e-6)
    if name != "ppo":
        assert len(during) >= 3 and not any(during) and len(set(between)) == 1
        assert [count for step, count in reads if count > 0] == [1] * len(during)
        assert reads[0] == (0, 0)  # not the first one's own
    close(rows_of(tmp_path / "cuda"), rows, rel=1e-6, abs=1e-6)
    found = {path.name for path in (tmp_path / "cuda").iterdir()}
    assert {"model.safetensors", "metrics.jsonl", "samples.jsonl", "settings.json"} <= found | {"samples.jsonl"}


@pytest.mark.parametrize("name", ["pretrain", "dpo", "ppo"])
def test_a_trainer_in_bfloat16_stays_near(name, world, expected, tmp_path):
    with installed():
        gpu, _ = TRAINERS[name].train(brief(world, name, tmp_path / "cuda", device="cuda", precision="bfloat16"))
        assert gpu.flat.dtype == np.float32 and np.isfinite(gpu.flat.get()).all()
    key = "eval_scores" if name == "ppo" else "eval_loss"
    found, right = (
        [row[key] for row in rows if key in row] for rows in (rows_of(tmp_path / "cuda"), expected(name)[1])
    )
    assert len(found) == len(right) >= 2 and found != right
    np.testing.assert_allclose(found, right, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_adapters_on_four_bits_are_trained_the_same(name, world, expected, tmp_path):
    options = {"lora_rank": 2, "quantize": "nf4"}
    flat, rows = expected(name, **options)
    with installed():
        gpu, _ = TRAINERS[name].train(brief(world, name, tmp_path / "cuda", device="cuda", **options))
        np.testing.assert_allclose(gpu.flat.get(), flat, rtol=1e-5, atol=1e-6)
    close(rows_of(tmp_path / "cuda"), rows, rel=1e-5, abs=1e-6)


def test_the_reference_of_dpo_can_be_another_model_and_means_can_be_compared(world, expected, tmp_path):
    options = {"reference": world / "base", "normalize": "mean", "kind": "ipo"}
    _, rows = expected("dpo", **options)
    with installed():
        TRAINERS["dpo"].train(brief(world, "dpo", tmp_path / "cuda", device="cuda", **options))
    close(rows_of(tmp_path / "cuda"), rows, rel=1e-5, abs=1e-6)


def test_rankings_of_several_answers_are_learnt_the_same(world, tmp_path, cupy):
    ranked = [{"prompt": f"{i}?", "ranked": ["yes", "no", "well", "hm"][: 2 + i % 3]} for i in range(8)]
    data = tmp_path / "ranked.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ranked), encoding="utf-8")
    for ranking in ("pairs", "plackett_luce", "best_of_k"):
        for where in ("cpu", "cuda"):
            out = tmp_path / f"{ranking}-{where}"
            told = {"data": (data,), "ranking": ranking, "epochs": 0.5, "held_out": 0.0}
            reward.train(brief(world, "reward", out, device=where, **told))
        close(rows_of(tmp_path / f"{ranking}-cuda"), rows_of(tmp_path / f"{ranking}-cpu"), rel=1e-5, abs=1e-6)


def test_best_of_n_keeps_the_same_answers(world, tmp_path, cupy):
    for where in ("cpu", "cuda"):
        told = {"model": world / "base", "reward": world / "reward", "prompts": (world / "prompts.jsonl",)}
        best_of_n.best_of_n(best_of_n.BestOfNConfig(out=tmp_path / where, n=2, max_new_tokens=3, device=where, **told))
    kept = [
        [json.loads(line)["messages"] for line in (tmp_path / where / "best.jsonl").read_text().splitlines()]
        for where in ("cpu", "cuda")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 10


def test_a_run_that_is_resumed_elsewhere_goes_on(world, expected, tmp_path, monkeypatch):
    """A checkpoint knows no device. Saved and resumed on the GPU, the run ends as one that was never stopped, bit for
    bit; on the other side the state is the same bits, and what follows differs as the devices do, in the last ones."""
    told = {"save_every": 2}
    flat, rows = expected("reward")
    update = run_module.Run.update

    class Killed(BaseException):
        pass

    def killed(self, *args, **kwargs):
        if self.step == 2:
            raise Killed
        update(self, *args, **kwargs)

    finals = {}
    with installed():
        for first, then in (("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")):
            here = brief(world, "reward", tmp_path / f"{first}-{then}", device=first, **told)
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(run_module.Run, "update", killed)
                TRAINERS["reward"].train(here)
            model, _ = TRAINERS["reward"].train(dataclasses.replace(here, device=then, resume=True))
            assert model.device == then
            close(rows_of(here.out), rows, rel=1e-5, abs=1e-6)
            finals[first, then] = device.to_host(model.flat)
            np.testing.assert_allclose(finals[first, then], flat, rtol=1e-5, atol=1e-6)
            noted = json.loads((here.out / "environment.json").read_text())
            assert noted["resumed"][0]["changed"] == ({} if first == then else {"device": [first, then]})
            for part, where in ((noted, first), (noted["resumed"][0], then)):
                assert part["machine"].get("gpu") == ("a processor that plays a GPU" if where == "cuda" else None)
        straight, _ = TRAINERS["reward"].train(brief(world, "reward", tmp_path / "straight", device="cuda", **told))
        assert np.array_equal(straight.flat.get(), finals["cuda", "cuda"])
        assert left(tmp_path / "straight") == left(tmp_path / "cuda-cuda")


def one_weight(cupy):
    p = Tensor(cupy.asarray([[1.0, -2.0]]), requires_grad=True)
    p.grad = cupy.zeros((1, 2))
    return p, AdamW({"p": p}, betas=(0.9, 0.99), weight_decay=0.1)


def settings(tmp_path, **options):
    made = Settings(**{"out": tmp_path / "out", "lr": 0.1, "warmup": 0.0, "schedule": "constant"} | options)
    run_module.claim(made)
    return made


@pytest.mark.parametrize("log_every, eval_every", [(1, 3), (2, 3), (3, 2), (4, 100)])
def test_rows_carry_the_numbers_of_their_own_updates(log_every, eval_every, tmp_path, cupy):
    """They are read one update late, and belong where they were made."""
    p, optimizer = one_weight(cupy)
    with run_module.Run(settings(tmp_path, log_every=log_every, eval_every=eval_every), 7) as run:
        for step in run.steps(lambda: {"eval_loss": 2.5}):
            p.grad[...] = 1.0
            run.update(optimizer, {"loss": cupy.asarray(step + 1.0) ** 2, "on_host": step}, tokens=10)
    rows = rows_of(tmp_path / "out")
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    logged, before = [r for r in rows if "loss" in r], 0
    assert [r["step"] for r in logged] == sorted({*range(log_every, 8, log_every), 7})
    for row in logged:
        steps = np.arange(before, row["step"]) + 1
        assert row["loss"] == (steps**2).mean() and row["on_host"] == steps.mean() - 1
        assert row["num_tokens"] == 10 * row["step"] and row["grad_norm"] == pytest.approx(2**0.5)
        before = row["step"]


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_an_update_that_is_not_finite_changes_nothing_and_is_told_one_update_later(bad, tmp_path, cupy):
    p, optimizer = one_weight(cupy)
    seen = []
    with (
        pytest.raises(run_module.NotFinite, match=r"^update 2: the gradient's norm is (nan|1.*), loss is"),
        run_module.Run(settings(tmp_path), 5) as run,
    ):
        for step in run.steps():
            seen.append((step, p.data.get()))
            p.grad[...] = math.nan if (step, bad) == (1, "gradient") else 1.0
            run.update(optimizer, {"loss": cupy.asarray(math.inf if (step, bad) == (1, "loss") else 4.0)})
    assert [step for step, _ in seen] == [0, 1, 2]
    assert np.array_equal(seen[1][1], seen[2][1]) and not np.array_equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("bad", [1, 2])
def test_an_update_is_looked_at_before_it_is_saved(bad, tmp_path, cupy):
    p, optimizer = one_weight(cupy)
    with (
        pytest.raises(run_module.NotFinite, match=rf"^update {bad + 1}: the gradient's norm is nan"),
        run_module.Run(settings(tmp_path, save_every=1), 3, {"model": optimizer}) as run,
    ):
        for step in run.steps():
            p.grad[...] = math.nan if step == bad else 1.0
            run.update(optimizer, {"loss": 4.0})
    assert run.checkpoints.steps() == list(range(1, bad + 1))


def test_updates_that_are_left_out_are_counted(tmp_path, cupy):
    p, optimizer = one_weight(cupy)
    alone, plain = one_weight(cupy)
    with run_module.Run(settings(tmp_path, on_nan="skip", log_every=4), 4) as run:
        for step in run.steps():
            p.grad[...] = math.nan if step in (1, 2) else 0.1
            run.update(optimizer, {"loss": cupy.asarray(math.nan if step in (1, 2) else 4.0)}, tokens=5)
    for _ in range(2):  # as if those that were left out had never been: the last one's number is 2
        alone.grad[...] = 0.1
        plain.step(0.1)
    np.testing.assert_allclose(p.data.get(), alone.data.get(), rtol=1e-12)
    (row,) = rows_of(tmp_path / "out")
    assert row["skipped_updates"] == 2 and row["loss"] == 4.0 and optimizer.steps == 2


@pytest.mark.parametrize("size", SIZES)
def test_every_stage_of_the_pipeline_can_be_on_the_gpu(size, tmp_path):
    """Its recipes, which are measured on processors, have workers there, and none here; what was begun on one device
    can go on on the other."""
    here = PipelineConfig(out=tmp_path, size=size, device="cuda", precision="bfloat16")
    for name in ("pretrain", "sft", "reward", "ppo", "dpo"):
        told = Stage(here, name).shared
        assert (told["device"], told["precision"], told.get("workers", 1)) == ("cuda", "bfloat16", 1)
    there = dataclasses.replace(here, device="cpu", precision="float32")
    assert read_notes(there)["settings"] == read_notes(here)["settings"]
    assert ("workers" in Stage(there, "sft").shared) == (size == "default")


# ------------------------------------------------------------------ with the CUDA kernels


def two_updates(model, tokens, start, targets):
    """The losses, the first gradient, and the parameters after two updates, arrays where the model is."""
    optimizer, losses, first = AdamW(model.parameters, lr=0.01), [], None
    for _ in range(2):
        loss = F.linear_cross_entropy(model.hidden(tokens, start), model.head, targets)
        loss.backward()
        losses.append(loss.data)
        first = model.flat_grad.copy() if first is None else first
        norm = optimizer.grad_norm()
        on_gpu = model.device == "cuda"
        optimizer.step(scale=gpu_clip_scale(norm, 1.0, loss.data) if on_gpu else clip_scale(norm, 1.0))
        optimizer.zero_grad()
    return losses, first, model.flat


@pytest.mark.parametrize(
    "kind, precision",
    [
        ("llama", "bfloat16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("llama", "float32"), ("gpt2", "float32"))),
        pytest.param("gpt2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_updates_on_the_cuda_kernels_are_those_of_the_references(kind, precision, cupy, monkeypatch):
    """Embedding to AdamW, every kernel's own code, in the order and with the views of a real update."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
    kind = {"num_key_value_heads": 1} if kind == "llama" else {"architecture": kind}
    shape = Config(vocab_size=V, max_position_embeddings=64, **sizes, **kind)
    rng = np.random.default_rng(0)
    tokens, start = batch_of(rng, 2, 36)
    batch = tokens, np.minimum(start, np.arange(36, dtype=np.int32)), np.where(rng.random((2, 36)) < 0.2, -100, tokens)
    expected = two_updates(build(shape), *batch)
    monkeypatch.delenv("MINILLM_KERNELS")
    with on_cpu(OnCpu()) as backend:
        gpu = build(shape).to("cuda", precision)
        with cupy.allow_synchronize(False):
            losses, first, flat = two_updates(gpu, *batch)
    launched = {source for source, _ in backend.launched}
    names = "rms_norm rope swiglu" if gpu.config.architecture == "llama" else "layer_norm gelu"
    assert launched == {f"{name}.cu" for name in f"embedding attention cross_entropy adamw {names}".split()}
    heads = {instance for source, instance in backend.launched if source == "cross_entropy.cu"}
    assert V % 8 and heads == {"fused<bf16, 8, 32>" if precision == "bfloat16" else "fused<float, 4, 32>"}  # 16 bytes
    of_an_update = ["squares<float, 4>", "add_parts", "advance<float>", "step<4>"]  # however many runs there are
    assert [instance for source, instance in backend.launched if source == "adamw.cu"] == of_an_update * 2
    rough = precision == "bfloat16"
    np.testing.assert_allclose([x.get() for x in losses], expected[0], rtol=2e-3 if rough else 1e-5)
    begin = build(shape).flat
    for (a, b), limit in zip(
        ((first.get(), expected[1]), (flat.get() - begin, expected[2] - begin)),
        (2e-2, 0.2) if rough else (1e-5, 1e-3),  # Adam's first updates go by the gradient's signs alone
        strict=True,
    ):
        assert np.linalg.norm(a - b) < limit * np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["qwen", "gpt2"])
def test_a_model_of_sixteen_bits_is_read_by_the_cuda_kernels(kind, cupy, monkeypatch):
    """As chat.py --precision bfloat16 has it: the weights, too, are of 16 bits."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    shape = Config(vocab_size=V, max_position_embeddings=64, **sizes, **KINDS[kind])
    host, rng = build(shape, 0, ml_dtypes.bfloat16), np.random.default_rng(1)
    host.flat += (0.2 * rng.standard_normal(host.flat.size)).astype(host.flat.dtype)  # no norm's weights are all 1
    tokens = rng.integers(0, V, (2, 9))
    with no_grad():
        expected = host(tokens).data.astype(np.float32)
        monkeypatch.delenv("MINILLM_KERNELS")
        with on_cpu(OnCpu()) as backend:
            found = host.to("cuda")(tokens).data.get().astype(np.float32)
    norm = "layer_norm.cu" if kind == "gpt2" else "rms_norm.cu"
    assert (norm, "forward<bf16, bf16, 8, 32>") in backend.launched
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("fault", [None, ("acc(r, c) *= correction", "acc(r, c) *= 1")])
def test_the_search_for_tiles(fault, cupy, monkeypatch, capsys, tmp_path):
    """On small examples, for the forward; the tables are as they were, and what is wrong is told and not timed."""
    script = load_script("tune_attention")
    monkeypatch.delenv("MINILLM_KERNELS")
    tables, own = copy.deepcopy((attention.TILES, attention.WGMMA_TILES)), attention.SOURCE
    example, ahead, file = script.example, [], tmp_path / "x.json"

    def rising(kernel, seed, size, *rest):  # keys that the first tile's maximum does not reach
        args, kwargs = example(kernel, seed, size, *rest)
        (B, T, H, D), steps = (1, 150, 1, 64), np.arange(150)[:, None, None]
        q, k, v = (np.random.default_rng(seed).standard_normal((B, T, H, D)) for _ in range(3))
        q[..., 0], k[..., :1] = 8, 0.3 * steps
        arrays = [device.to_device(x.astype(args[0].dtype), "cuda") for x in (q, k, v)]
        return [*arrays, device.to_device(np.zeros((B, T), np.int32), "cuda"), 1 / 8], kwargs

    monkeypatch.setattr(script, "example", rising)
    monkeypatch.setattr(script, "SIZES", dict.fromkeys((64, 128), "ragged"))
    monkeypatch.setattr(script, "CANDIDATES", {("forward", 64): [(128, 64, 8, 2, "WGMMA")]})
    monkeypatch.setattr("scripts.bench_kernels.BUSY", 1 << 10)
    monkeypatch.setattr(script.cuda, "compile_ahead", ahead.extend)
    monkeypatch.setattr(sys, "argv", ["tune_attention.py", "--rounds=1", f"--json={file}"])

    class Faulty(OnCpu):
        """A fault in one of the candidates."""

        def launch(self, source, instance, *rest):
            self.edits = {"attention.cu": [fault]} if fault and ", 96, 8, 2, WGMMA" in instance else {}
            super().launch(source, instance, *rest)

    told = pytest.raises(SystemExit, match="1 tiles are wrong or failed") if fault else contextlib.nullcontext()
    with on_cpu(Faulty()), told:
        script.main()
    rows, printed = json.loads(file.read_text(encoding="utf-8"))["rows"], capsys.readouterr().out
    tried = [[128, 64, 4, 2, "HELD"], [128, 96, 8, 2, "WGMMA"], [128, 64, 8, 2, "WGMMA"]]
    assert [row["tile"] for row in rows] == ([tried[0], tried[2]] if fault else tried)
    assert ("other results" in printed) == bool(fault) and printed.count(" 1.00x") == len(rows)
    assert len(ahead) == 3 and tables == (attention.TILES, attention.WGMMA_TILES) and attention.SOURCE is own


def test_tiles_fit_what_is_padded_for_them():
    script = load_script("tune_attention")
    tables = [attention.TILES, attention.FLOAT_TILES, attention.WGMMA_TILES]
    tiles = [(kernel, tile) for table in tables for kernel, sizes in table.items() for tile in sizes.values()]
    tiles += [(kernel, tile) for (kernel, _), some in script.CANDIDATES.items() for tile in some]
    for kernel, (own, streamed, *_) in tiles:
        assert kernel == "forward" or attention.PADDED % (own if kernel == "queries" else streamed) == 0, (kernel, own)


def test_tiles_to_try_fit_in_their_registers():
    for (kernel, _), some in load_script("tune_attention").candidates(hopper=True).items():
        for one in some:
            instance = attention._instance(kernel, "bf16", one.D, one.tile)
            check_resources(one.source, cuda.compile_instances(one.source, [instance], cuda.HOPPER), cuda.HOPPER)


@pytest.mark.parametrize("name", sorted(load_script("torch_kernels").MAKERS))
def test_what_pytorch_is_timed_with_takes_the_kernels_arguments(name, monkeypatch):
    """So much can be told without PyTorch; that it computes the same is in test_torch_kernels.py."""
    script, kernel = load_script("torch_kernels"), next(k for k in KERNELS if k.name == name)
    monkeypatch.setattr(script, "tensor", lambda x: mock.MagicMock())
    args, kwargs = kernel.example(np.random.default_rng(0), "ragged", np.float16)
    torch = mock.MagicMock(compile=lambda function: function)
    found = script.MAKERS[name](torch, args, kwargs)
    assert found
    for function in found.values():
        inspect.signature(function).bind(*args)


@pytest.mark.parametrize("fault", [[], [("rms_norm.cu", "/ D + eps", "/ (D + 1) + eps")]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_of_kernels(dtype, fault, cupy, monkeypatch, capsys, tmp_path):
    """All of it but the timed sizes and the ceilings; and what is wrong is told and not timed."""
    script = load_script("bench_kernels")
    monkeypatch.delenv("MINILLM_KERNELS")
    example, file = script.example, tmp_path / "x.json"
    monkeypatch.setattr(script, "example", lambda kernel, seed, size, *rest: example(kernel, seed, "ragged", *rest))
    monkeypatch.setattr(script, "ceilings", lambda rounds: (1e12, 1e15))
    monkeypatch.setattr(script, "BUSY", 1 << 10)
    monkeypatch.setattr(script, "tensor", lambda x: x)
    broken = lambda *args: (_ for _ in ()).throw(RuntimeError("no such instruction\nat all"))
    monkeypatch.setattr(script, "counterparts", lambda *_: {"another's": broken, "one more": lambda x, weight, eps: x})
    ahead = []
    monkeypatch.setattr(script.cuda, "compile_ahead", ahead.extend)
    options = ["--only=rms_norm_forward", f"--dtype={dtype}", "--rounds=1", "--check", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--device=cuda", *options])
    told = pytest.raises(SystemExit, match=f"{1 + bool(fault)} versions are wrong or failed, and were not timed")
    with on_cpu(OnCpu(edits={name: [(old, new)] for name, old, new in fault})), told:
        script.main()
    printed, (row,) = capsys.readouterr().out, json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert "a processor that plays a GPU, CuPy 14.2.0" in printed and "copy 1,000 GB/s" in printed
    assert ("WRONG" in printed) == bool(fault) and printed.count("missing") == 1 + bool(fault)  # no numba.cuda version
    assert "another's             FAILED: RuntimeError: no such instruction\n" in printed
    assert set(row["bad"]) == {"another's"} | ({"cuda"} if fault else set())
    assert [s.name for s in ahead] == ["rms_norm.cu"]
    every = script.sources_of(script.KERNELS)
    assert {s.name for s in every} == {path.name for path in (ROOT / "kernels").glob("*.cu")}
    assert row["seconds"] == dict.fromkeys([*([] if fault else ["cuda"]), "reference", "one more"], 1e-3 / 8)


# ------------------------------------------------------------------ what can not be had


def test_workers_are_for_the_processor(tmp_path):
    with pytest.raises(ValueError, match=r"^--workers has to be 1 with --device cuda.* and is 2$"):
        Settings(out=tmp_path, workers=2, device="cuda")
    for told, why in (({"device": "gpu"}, "cpu, cuda"), ({"precision": "half"}, "float32, bfloat16")):
        with pytest.raises(ValueError, match=f"has to be one of {why}"):
            Settings(out=tmp_path, **told)


COMMANDS = {
    "pretrain": "--data data --length 24 --out out",
    "sft": "--model base --data chat.jsonl --out out",
    "reward": "--model base --data pairs.jsonl --out out",
    "dpo": "--model base --data pairs.jsonl --out out",
    "ppo": "--model base --reward reward --prompts prompts.jsonl --out out",
    "best_of_n": "--model base --reward reward --prompts prompts.jsonl --out out",
    "pipeline": "--size tiny --out out",
    "compare_seeds": "--size tiny --out out",
    "chat": "base --prompt hello",
    "generate": "base hello",
    "next_token": "base hello",
    "evaluate": "base --data data --length 24 --out out",
    "serve": "base --port 0 --out out",
    "collect": "base prompts.jsonl --out out/x.jsonl",
}


ABSENT = {
    "cupy": "a GPU array needs CuPy: pip install",
    0: "CuPy finds no GPU (there is none)",
    None: "CuPy finds no GPU (cudaErrorInsufficientDriver",
}


@pytest.fixture
def nothing_is_typed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.mark.usefixtures("nothing_is_typed")
@pytest.mark.parametrize(
    "name, missing",
    [*((name, "cupy") for name in COMMANDS), ("sft", 0), ("generate", None)],
)
def test_a_device_that_is_not_there_is_one_line(name, missing, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *COMMANDS[name].split(), "--device", "cuda"])
    before = sorted(Path().rglob("*"))
    with contextlib.ExitStack() as stack:
        if missing == "cupy":
            monkeypatch.setitem(sys.modules, "cupy", None)
            stack.callback(device._cupy.cache_clear)
            device._cupy.cache_clear()
        else:
            stack.enter_context(installed(missing))
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / f"scripts/{name}.py"), run_name="__main__")
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert ended.value.code == 1 and line.startswith(f"{name}.py: {ABSENT[missing]}") and said.out == ""
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("name", [*COMMANDS, "reward_hacking"])
def test_every_script_that_computes_takes_a_device_and_a_precision(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / f"scripts/{name}.py"), run_name="__main__")
    told = capsys.readouterr().out
    assert "--device" in told and "--precision" in told


@pytest.mark.usefixtures("nothing_is_typed")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["generate", "next_token", "chat", "evaluate"])
def test_a_script_prints_the_same_from_the_gpu(name, precision, world, monkeypatch, capsys, cupy):
    monkeypatch.chdir(world)
    texts, dtypes, read = [], [], hub.load_pretrained
    for module in (common, hub):
        monkeypatch.setattr(module, "load_pretrained", lambda *given: dtypes.append(given[1].name) or read(*given))
    for where in ("cpu", "cuda"):
        arguments = [*COMMANDS[name].replace("--out out", "").split(), "--precision", precision]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--device", where])
        cupy.synchronized.clear()
        runpy.run_path(str(ROOT / f"scripts/{name}.py"), run_name="__main__")
        texts.append(capsys.readouterr().out)
        assert bool(cupy.synchronized) == (where == "cuda")
    assert texts[0] == texts[1] != "" and set(dtypes) == {precision}


# ------------------------------------------------------------------ a real GPU


def gpu_there():
    """Why the tests below can not run, None where they can."""
    try:
        device.check_device("cuda")
    except (ImportError, ValueError) as error:
        return str(error)


needs_gpu = pytest.mark.skipif(gpu_there() is not None, reason=str(gpu_there()))


@needs_gpu
@pytest.mark.parametrize("kernels", ["reference", "fastest"])
def test_loss_curves_on_the_gpu_and_the_cpu_agree(kernels, world, tmp_path, monkeypatch):
    if kernels == "fastest":
        monkeypatch.delenv("MINILLM_KERNELS")
    told = {"tokens": 20 * 4 * 24, "log_every": 1, "eval_every": 100, "save_minutes": 0.0, "save_every": 0}
    for where in ("cpu", "cuda"):
        TRAINERS["pretrain"].train(config(world, "pretrain", tmp_path / where, device=where, **told))
    cpu, gpu = ([row["loss"] for row in rows_of(tmp_path / where) if "loss" in row] for where in ("cpu", "cuda"))
    assert len(cpu) == 20
    np.testing.assert_allclose(gpu, cpu, atol=1e-4, rtol=0)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_runs_on_the_gpu(name, precision, world, expected, tmp_path, monkeypatch):
    rows = expected(name)[1]
    monkeypatch.delenv("MINILLM_KERNELS")
    TRAINERS[name].train(brief(world, name, tmp_path / "cuda", device="cuda", precision=precision))
    key = "eval_scores" if name == "ppo" else "eval_loss"
    found, right = ([row[key] for row in some if key in row] for some in (rows_of(tmp_path / "cuda"), rows))
    np.testing.assert_allclose(found, right, atol=1e-4 if precision == "float32" and name != "ppo" else 0.05)


@needs_gpu
@pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize")
def test_no_update_waits_for_the_gpu(world, tmp_path, monkeypatch):
    cupyx = pytest.importorskip("cupyx")
    steps, begin = run_module.Run.steps, device.Later.__init__

    def watched(self, *args):
        for step in steps(self, *args):
            with cupyx.allow_synchronize(step < 2):  # the first ones load kernels
                yield step

    def asynchronous(self, x):
        with cupyx.allow_synchronize(True):  # CuPy takes an asynchronous copy for a wait, too
            begin(self, x)

    monkeypatch.setattr(run_module.Run, "steps", watched)
    monkeypatch.setattr(device.Later, "__init__", asynchronous)
    monkeypatch.delenv("MINILLM_KERNELS")
    TRAINERS["pretrain"].train(brief(world, "pretrain", tmp_path / "cuda", device="cuda"))
