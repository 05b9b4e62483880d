"""A recorded update is an update: on a stand-in for CuPy whose graphs do again what was told when they were recorded,
with the numbers of that moment (tests/fake_cupy.py), and with the CUDA kernels' own code."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from minillm.data.pack import Batch
from minillm.kernels import device
from minillm.kernels.graph import Graph
from minillm.model import Config, build
from minillm.optim import AdamW, gpu_clip_scale
from minillm.trainers import pretrain, sft
from minillm.trainers import recorded as recorded_module
from minillm.trainers.common import next_token_backward
from minillm.trainers.recorded import RecordedUpdate
from minillm.trainers.run import NotFinite, Run
from tests import fake_cupy
from tests.cuda_on_cpu import on_cpu
from tests.fake_cupy import OnCpu, installed
from tests.test_device import KINDS, SMALL, gpu_there, rows_of
from tests.world import TOKENIZER, config, make_world

ROOT = Path(__file__).parents[1]
V = TOKENIZER.vocab_size
pytestmark = pytest.mark.filterwarnings("ignore:no cublasLt")


@pytest.fixture(autouse=True)
def references(monkeypatch):
    monkeypatch.setenv("MINILLM_KERNELS", "reference")


@pytest.fixture
def cupy():
    with installed() as module:
        fake_cupy.Graph.launched = 0
        yield module


# ------------------------------------------------------------------ graphs


def test_a_graph_does_it_again_with_other_inputs(cupy):
    """The sum over calls stands in memory from outside, the product is made in the graph's own."""
    total, calls = cupy.zeros(3, np.float32), []

    def add(x, n):
        calls.append(x.shape)
        product = x * n[..., 0:1]
        total[: len(x)] += product
        return product.sum(), product

    graph, expected, rng = Graph(add), np.zeros(3, np.float32), np.random.default_rng(0)
    for call in range(6):
        size = 3 - call % 2
        x, n = rng.integers(0, 9, size).astype(np.float32), np.full((2, size), call, np.int32)[0]
        with cupy.allow_synchronize(False):
            found = graph(x, n)
        expected[:size] += x * call
        assert found[0].item() == (x * call).sum() and np.array_equal(found[1].get(), x * call)
    assert np.array_equal(total.get(), expected)
    assert calls == [(3,), (2,), (3,), (2,)] and fake_cupy.Graph.launched == 4


def test_inputs_of_any_kind_arrive(cupy):
    rng = np.random.default_rng(1)
    values = [
        rng.integers(0, 2, 7).astype(bool),
        rng.standard_normal((3, 5)).T,
        np.int32(5).reshape(()),
        np.zeros((0, 2)),
    ]
    graph = Graph(lambda *arrays: tuple(x.copy() for x in arrays))
    for _ in range(3):
        values = [np.roll(x, 1) for x in values]
        for found, expected in zip(graph(*values), values, strict=True):
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert np.array_equal(found.get(), expected)


@pytest.mark.parametrize("good", [0, 1])
def test_an_error_in_the_function_leaves_everything_as_it_was(good, cupy):
    """In the first call or while it is recorded: the next call is then the first one, or recorded, again."""
    fails, stream = [], cupy.cuda.get_current_stream()

    def function(x):
        y = x + 1
        if fails:
            raise RuntimeError("as it may")
        return (y,)

    graph = Graph(function)
    for _ in range(good):
        graph(np.zeros(1))
    fails.append(True)
    with pytest.raises(RuntimeError, match="as it may"):
        graph(np.zeros(1))
    fails.clear()
    assert cupy.cuda.get_current_stream() is stream and (cupy.ones(1) + 1).item() == 2
    assert [graph(np.full(1, float(n)))[0].item() for n in range(3)] == [1, 2, 3]
    assert fake_cupy.Graph.launched == 2 + good


