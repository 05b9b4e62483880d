"""The engine: how gradients are added up, what is kept and when it is freed, checkpointing, and clear errors."""

import gc
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import autograd as ag
from minillm import functional as F
from minillm.autograd import Tensor, backward, checkpoint, no_grad, op, saved_arrays, saved_report
from tests.gradcheck import gradcheck

rng = np.random.default_rng(0)


def leaf(*shape):
    return Tensor(np.random.default_rng(1).standard_normal(shape), requires_grad=True)


# ------------------------------------------------------------------ adding up


def test_one_tensor_used_twice_by_one_op():
    x = leaf(3)
    (x * x).sum().backward()
    assert np.allclose(x.grad, 2 * x.data, rtol=1e-15)


def test_one_tensor_in_many_branches():
    gradcheck(lambda x: x * x + ag.exp(x) * x - x / (x * x + 2.0) + x[::-1], rng.standard_normal(5), rng=rng)


def test_queries_keys_and_values_from_one_tensor():
    x = rng.standard_normal((2, 5, 3, 4))
    gradcheck(lambda x: F.attention(x, x, x), x, rng=rng)


def test_a_gradient_shared_by_two_inputs_is_not_added_to_in_place():
    """add sends one and the same array to x and y; adding x's other gradient into it in place would change y's."""
    x, y = leaf(4), leaf(4)
    z = x + y
    (z + x * 3.0 + x * 5.0).sum().backward()
    assert np.array_equal(x.grad, np.full(4, 9.0))
    assert np.array_equal(y.grad, np.ones(4))


def test_leaves_do_not_share_their_gradient_with_anything():
    x, y, seed = leaf(4), leaf(4), np.ones(4)
    (x + y).backward(seed)
    x.grad *= 7
    assert np.array_equal(y.grad, np.ones(4))
    assert np.array_equal(seed, np.ones(4))


def test_gradients_accumulate_over_backwards_in_place():
    x = leaf(4)
    (x * 2.0).sum().backward()
    buffer = x.grad
    (x * 3.0).sum().backward()
    assert x.grad is buffer
    assert np.array_equal(buffer, np.full(4, 5.0))


def test_a_gradient_can_be_collected_in_a_slice_of_a_flat_buffer():
    flat = np.zeros(10)
    x = leaf(2, 3)
    x.grad = flat[2:8].reshape(2, 3)
    (x * 2.0).sum().backward()
    assert np.array_equal(flat, [0, 0, 2, 2, 2, 2, 2, 2, 0, 0])


@given(st.integers(0, 2**32 - 1))
def test_random_graphs(seed):
    """A random program over three leaves, checked as a whole: the order of nodes, fan-out and accumulation."""

    def program(*leaves):
        choose, pool = np.random.default_rng(seed), list(leaves)
        for _ in range(12):
            a, b = (pool[i] for i in choose.integers(0, len(pool), 2))
            made = [ag.tanh(a), a + b, a * b * 0.5, a - b, ag.sigmoid(a) * b, a.transpose(1, 0), a @ b * 0.3]
            pool.append(made[choose.integers(len(made))])
        return pool[-1], pool[-3]

    data = np.random.default_rng(seed)
    gradcheck(program, *(data.standard_normal((3, 3)) for _ in range(3)), rng=data)


def test_several_roots_at_once():
    x = leaf(3)
    y, z = x * 2.0, ag.exp(x)
    backward([y, z], [np.ones(3), np.full(3, 10.0)])
    assert np.allclose(x.grad, 2 + 10 * np.exp(x.data), rtol=1e-15)


def test_an_unused_piece_of_a_split_gets_zeros():
    x = leaf(5)
    first, _ = ag.split(x, sizes=(2, 3))
    first.sum().backward()
    assert np.array_equal(x.grad, [1, 1, 0, 0, 0])


def test_repeated_indices_add_up():
    x = leaf(4)
    x[np.array([1, 1, 3, -1])].sum().backward()
    assert np.array_equal(x.grad, [0, 2, 0, 2])
    y = leaf(2, 3)
    ag.gather(y, ids=np.array([[2, 2], [0, 1]])).sum().backward()
    assert np.array_equal(y.grad, [[0, 0, 2], [1, 1, 0]])


