"""The proof of every gradient: each op goes through each property, with calls drawn from its own docstring."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import op_examples
from minillm.autograd import Tensor, backward, checkpoint, op, saved_arrays
from tests.gradcheck import gradcheck, is_float, note_error, output_like, tensors_of, vjp
from tests.strategies import LAYOUTS, OPS, calls, in_layout

every_op = pytest.mark.parametrize("name", OPS)
SMOOTH_FLOAT32 = 2e-4  # a loose bound for every op; the fused ones have a strict one in test_kernels.py


def bind(function, constants):
    return lambda *inputs: function(*inputs, **constants)


def run(f, inputs, rng):
    """(outputs, gradients) for random cotangents, the same for the same rng state."""
    return vjp(f, inputs, [rng.standard_normal(o.shape) for o in output_like(f, inputs)])


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert np.array_equal(a, b, equal_nan=True)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape
            scale = max(1.0, np.abs(b).max(initial=0))
            assert np.abs(a - b).max(initial=0) <= tolerance * scale


def test_every_op_documents_and_exemplifies_itself():
    assert len(OPS) >= 35
    for function in OPS.values():
        assert set(op_examples.sections(function)) == {"equation", "gradient", "keeps", "example"}


@every_op
def test_gradient_is_the_derivative(name):
    @settings(max_examples=60)
    @given(calls(OPS[name]))
    def check(call):
        inputs, constants, rng = call
        note_error(f"op {name}: gradient", gradcheck(bind(OPS[name], constants), *inputs, rng=rng))

    check()


@every_op
def test_zero_cotangent_gives_exactly_zero(name):
    @settings(max_examples=5)
    @given(calls(OPS[name]))
    def check(call):
        inputs, constants, _ = call
        f = bind(OPS[name], constants)
        _, gradients = vjp(f, inputs, [np.zeros(o.shape) for o in output_like(f, inputs)])
        for x, g in zip(inputs, gradients, strict=True):
            if is_float(x):
                assert g.shape == x.shape
                assert not g.any()

    check()


@every_op
def test_gradient_is_linear_in_the_cotangent(name):
    @settings(max_examples=8)
    @given(calls(OPS[name]))
    def check(call):
        inputs, constants, rng = call
        f = bind(OPS[name], constants)
        first, second = ([rng.standard_normal(o.shape) for o in output_like(f, inputs)] for _ in range(2))
        mixed = [2.5 * u - v for u, v in zip(first, second, strict=True)]
        du, dv, dw = (vjp(f, inputs, c)[1] for c in (first, second, mixed))
        expected = [None if a is None else 2.5 * a - b for a, b in zip(du, dv, strict=True)]
        assert_close(dw, expected, 1e-10)

    check()


@every_op
def test_repeats_give_the_same_bits_and_touch_no_input(name):
    @settings(max_examples=8)
    @given(calls(OPS[name]), st.integers(0, 1000))
    def check(call, seed):
        inputs, constants, _ = call
        before = [np.copy(x) for x in inputs]
        f = bind(OPS[name], constants)
        first = run(f, inputs, np.random.default_rng(seed))
        again = run(f, inputs, np.random.default_rng(seed))
        assert_same_bits(first[0] + first[1], again[0] + again[1])
        assert_same_bits(inputs, before)

    check()


@every_op
def test_memory_layout_does_not_matter(name):
    @settings(max_examples=12)
    @given(calls(OPS[name]), st.lists(st.sampled_from(list(LAYOUTS)), min_size=4, max_size=4))
    def check(call, layouts):
        inputs, constants, rng = call
        arranged = [in_layout(x, layouts[i % 3]) for i, x in enumerate(inputs)]
        plain = [np.array(x, order="C") for x in arranged]
        f = bind(OPS[name], constants)
        strange = [in_layout(rng.standard_normal(o.shape), layouts[3]) for o in output_like(f, plain)]
        values, gradients = vjp(f, plain, [np.array(v, order="C") for v in strange])

        leaves = [Tensor(x, requires_grad=True) if is_float(x) else x for x in arranged]
        outputs = tensors_of(f(*leaves))
        backward(outputs, strange)
        assert_close([o.data for o in outputs], values, 1e-12)
        assert_close([x.grad if isinstance(x, Tensor) else None for x in leaves], gradients, 1e-10)

    check()


@every_op
def test_float32_follows_float64(name):
    @settings(max_examples=8)
    @given(calls(OPS[name]), st.integers(0, 1000))
    def check(call, seed):
        inputs, constants, _ = call
        if name == "cast":
            constants = {"dtype": "float32"}
        halves = [x.astype(np.float32) if is_float(x) else x for x in inputs]
        wide = [x.astype(np.float64) if is_float(x) else x for x in halves]
        narrow_constants = {
            k: v.astype(np.float32) if isinstance(v, np.ndarray) and is_float(v) else v for k, v in constants.items()
        }
        values, gradients = run(bind(OPS[name], narrow_constants), halves, np.random.default_rng(seed))
        expected_values, expected = run(bind(OPS[name], constants), wide, np.random.default_rng(seed))
        assert all(v.dtype == np.float32 for v in values)
        assert all(g is None or g.dtype == np.float32 for g in gradients)
        assert_close(values, expected_values, SMOOTH_FLOAT32)
        assert_close(gradients, expected, SMOOTH_FLOAT32)

    check()


@every_op
def test_checkpoint_gives_the_same_bits(name):
    @settings(max_examples=5)
    @given(calls(OPS[name]), st.integers(0, 1000))
    def check(call, seed):
        inputs, constants, _ = call
        f = bind(OPS[name], constants)
        plain = run(f, inputs, np.random.default_rng(seed))
        again = run(lambda *x: checkpoint(f, *x), inputs, np.random.default_rng(seed))
        assert_same_bits(plain[0] + plain[1], again[0] + again[1])

    check()


@every_op
def test_one_gradient_alone_is_the_same_as_among_others(name):
    """Each input in turn is the only one that needs a gradient: the rest of the way back is dropped, or told not to."""

    @settings(max_examples=3)
    @given(calls(OPS[name]), st.integers(0, 1000))
    def check(call, seed):
        inputs, constants, _ = call
        f = bind(OPS[name], constants)
        _, gradients = run(f, inputs, np.random.default_rng(seed))
        for i, x in enumerate(inputs):
            if is_float(x):
                _, (alone,) = run(lambda x, i=i: f(*inputs[:i], x, *inputs[i + 1 :]), [x], np.random.default_rng(seed))
                assert_same_bits([alone], [gradients[i]])

    check()


@every_op
def test_a_gradient_is_added_to_the_one_that_is_there(name):
    """In its array, once; some ways back do that themselves."""

    @settings(max_examples=5)
    @given(calls(OPS[name]))
    def check(call):
        inputs, constants, rng = call
        f = bind(OPS[name], constants)
        cotangents = [rng.standard_normal(o.shape) for o in output_like(f, inputs)]
        _, gradients = vjp(f, inputs, cotangents)
        leaves = [Tensor(x, requires_grad=True) if is_float(x) else x for x in inputs]
        before = [rng.standard_normal(x.shape) for x in inputs]
        there = [b.copy() for b in before]
        for leaf, g in zip(leaves, there, strict=True):
            if isinstance(leaf, Tensor):
                leaf.grad = g
        backward(tensors_of(f(*leaves)), cotangents)
        for leaf, g, b, gradient in zip(leaves, there, before, gradients, strict=True):
            if isinstance(leaf, Tensor):
                assert leaf.grad is g
                assert_close([g - b], [gradient], 1e-10)

    check()


@pytest.mark.parametrize("name", [n for n in OPS if op_examples.sections(OPS[n])["keeps"].startswith("Keeps nothing")])
def test_an_op_that_keeps_nothing_keeps_no_array(name):
    rng = np.random.default_rng(0)
    inputs, constants = op_examples.draw(OPS[name], rng, dict.fromkeys(op_examples.letters(OPS[name]), 3))
    result = OPS[name](*(Tensor(x, requires_grad=True) for x in inputs), **constants)
    assert saved_arrays(*tensors_of(result)) == []


def test_the_gradient_check_can_fail():
    @op
    def wrong_sign(x, y):
        return x * y, (lambda g: g * y, lambda g: -g * x)

    @op
    def wrong_scale(x):
        return x * x, (lambda g: g * x * 2.0001,)

    @op
    def wrong_row(x):
        return x * 1.0, (lambda g: g[::-1].copy(),)

    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 4))
    for f, inputs in ((wrong_sign, (x, y)), (wrong_scale, (x,)), (wrong_row, (x,))):
        with pytest.raises(AssertionError):
            gradcheck(f, *inputs, rng=rng)