@pytest.mark.parametrize("where", ["first call", "recording", "recording, and ever after", "an error"])
def test_where_memory_is_full_other_recordings_are_made_again(where, cupy):
    """The pool then gives back what is free: what the other recordings work in, and what this one had before."""
    told, full = [], []

    def function(x):
        told.append(x.shape)
        y = x + 1
        fake_cupy.Memory.refused = bool(full)
        y = y * 2
        if where == "an error" and full:
            raise RuntimeError("as it may")
        return (y,)

    def call(size):
        assert graph(np.full(size, float(size)))[0].get().tolist() == [2 * size + 2] * size

    graph = Graph(function)
    for size in (1, 1, 2, 2, 3):
        call(size)
    told.clear()
    full.append(True)
    if where == "an error":
        with pytest.raises(RuntimeError, match="as it may"):
            call(4)
    else:
        call(4 if where == "first call" else 3)
    if where != "recording, and ever after":
        full.clear()
    for size in (1, 2, 2, 3, 1, 3):
        call(size)
    again = {  # a shape is asked of the function twice, once to record it and once because that failed
        "first call": [(4,), (1,), (2,), (3,)],
        "recording": [(3,), (3,), (1,), (2,), (3,)],
        "recording, and ever after": [(n,) for n in (3, 3, 1, 1, 2, 2, 2, 2, 3, 3, 1, 1, 3, 3)],
        "an error": [(4,), (1,), (2,), (3,)],
    }
    assert told == again[where]


def test_an_error_while_recording_is_told_and_not_what_it_did_to_the_recording(cupy, monkeypatch):
    fails, end = [], fake_cupy.Stream.end_capture

    def invalid(stream):
        end(stream)
        raise RuntimeError("the capture was invalidated")

    def function(x):
        if fails:
            raise ValueError("what went wrong")
        return (x + 1,)

    graph = Graph(function)
    graph(np.ones(3, np.float32))
    fails.append(True)
    monkeypatch.setattr(fake_cupy.Stream, "end_capture", invalid)
    with pytest.raises(ValueError, match="what went wrong"):
        graph(np.ones(3, np.float32))


# ------------------------------------------------------------------ what the stand-in refuses


@pytest.mark.parametrize(
    "function, told",
    [
        (lambda cupy, x: float(x[0]), "float while a graph is recorded"),
        (lambda cupy, x: x + cupy.asarray(np.ones(3, np.float32)), "a copy from the host"),
        (lambda cupy, x: device.Later(x), "a copy to the host"),
        (lambda cupy, x: cupy.concatenate([x, x]), "concatenate, which copies addresses"),
        (lambda cupy, x: cupy.cuda.Event().record(), "an event"),
    ],
)
def test_a_recording_refuses_what_would_not_be_done_again(function, told, cupy):
    graph = Graph(lambda x: function(cupy, x))
    graph(np.ones(3, np.float32))
    with pytest.raises(AssertionError, match=told):
        graph(np.ones(3, np.float32))
    assert (cupy.ones(1) + 1).item() == 2  # the recording is over


def test_a_number_stays_what_it_was_when_it_was_recorded(cupy):
    """The mistake that a graph invites: so it has to show here."""
    numbers = iter(range(10))
    graph = Graph(lambda x: (x + next(numbers),))
    assert [graph(np.zeros(1))[0].item() for _ in range(4)] == [0, 1, 1, 1]


def test_memory_of_a_graph_is_poison_at_each_launch(cupy):
    """It may have been another array's meanwhile: what one call has left there is nothing to the next."""
    late = Graph(lambda x: (cupy.empty(1) + x,))
    late(np.ones(1))
    assert all(np.isnan(late(np.ones(1))[0].item()) for _ in range(2))


def test_an_array_that_is_no_more_is_seen(cupy):
    held = [cupy.ones(1)]
    graph = Graph(lambda x: (x + held[0],))
    for _ in range(3):
        graph(np.ones(1))
    held[0] = cupy.ones(1)
    with pytest.raises(AssertionError, match="no more"):
        graph(np.ones(1))