@pytest.mark.parametrize("shape, ids", [((2, 3), (1, 4)), ((1, 3), (2, 4)), ((2, 1, 3), (1, 5, 4))])
def test_gather_broadcasts_as_numpys_take_along_axis(shape, ids):
    draw = np.random.default_rng(2)
    x, ids = draw.standard_normal(shape), draw.integers(0, 3, ids)
    assert np.array_equal(ag.gather(x, ids=ids).data, np.take_along_axis(x, ids, -1))
    gradcheck(lambda x: ag.gather(x, ids=ids), x, rng=draw)


def test_boolean_masks_and_ellipses_index_too():
    x = rng.standard_normal((3, 4))
    mask = x > 0
    for index in (mask, (Ellipsis, 1), (slice(None, None, -2), None, 2), 1, [0, 0, 2], np.int64(2)):
        gradcheck(lambda t, index=index: t[index], x, rng=rng)


# ------------------------------------------------------------------ numbers, dtypes, operators


def test_numbers_keep_the_dtype():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    numbers = 2, 2.0, np.float64(2), np.int64(2)
    for n in numbers:
        for y in (x + n, n + x, x - n, n - x, x * n, n * x, x / n, n / x, -x, x**2):
            assert y.dtype == np.float32
    assert ag.maximum(x, 0.5).dtype == ag.where(x, 0.0, condition=np.ones(3, bool)).dtype == np.float32


def test_operators_mean_what_they_say():
    x, y = rng.standard_normal((2, 3, 3))
    a, b = Tensor(x), Tensor(y)
    pairs = [
        (a + b, x + y), (a - b, x - y), (a * b, x * y), (a / b, x / y), (a @ b, x @ y), (-a, -x), (a**3, x**3),
        (a + 2, x + 2), (2 + a, 2 + x), (a - 2, x - 2), (2 - a, 2 - x), (a * 3, x * 3), (3 * a, 3 * x), (a / 4, x / 4),
        (4 / a, 4 / x), (y * a, y * x), (y + a, y + x), (y - a, y - x), (y / a, y / x), (y @ a, y @ x), (a[1:], x[1:]),
        (a.sum(0), x.sum(0)), (a.mean(1, keepdims=True), x.mean(1, keepdims=True)), (a.max(), x.max()),
        (a.reshape(9), x.reshape(9)), (a.reshape((1, 9)), x.reshape(1, 9)), (a.transpose(1, 0), x.T),
        (a.transpose(), x.T),
    ]  # fmt: skip
    for ours, theirs in pairs:
        assert isinstance(ours, Tensor)
        assert np.allclose(ours.data, theirs, rtol=1e-15)


def test_an_op_gets_a_gradient_of_its_results_dtype():
    seen = []

    @op
    def spy(x):
        return (x * 1, x * 2), lambda *g: (seen.extend(one.dtype for one in g), g[0])[1:]

    x = Tensor(np.ones(2, np.float32), requires_grad=True)
    ag.cast(spy(x)[0], dtype="float64").sum().backward()
    assert seen == [np.float32, np.float32]


def test_mixed_dtypes_send_each_leaf_its_own():
    x, y = Tensor(np.ones(3, np.float32), requires_grad=True), Tensor(np.ones(3), requires_grad=True)
    (x * y).sum().backward()
    assert x.grad.dtype == np.float32
    assert y.grad.dtype == np.float64


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_add_up_in_32(dtype):
    x = Tensor(np.ones((3000, 2), dtype), requires_grad=True)
    for y, expected in (
        (x.sum(0), 3000),
        (x.sum(), 6000),
        (x.mean(0, keepdims=True), 1),
        (ag.logsumexp(x - x, axis=0), np.log(3000)),
    ):
        assert y.dtype == dtype and (y.data == np.asarray(expected, dtype)).all()
    for shape in ((2,), (1, 2), (1, 1), ()):
        b = Tensor(np.zeros(shape, dtype), requires_grad=True)
        (x + b).backward(np.ones((3000, 2), dtype))
        assert b.grad.dtype == dtype and (b.grad == np.asarray(6000 / b.size, dtype)).all()
    for f in (ag.max, ag.logsumexp):  # 3,000 equal ones share the gradient
        x.grad = None
        f(x, axis=0).sum().backward()
        assert np.allclose(x.grad.astype(np.float64), 1 / 3000, rtol=4e-3)


def test_whole_numbers_add_up_as_numpys():
    for x in (np.ones(300, bool), np.full(300, 100, np.int8)):
        assert ag.sum(x).item() == x.sum() and ag.sum(x).dtype == x.sum().dtype
        assert ag.mean(x).item() == x.mean()