def test_memory_that_was_given_back_is_seen(cupy):
    graph = Graph(lambda x: (x + 1,))
    for _ in range(3):
        graph(np.ones(1))
    graph._pool.given_back += 1
    with pytest.raises(AssertionError, match="given back"):
        graph(np.ones(1))


def test_streams_have_to_wait_for_each_other(cupy):
    x = cupy.ones(3)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, pytest.raises(AssertionError, match="has not waited"):
        x + 1
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        y = x + 1
    with pytest.raises(AssertionError, match="has not waited"):
        y * 2
    cupy.cuda.get_current_stream().wait_event(stream.record())
    assert (y * 2).get().tolist() == [4, 4, 4]


def test_a_graph_needs_a_stream_and_a_pool_of_its_own(cupy):
    with pytest.raises(AssertionError, match="of its own"):
        cupy.cuda.get_current_stream().begin_capture()
    stream = cupy.cuda.Stream()
    with stream, pytest.raises(AssertionError, match="of its own"):
        stream.begin_capture()


# ------------------------------------------------------------------ updates


def batches(rng, count, rows=4, width=11, masked=False):
    """Batches of packed documents that begin anywhere."""
    for _ in range(count):
        start = np.sort(rng.integers(0, 4, (rows, width)), 1).astype(np.int32)
        start = np.minimum(start, np.arange(width, dtype=np.int32))
        mask = rng.random((rows, width)) < (0.7 if masked else 2)
        yield Batch(rng.integers(0, V, (rows, width + 1)).astype(np.int32), start, mask)


def plainly(model, optimizer, batch, lr, size, longest):
    """The update that is recorded, as Run.update makes it."""
    loss = next_token_backward(model, batch, size)
    norm = optimizer.grad_norm()
    optimizer.step(lr, gpu_clip_scale(norm, longest, loss))
    optimizer.zero_grad()
    return loss, norm


def both(shape, updates, size=0, longest=1.0, precision="float32"):
    """(numbers of each update, the model, its moments) in the two ways, from one beginning."""
    for recorded in (False, True):
        model = build(shape).to("cuda", precision)
        optimizer = AdamW(model.parameters, weight_decay=0.3)
        update = RecordedUpdate(model, optimizer, size, longest)
        numbers = []
        for step, batch in enumerate(updates):
            told = batch, 0.01 / (1 + step)
            found = update(*told).values() if recorded else plainly(model, optimizer, *told, size, longest)
            later = device.later(dict(enumerate(found)))
            numbers.append(later().values())
        assert optimizer.steps == len(updates) and not model.flat_grad.get().any()
        yield np.array([list(x) for x in numbers]), *(x.get() for x in (model.flat, optimizer.m, optimizer.v))


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen", "gpt2"])
def test_recorded_updates_are_the_same_bits(kind, size, cupy):
    """Learning rate, step, tokens and documents are others in each update; the last part may have fewer rows."""
    shape = Config(vocab_size=V, **SMALL | KINDS[kind])
    updates = list(batches(np.random.default_rng(0), 5))
    plain, recorded = both(shape, updates, size)
    for a, b in zip(plain, recorded, strict=True):
        assert np.array_equal(a, b)
    assert fake_cupy.Graph.launched == 4


def test_tokens_that_are_no_targets_and_an_update_without_any(cupy):
    """A plain update leaves the rows without a target out of its products; the sums are then others in the last bits.
    An update without any target has loss 0, and only the weights decay."""
    updates = [*batches(np.random.default_rng(1), 5, masked=True)]
    plain, recorded = both(Config(vocab_size=V, **SMALL), updates, 2, longest=100.0)
    for a, b in zip(plain, recorded, strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a) and not np.array_equal(a, b)
    nothing = [batch._replace(mask=np.zeros_like(batch.mask)) for batch in updates]
    (numbers, *_), _ = both(Config(vocab_size=V, **SMALL), nothing)
    assert not numbers.any()


def test_batches_of_another_shape_are_another_graph(cupy):
    rng = np.random.default_rng(2)
    updates = [next(batches(rng, 1, rows=2 + i % 2)) for i in range(8)]
    plain, recorded = both(Config(vocab_size=V, **SMALL), updates)
    for a, b in zip(plain, recorded, strict=True):
        assert np.array_equal(a, b)
    assert fake_cupy.Graph.launched == 6


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_recorded_update_leaves_out_what_is_not_finite(bad, cupy, monkeypatch):
    lost = cupy.zeros(())  # what the loss is off by, and the gradient does not know of
    monkeypatch.setattr(recorded_module, "number", lambda x: device.number(x) + lost)
    model = build(Config(vocab_size=V, **SMALL)).to("cuda")
    update = RecordedUpdate(model, optimizer := AdamW(model.parameters), 0, 1.0)
    for step, batch in enumerate(batches(np.random.default_rng(3), 4)):
        before = model.flat.get()
        wrong, right = (lost, 0.0) if bad == "loss" else (model.flat[7:8], before[7].item())
        if step == 2:
            wrong[...] = np.inf
        found = update(batch, 0.01)
        assert np.isfinite(found["loss"].item()) == (step != 2)
        if step == 2:
            wrong[...] = right
        assert np.array_equal(model.flat.get(), before) == (step == 2) and not model.flat_grad.get().any()
        assert optimizer.steps == step + (step < 2)


def test_bad_input_is_told_before_it_reaches_the_gpu(cupy):
    model = build(Config(vocab_size=V, **SMALL)).to("cuda")
    update = RecordedUpdate(model, optimizer := AdamW(model.parameters), 0, 1.0)
    (batch,) = batches(np.random.default_rng(4), 1)
    tokens, start = batch.tokens.copy(), batch.start.copy()
    tokens[1, 3], start[2, 4] = V, 5
    start[2, 5] = 0
    last = batch.tokens.copy()
    last[0, -1] = -1
    for wrong, told in (
        (batch._replace(tokens=tokens), rf"^tokens: id {V} at position \(1, 3\)"),
        (batch._replace(tokens=last), "^targets: id -1 at position"),
        (batch._replace(start=start), "never decrease, and row 2"),
    ):
        with pytest.raises(ValueError, match=told):
            update(wrong, 0.1)
    assert optimizer.steps == 0


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_updates_recorded_from_the_cuda_kernels_are_the_same_bits(precision, cupy, monkeypatch):
    monkeypatch.delenv("MINILLM_KERNELS")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 40}
    shape = Config(vocab_size=V, max_position_embeddings=64, **sizes)
    with on_cpu(OnCpu()) as backend:
        plain, recorded = both(shape, list(batches(np.random.default_rng(5), 3, 2, 19)), precision=precision)
    for a, b in zip(plain, recorded, strict=True):
        assert np.array_equal(a, b)
    assert {name for name, _ in backend.launched} >= {"adamw.cu", "attention.cu", "cross_entropy.cu", "embedding.cu"}


# ------------------------------------------------------------------ the trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world, out, **options):
    return config(world, "pretrain", out, log_every=1, save_minutes=0.0, samples=0, **options)


def test_pretraining_with_a_graph(world, tmp_path, cupy, monkeypatch):
    """The same curve as on the host, also of a run that was stopped and resumed in between; and nothing waits."""
    steps = Run.steps
    told = {"schedule": "constant", "warmup": 0.0}  # the rate does not depend on how long the run is to be

    def watched(self, *args):
        for step in steps(self, *args):
            with cupy.allow_synchronize(False):
                yield step

    pretrain.train(settings(world, tmp_path / "cpu", **told))
    monkeypatch.setattr(Run, "steps", watched)
    for name, stops in (("whole", [9]), ("resumed", [4, 9])):
        for updates in stops:
            more = {"tokens": updates * 4 * 24, "resume": updates != stops[0]}
            pretrain.train(settings(world, tmp_path / name, device="cuda", cuda_graph=True, **told, **more))
    curves = [
        [row["loss"] for row in rows_of(tmp_path / name) if "loss" in row] for name in ("cpu", "whole", "resumed")
    ]
    assert len(curves[0]) == 9
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4)
    assert fake_cupy.Graph.launched == 8 + 3 + 4  # the first update of each start is none