def test_extreme_inputs():
    x = np.array([-800.0, -40, 0, 40, 800])
    for f, value, slope in (
        (ag.sigmoid, [0, np.exp(-40), 0.5, 1, 1], [0, np.exp(-40), 0.25, np.exp(-40), 0]),
        (ag.log_sigmoid, [-800, -40, np.log(0.5), -np.exp(-40), 0], [1, 1, 0.5, np.exp(-40), 0]),
    ):
        t = Tensor(x, requires_grad=True)
        y = f(t)
        y.sum().backward()
        assert np.allclose(y.data, value, rtol=1e-12, atol=1e-300)
        assert np.allclose(t.grad, slope, rtol=1e-10, atol=1e-16 if f is ag.sigmoid else 1e-300)
    t = Tensor(np.array([[1e4, 1e4, -np.inf], [-np.inf, -np.inf, -np.inf]]), requires_grad=True)
    y = ag.logsumexp(t)
    y.sum().backward()
    assert np.allclose(y.data, [1e4 + np.log(2), -np.inf])
    assert np.array_equal(t.grad, [[0.5, 0.5, 0], [0, 0, 0]])
    assert ag.logsumexp(np.array([1.0, np.inf])).item() == np.inf


def test_kinks_and_ties():
    x = Tensor(np.array([0.0, 1.0, 1.0]), requires_grad=True)
    ag.relu(x).sum().backward()
    assert np.array_equal(x.grad, [0, 1, 1])
    x.grad = None
    x.max().backward()
    assert np.array_equal(x.grad, [0, 0.5, 0.5])
    for f in (ag.maximum, ag.minimum):
        a, b = Tensor(np.ones(2), requires_grad=True), Tensor(np.ones(2), requires_grad=True)
        f(a, b).sum().backward()
        assert np.array_equal(a.grad, [1, 1])
        assert np.array_equal(b.grad, [0, 0])


def test_clip_lets_its_bounds_through_and_power_0_is_flat():
    x = Tensor(np.array([-1.0, -0.5, 0.0, 0.5, 1.0]), requires_grad=True)
    ag.clip(x, low=-0.5, high=0.5).sum().backward()
    assert np.array_equal(x.grad, [0, 1, 1, 1, 0])
    x.grad = None
    (x**0).sum().backward()
    assert np.array_equal(x.grad, np.zeros(5))


def test_where_drops_even_an_infinite_gradient():
    x, y = leaf(3), leaf(3)
    z = ag.where(x, y, condition=np.array([True, False, True]))
    z.backward(np.array([np.inf, np.nan, 2.0]))
    assert np.array_equal(x.grad, [np.inf, 0, 2])
    assert np.array_equal(y.grad, [0, np.nan, 0], equal_nan=True)


def test_what_does_not_pass_is_dropped_even_if_it_is_not_finite():
    x = np.array([-np.inf, -1, 1, np.inf, np.nan])
    assert np.array_equal(ag.relu(x).data, [0, 0, 1, np.inf, np.nan], equal_nan=True)
    g = np.array([np.nan, -np.inf, 2, np.inf, np.inf])
    for f, passes in (
        (ag.relu, [False, False, True, True, False]),
        (lambda x: ag.clip(x, low=-1.0, high=5.0), [False, True, True, False, False]),
        (lambda x: ag.maximum(x, 0.0), [False, False, True, True, False]),
        (lambda x: ag.maximum(0.5, x), [False, False, True, True, True]),
        (lambda x: ag.minimum(x, 0.0), [True, True, False, False, False]),
        (lambda x: ag.minimum(0.5, x), [True, True, False, False, True]),
    ):
        t = Tensor(x, requires_grad=True)
        f(t).backward(g)
        assert np.array_equal(t.grad, np.where(passes, g, 0), equal_nan=True)


def test_where_does_not_let_a_nan_through():
    x = Tensor(np.array([0.0, 4.0]), requires_grad=True)
    positive = x.data > 0
    ag.where(ag.log(ag.where(x, 1.0, condition=positive)), 0.0, condition=positive).sum().backward()
    assert np.array_equal(x.grad, [0, 0.25])


# ------------------------------------------------------------------ what is kept, and when it is freed