@pytest.mark.parametrize("adapter", [{}, {"lora_rank": 2}, {"lora_rank": 2, "quantize": "nf4"}])
def test_fine_tuning_with_a_graph(adapter, world, tmp_path, cupy, monkeypatch):
    """As pretraining, whatever is trained: the whole model or an adapter beside it, in four bits, too."""
    steps, curves = Run.steps, {}

    def watched(self, *args):
        for step in steps(self, *args):
            with cupy.allow_synchronize(False):
                yield step

    for name, told in (("cpu", {}), ("gpu", {"device": "cuda", "cuda_graph": True})):
        run = config(world, "sft", tmp_path / name, log_every=1, save_minutes=0.0, samples=0, **adapter, **told)
        sft.train(run)
        curves[name] = [
            [row[key] for row in rows_of(run.out) if key in row] for key in ("loss", "grad_norm", "trained_tokens")
        ]
        monkeypatch.setattr(Run, "steps", watched)
    assert len(curves["cpu"][0]) > 4
    for host, gpu in zip(*curves.values(), strict=True):
        np.testing.assert_allclose(gpu, host, rtol=1e-3)
    assert fake_cupy.Graph.launched == len(curves["gpu"][0]) - 1


def test_a_gradient_that_is_not_finite_stops_it(world, tmp_path, cupy):
    on_gpu = settings(world, tmp_path / "gpu", device="cuda", cuda_graph=True, lr=1e30)
    with pytest.raises(NotFinite, match=r"^update 2 \(cats .*the gradient's norm is nan"):
        pretrain.train(on_gpu)


def test_a_graph_is_for_the_gpu(tmp_path):
    for make in (pretrain.PretrainConfig, lambda **told: sft.SFTConfig(model=tmp_path, **told | {"data": (tmp_path,)})):
        with pytest.raises(ValueError, match=r"^--cuda-graph has to be False without --device cuda, and is True$"):
            make(data=tmp_path, out=tmp_path / "out", cuda_graph=True)


@pytest.mark.parametrize("graph", [[], ["--graph"]])
def test_the_benchmark_of_training(graph, cupy, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    sizes = {"vocab": 50, "width": 16, "layers": 1, "heads": 2, "length": 8, "batch": 3, "rounds": 2, "steps": 2}
    options = [f"--{name}={n}" for name, n in sizes.items()]
    monkeypatch.setattr(sys, "argv", ["x", *options, "--device", "cuda", f"--json={tmp_path / 'x.json'}", *graph])
    runpy.run_path(str(ROOT / "scripts/bench_training.py"), run_name="__main__")
    assert "TFLOP/s of the model" in capsys.readouterr().out
    noted = json.loads((tmp_path / "x.json").read_text())["minillm"]
    assert len(set(noted["losses"])) == 10 and noted["memory"] == (2 if graph else 1) << 20
    assert fake_cupy.Graph.launched == (9 if graph else 0)


@pytest.mark.skipif(gpu_there() is not None, reason=str(gpu_there()))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_updates_are_the_same_on_a_gpu(precision, monkeypatch):
    monkeypatch.delenv("MINILLM_KERNELS")
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = Config(vocab_size=V, max_position_embeddings=256, **sizes)
    plain, recorded = both(shape, list(batches(np.random.default_rng(6), 20, 8, 200)), precision=precision)
    for a, b in zip(plain, recorded, strict=True):
        np.testing.assert_array_equal(a, b)