def test_a_graph_is_freed_as_it_is_consumed():
    alive = []

    @op
    def keeps(x):
        kept = x * 2
        alive.append(weakref.ref(kept))
        return kept + 1, (lambda g: (alive_before_me.append(sum(r() is not None for r in alive)), g * kept)[1],)

    alive_before_me = []
    y = leaf(8)
    for _ in range(4):
        y = keeps(y)
    y.sum().backward()
    gc.disable()
    try:
        assert alive_before_me == [4, 3, 2, 1]
        assert all(r() is None for r in alive)
    finally:
        gc.enable()


def test_an_activation_that_no_way_back_names_is_freed_at_once():
    x = leaf(1000)
    y = x + 1.0
    middle = weakref.ref(y.data)
    z = y + 2.0
    del y
    assert middle() is None
    z.sum().backward()
    assert np.array_equal(x.grad, np.ones(1000))


def test_a_dropped_graph_is_freed_without_backward():
    x = leaf(1000)
    y = ag.exp(x)
    kept = weakref.ref(y.data)
    z = y * 2.0
    del y, z
    assert kept() is None


def test_a_long_chain_needs_no_recursion():
    x = leaf(1)
    y = x
    for _ in range(20_000):
        y = y + 1.0
    y.sum().backward()
    assert x.grad[0] == 1
    for _ in range(25_000):
        y = y * 1.0 + x
    del y  # freeing must not recurse either


def test_a_second_backward_is_an_error_and_changes_nothing():
    x = leaf(3)
    y = ag.exp(x)
    loss, other = y.sum(), (y * y).sum()
    loss.backward()
    before = x.grad.copy()
    with pytest.raises(RuntimeError, match="exp was consumed by an earlier backward"):
        other.backward()
    with pytest.raises(RuntimeError, match="consumed"):
        loss.backward()
    assert np.array_equal(x.grad, before)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x, y: x + y, 0),
        (lambda x, y: x - y, 0),
        (lambda x, y: x.reshape(6), 0),
        (lambda x, y: x.sum(0), 0),
        (lambda x, y: x.mean(), 0),
        (lambda x, y: x.transpose(1, 0), 0),
        (lambda x, y: x * 2.0 + 1.0, 0),
        (lambda x, y: x[1], 0),
        (lambda x, y: ag.split(x, sizes=(1, 2))[0], 0),
        (lambda x, y: ag.concat(x, y), 0),
        (lambda x, y: F.dropout(x, p=0.5, seed=0), 0),
        (lambda x, y: x * y, 2),
        (lambda x, y: x * y.data, 1),
        (lambda x, y: ag.exp(x), 1),
        (lambda x, y: x @ y.transpose(1, 0), 2),
        (lambda x, y: F.linear(x, y), 2),
        (lambda x, y: F.linear(x, y.data), 1),
        (lambda x, y: F.linear(x.data, y), 1),
        (lambda x, y: checkpoint(lambda a: ag.exp(ag.exp(ag.exp(a))), x), 1),
    ],
)
def test_what_an_op_keeps(f, expected):
    x, y = leaf(2, 3), leaf(2, 3)
    assert len(saved_arrays(f(x, y))) == expected


def test_the_memory_report_names_ops_and_counts_memory_once():
    x = leaf(10, 10)
    y = ag.exp(x)
    report = saved_report((y * y).sum())
    lines = [line.split() for line in report.splitlines()]
    assert ["mul", "1", "800"] in lines  # one array, named twice
    assert ["exp", "1", "800"] in lines
    assert ["distinct", "memory", "1", "800"] in lines


# ------------------------------------------------------------------ no_grad


def test_no_grad_records_nothing_and_ends():
    x = leaf(3)
    with no_grad():
        y = ag.exp(x)
        with no_grad():
            pass
        z = ag.exp(x)
    assert not y.requires_grad
    assert not z.requires_grad
    assert ag.exp(x).requires_grad
    with pytest.raises(ZeroDivisionError), no_grad():
        _ = 1 / 0
    assert ag.exp(x).requires_grad

    @no_grad()
    def evaluate():
        return ag.exp(x)

    assert not evaluate().requires_grad


def test_no_grad_is_a_matter_of_one_thread():
    x, seen = leaf(3), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append(ag.exp(x).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


# ------------------------------------------------------------------ checkpoint


def block(x, w, b):
    return F.dropout(F.rms_norm(ag.tanh(F.linear(x, w)) + x, b), p=0.3, seed=5)


def test_checkpoint_is_bit_equal_with_dropout():
    arrays = [rng.standard_normal(s).astype(np.float32) for s in ((4, 6), (6, 6), (6,))]
    results = []
    for f in (block, lambda *inputs: checkpoint(block, *inputs)):
        x, w, b = (Tensor(a, requires_grad=True) for a in arrays)
        y = f(f(x, w, b), w, b)
        (y * y).sum().backward()
        results.append([y.data, x.grad, w.grad, b.grad])
    for plain, again in zip(*results, strict=True):
        assert np.array_equal(plain, again)


def test_checkpoint_gives_parameters_their_gradient_when_no_activation_needs_one():
    x, w, b = rng.standard_normal((4, 6)), leaf(6, 6), leaf(6)
    checkpoint(block, x, w, b).sum().backward()
    expected_w, expected_b = leaf(6, 6), leaf(6)
    block(x, expected_w, expected_b).sum().backward()
    assert np.array_equal(w.grad, expected_w.grad)
    assert np.array_equal(b.grad, expected_b.grad)


def test_checkpoint_refuses_a_tensor_that_would_lose_its_gradient():
    x, w = leaf(4, 6), leaf(6, 6)
    with pytest.raises(RuntimeError, match=r"input 1 of linear .* is not among checkpoint's inputs"):
        checkpoint(lambda x: F.linear(x, w), x)
    with no_grad():  # where none is lost
        checkpoint(lambda x: F.linear(x, w), x)


def test_nested_checkpoints_tuples_and_unused_inputs():
    x, unused = leaf(3), leaf(2)

    def inner(a):
        return ag.exp(a)

    def outer(a, b):
        return checkpoint(inner, a) * a, a + 1.0, Tensor(np.ones(2))

    y, z, constant = checkpoint(outer, x, unused)
    backward([y, z, constant], [np.ones(3), np.full(3, 2.0), np.ones(2)])
    e = np.exp(x.data)
    assert np.allclose(x.grad, e * x.data + e + 2, rtol=1e-14)
    assert np.array_equal(unused.grad, np.zeros(2))


def test_backward_through_a_checkpoint_may_run_under_no_grad():
    x = leaf(3)
    y = checkpoint(ag.exp, x)
    with no_grad():
        y.backward(np.ones(3))
    assert np.array_equal(x.grad, np.exp(x.data))


def test_checkpoint_keeps_only_its_inputs():
    x = leaf(100)
    with_it = saved_arrays(checkpoint(lambda a: ag.exp(ag.tanh(ag.exp(a))), x))
    assert [array.shape for _, array in with_it] == [(100,)]
    assert np.shares_memory(with_it[0][1], x.data)


# ------------------------------------------------------------------ errors


def test_errors_say_what_is_wrong():
    x = leaf(2, 3)
    with pytest.raises(ValueError, match=r"starts from a scalar, and this has shape \(2, 3\)"):
        x.backward()
    with pytest.raises(ValueError, match=r"the gradient has shape \(3,\), the Tensor \(2, 3\)"):
        x.backward(np.ones(3))
    with pytest.raises(RuntimeError, match="nothing with requires_grad=True"):
        Tensor(np.ones(())).backward()
    with pytest.raises(TypeError, match="only floats can have a gradient, and this array is int64"):
        Tensor(np.arange(3), requires_grad=True)
    with pytest.raises(TypeError, match="cut the graph"):
        Tensor(x)
    for misuse in (lambda: np.asarray(x), lambda: np.mean(x), lambda: np.exp(x)):
        with pytest.raises(TypeError):
            misuse()
    with pytest.raises(ValueError, match="do not add up to axis -1"):
        ag.split(x, sizes=(1, 1))
    with pytest.raises(ValueError, match="matmul takes matrices"):
        ag.matmul(x, np.ones(3))
    with pytest.raises(TypeError, match=r"^embedding: input 0 is a list; give an array, as np\.array\(\.\.\.\)$"):
        F.embedding([0, 1], x)
    with pytest.raises(ValueError, match=r"gather: id 3 at position \(1, 0\) is outside \[0, 3\)"):
        ag.gather(x, ids=np.array([[0], [3]]))


def test_a_wrong_way_back_is_named():
    @op
    def forgets(x, y):
        return x + y, lambda g: (g, None)

    @op
    def misshapes(x):
        return x * 1.0, (lambda g: g.sum(0),)

    with pytest.raises(RuntimeError, match=r"way back of forgets gave input 1 of shape \(2, 3\) no gradient"):
        forgets(leaf(2, 3), leaf(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match=r"way back of misshapes gave input 0 of shape \(2, 3\) a gradient of shape"):
        misshapes(leaf(2, 3)).sum().backward()
