"""What the transformer's ops promise beyond their gradients: exact tables, named bad ids, seeded dropout, dtypes."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import functional as F
from minillm.autograd import Tensor
from minillm.kernels import device
from tests.fake_cupy import installed

rng = np.random.default_rng(0)


# ------------------------------------------------------------------ embedding and ids


def test_repeated_ids_add_up():
    weight = Tensor(rng.standard_normal((5, 3)), requires_grad=True)
    g = rng.standard_normal((2, 3, 3))
    ids = np.array([[4, 4, 0], [4, 1, 0]])
    y = F.embedding(ids, weight)
    assert np.array_equal(y.data, weight.data[ids])
    y.backward(g)
    assert np.allclose(weight.grad[4], g[0, 0] + g[0, 1] + g[1, 0], rtol=1e-15)
    assert np.allclose(weight.grad[0], g[0, 2] + g[1, 2], rtol=1e-15)
    assert not weight.grad[2:4].any()


@pytest.mark.parametrize(("bad", "shown"), [(5, "id 5"), (-1, "id -1"), (10**9, "id 1000000000")])
def test_a_bad_id_is_named(bad, shown):
    ids = np.array([[0, 1, 2], [3, bad, 4]])
    message = rf"{shown} at position \(1, 1\) is outside \[0, 5\)"
    logits, hidden, weight = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4))
    for call in (
        lambda: F.embedding(ids, weight),
        lambda: F.cross_entropy(logits, ids),
        lambda: F.token_logprobs(logits, ids),
        lambda: F.linear_cross_entropy(hidden, weight, ids),
        lambda: F.linear_token_logprobs(hidden, weight, ids),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_arrays_stay_on_the_host_or_say_what_they_need():
    x = np.ones(3)
    assert device.to_device(x, "cpu") is x
    assert device.to_host(x) is x
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', not 'gpu'"):
        device.to_device(x, "gpu")
    for other, kind in (([0, 1], "list"), (None, "NoneType"), (Tensor(x), "Tensor")):
        for call in (lambda other=other: device.beside(other, x), lambda other=other: device.xp_of(other)):
            with pytest.raises(TypeError, match=f"^an array has to be NumPy's or CuPy's, and this is a {kind}$"):
                call()


def test_on_a_gpu_a_bad_id_is_a_flag_read_later():
    with installed() as cupy:
        ids = cupy.asarray(np.array([1, 7, 2]))
        with cupy.allow_synchronize(False):
            device.check_ids("embedding", ids, 5)  # does not wait, so does not raise
            device.check_ids("embedding", ids[:1], 5)
        with pytest.raises(ValueError, match=r"embedding: id 7 at position \(1\) is outside \[0, 5\)"):
            device.raise_flags()
        device.raise_flags()  # said once
        device.check_ids("embedding", ids, 5)
        with pytest.raises(ValueError, match="id 7"):  # and not put off for ever
            for _ in range(300):
                device.check_ids("embedding", ids[:1], 5)
        before = device.Later(ids)  # tells of what was checked before it, and not of what came later
        device.check_ids("embedding", ids, 5)
        assert before.get().tolist() == [1, 7, 2]
        with pytest.raises(ValueError, match="id 7"):
            device.Later(ids).get()


# ------------------------------------------------------------------ linear, norms, activations


def test_linear_takes_the_activations_dtype_and_gives_the_weight_its_own():
    x = Tensor(rng.standard_normal((2, 3)).astype(np.float32), requires_grad=True)
    w, b = Tensor(rng.standard_normal((4, 3)), requires_grad=True), Tensor(rng.standard_normal(4), requires_grad=True)
    y = F.linear(x, w, b)
    assert y.dtype == np.float32
    y.backward(np.ones((2, 4), np.float32))
    assert x.grad.dtype == np.float32
    assert w.grad.dtype == b.grad.dtype == np.float64
    with pytest.raises(ValueError, match=r"x \(2, 3\) has width 3, weight \(4, 5\) takes 5"):
        F.linear(x, np.ones((4, 5)))


def test_a_bias_may_be_left_out_none_or_named():
    x, w, b = rng.standard_normal((2, 3)), rng.standard_normal((4, 3)), rng.standard_normal(4)
    for call, bias in (
        (lambda x, w, b: F.linear(x, w), None),
        (lambda x, w, b: F.linear(x, w, None), None),
        (lambda x, w, b: F.linear(x, w, bias=None), None),
        (lambda x, w, b: F.linear(x, w, b), b),
        (lambda x, w, b: F.linear(x, w, bias=b), b),
        (lambda x, w, b: F.linear(bias=b, weight=w, x=x), b),
    ):
        leaf = Tensor(b, requires_grad=True)
        y = call(Tensor(x, requires_grad=True), w, leaf)
        y.backward(np.ones((2, 4)))
        assert np.allclose(y.data, x @ w.T + (0 if bias is None else bias), rtol=1e-14)
        assert (leaf.grad is None) if bias is None else np.array_equal(leaf.grad, np.full(4, 2.0))
    with pytest.raises(TypeError, match="linear needs its input 'weight'"):
        F.linear(x)


def test_norms_against_their_definition():
    x = 5 + 3 * rng.standard_normal((4, 7))
    w, b = rng.standard_normal((2, 7))
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * w
    assert np.allclose(F.rms_norm(x, w, eps=1e-2).data, rms, rtol=1e-14)
    standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2)
    assert np.allclose(F.layer_norm(x, w, b, eps=1e-2).data, standard * w + b, rtol=1e-13)


def test_shapes_that_do_not_go_together_are_refused_before_a_kernel_reads_past_an_end():
    x, logits, hidden = np.ones((2, 7)), np.ones((2, 3, 5)), np.ones((2, 3, 4))
    calls = [
        (lambda: F.rms_norm(x, np.ones(8)), r"rms_norm: weight \(8,\) does not go with x \(2, 7\)"),
        (lambda: F.layer_norm(x, np.ones(7), np.ones(1)), r"layer_norm: bias \(1,\) does not go with x"),
        (lambda: F.cross_entropy(logits, np.zeros((2, 4), int)), r"targets \(2, 4\) must have one entry per token"),
        (lambda: F.token_logprobs(logits, np.zeros(6, int)), r"targets \(6,\) must have one entry per token"),
        (lambda: F.linear_cross_entropy(hidden, np.ones((5, 4)), np.zeros((3, 2), int)), r"and there are \(2, 3\)"),
        (lambda: F.linear_token_logprobs(hidden, np.ones((5, 4)), np.zeros(1, int)), "one entry per token"),
        (lambda: F.cross_entropy(logits, np.zeros((2, 3), int), weights=np.ones(5)), r"weights \(5,\) must have one"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="ids must be whole numbers, and these are float64"):
        F.embedding(np.ones((5, 3)), np.zeros((2, 3), int))  # the other way round


def test_inputs_of_two_dtypes_are_refused_in_one_line():
    x = np.ones((1, 2, 3, 4), np.float32)
    for other in (np.float16, np.float64):
        y, name = x.astype(other), np.dtype(other).name
        with pytest.raises(TypeError, match=f"^swiglu: .* one dtype, and gate is float32, up is {name}$"):
            F.swiglu(x, y)
        with pytest.raises(TypeError, match=f"^attention: .* one dtype, and q is {name}, k is float32, v is float32$"):
            F.attention(y, x, x)


def test_norms_of_a_row_of_zeros():
    x = Tensor(np.zeros((2, 8)), requires_grad=True)
    for y in (F.rms_norm(x, np.ones(8)), F.layer_norm(x, np.ones(8), np.ones(8))):
        x.grad = None
        y.backward(rng.standard_normal((2, 8)))
        assert np.isfinite(y.data).all()
        assert np.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_where_exp_overflows(dtype):
    x = np.array([-1e4, -100, -30, 0, 30, 100, 1e4], dtype)
    for f in (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")):
        t = Tensor(x, requires_grad=True)
        y = f(t)
        y.backward(np.ones_like(x))
        assert np.allclose(y.data, np.maximum(x, 0), atol=1e-10)
        assert np.allclose(t.grad, [0, 0, 0, 0.5, 1, 1, 1], atol=1e-10)


def test_gelu_and_its_tanh_form():
    x = np.linspace(-6, 6, 101)
    exact = np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    assert np.allclose(F.gelu(x).data, exact, rtol=1e-13)
    difference = np.abs(F.gelu(x, approximate="tanh").data - exact).max()
    assert 1e-5 < difference < 1e-3
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', not 'erf'"):
        F.gelu(x, approximate="erf")
    with pytest.raises(ValueError, match=r"gate \(101,\) and up \(100,\)"):
        F.swiglu(x, x[1:])


def test_the_slope_of_gelu_keeps_its_digits_where_it_is_small():
    x = np.linspace(-8, 6, 101)
    t = Tensor(x, requires_grad=True)
    F.gelu(t).backward(np.ones_like(x))
    exact = [math.erfc(-v / math.sqrt(2)) / 2 + v * math.exp(-v * v / 2) / math.sqrt(2 * math.pi) for v in x]
    assert np.allclose(t.grad, exact, rtol=1e-12, atol=0)


def test_softmax_of_extreme_rows():
    x = Tensor(np.array([[1e4, 1e4, -np.inf], [-np.inf, -np.inf, -np.inf], [0, 1e4, 0]]), requires_grad=True)
    y = F.softmax(x)
    y.backward(rng.standard_normal((3, 3)))
    assert np.array_equal(y.data, [[0.5, 0.5, 0], [0, 0, 0], [0, 1, 0]])
    assert np.isfinite(x.grad).all()
    assert not x.grad[1].any()


def test_softmax_of_16_bits_adds_up_in_32():
    x = rng.standard_normal((4, 3000)).astype(np.float16)
    y = F.softmax(x).data
    wide = np.exp(x.astype(np.float64))
    assert y.dtype == np.float16
    assert np.allclose(y, wide / wide.sum(-1, keepdims=True), rtol=1e-3, atol=6e-8)
    for dtype in (np.float16, ml_dtypes.bfloat16):  # the gradient of a sum that is always 1
        x = Tensor(np.zeros((4096, 2), dtype), requires_grad=True)
        F.softmax(x, axis=0).backward(np.ones((4096, 2), dtype))
        assert x.grad.dtype == dtype and not x.grad.any()


def test_silu_and_swiglu_of_one_number():
    for dtype in (np.float32, np.float64, np.float16):
        x, y = np.array(1.5, dtype), np.array(-2.0, dtype)
        for f, inputs in ((F.silu, (x,)), (F.swiglu, (x, y))):
            alone, row = ([Tensor(a.reshape(shape), requires_grad=True) for a in inputs] for shape in ((), (1,)))
            one, other = f(*alone), f(*row)
            one.backward()
            other.backward()
            assert one.shape == () and one.item() == other.item()
            assert [a.grad for a in alone] == [a.grad.item() for a in row]


# ------------------------------------------------------------------ dropout


def test_dropout_is_seeded_scaled_and_independent():
    x = np.ones((200, 500))
    y = F.dropout(x, p=0.3, seed=1).data
    assert set(np.unique(y)) == {0.0, 1 / 0.7}
    assert np.array_equal(y, F.dropout(x, p=0.3, seed=1).data)
    n, kept = x.size, (y != 0).mean()
    assert abs(kept - 0.7) < 4 * math.sqrt(0.21 / n)
    for axis in (0, 1):  # neighbours agree as often as independent coins do
        differ = np.diff(y != 0, axis=axis)
        assert abs(differ.mean() - 0.42) < 4 * math.sqrt(0.5 / differ.size)
    assert np.array_equal(y, F.dropout(x, p=0.3, seed=np.int64(1)).data)
    others = [F.dropout(x, p=0.3, seed=s).data != 0 for s in (2, 3, 12345678901234567890)]
    for other in others:
        assert abs((other == (y != 0)).mean() - 0.58) < 4 * math.sqrt(0.25 / n)


def test_dropout_drops_the_gradient_where_it_dropped_the_value():
    x = Tensor(np.full((50, 50), 2.0), requires_grad=True)
    y = F.dropout(x, p=0.5, seed=3)
    y.backward(np.full((50, 50), 5.0))
    assert np.array_equal(x.grad, np.where(y.data != 0, 10.0, 0.0))
    assert np.array_equal(F.dropout(x, p=0.0, seed=3).data, x.data)
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            F.dropout(x, p=p, seed=0)


# ------------------------------------------------------------------ rope


def test_rope_table_is_exact_far_out():
    cos, sin = F.rope_table(100_001, 8, theta=500_000.0)
    assert cos.dtype == np.float32
    for t, d in ((100_000, 0), (99_999, 1), (12_345, 3)):
        angle = t * 500_000.0 ** (-2 * d / 8)
        assert cos[t, d] == np.float32(math.cos(angle))
        assert sin[t, d] == np.float32(math.sin(angle))


def test_rope_scaling():
    plain = np.arccos(F.rope_table(2, 64, dtype=np.float64)[0][1])
    linear = np.arccos(F.rope_table(2, 64, scaling={"type": "linear", "factor": 4.0}, dtype=np.float64)[0][1])
    assert np.allclose(linear, plain / 4, atol=1e-7)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    llama = np.arcsin(F.rope_table(2, 64, scaling=scaling, dtype=np.float64)[1][1])
    wavelength = 2 * math.pi / (10000.0 ** (-np.arange(32) / 32))
    for frequency, before, w in zip(llama, 2 * math.pi / wavelength, wavelength, strict=True):
        if w < 256 / 4:
            assert np.isclose(frequency, before if before < 1 else math.asin(math.sin(before)), rtol=1e-12)
        elif w > 256 / 1:
            assert np.isclose(frequency, before / 8, rtol=1e-12)
        else:
            smooth = (256 / w - 1) / 3
            assert np.isclose(frequency, (1 - smooth) * before / 8 + smooth * before, rtol=1e-12)
    for wrong, told in (
        ({"rope_type": "yarn", "factor": 2.0}, "rope type 'yarn' is not supported; there are"),
        ({"type": ["linear"]}, r"rope type \['linear'\] is not supported"),
        ("linear", "rope scaling must be a dict or None, not 'linear'"),
        ({"type": "linear"}, "rope type 'linear' needs 'factor'"),
        ({"type": "linear", "factor": 0}, "'linear': factor = 0 must be a positive number"),
        ({"type": "linear", "factor": "2"}, "'linear': factor = '2' must be a positive number"),
        ({"type": "linear", "factor": True}, "factor = True must be"),
        (scaling | {"factor": math.nan}, "'llama3': factor = nan must be a positive number"),
        (scaling | {"factor": -8.0}, "factor = -8.0 must be"),
        ({k: v for k, v in scaling.items() if k != "low_freq_factor"}, "'llama3' needs 'low_freq_factor'"),
        (scaling | {"low_freq_factor": 4}, "low_freq_factor 4 must be below high_freq_factor 4.0"),
        (scaling | {"original_max_position_embeddings": 0.5}, "embeddings = 0.5 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            F.rope_table(2, 64, scaling=wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="even head size, and got 7"):
        F.rope_table(2, 7)


@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_rope_is_relative_and_keeps_lengths(offset, seed):
    draw = np.random.default_rng(seed)
    q, k = draw.standard_normal((2, 1, 6, 2, 8))
    cos, sin = F.rope_table(64, 8, dtype=np.float64)

    def scores(offset):
        turned = [F.rope(x, cos=cos, sin=sin, offset=offset).data for x in (q, k)]
        assert np.allclose((turned[0] ** 2).sum(-1), (q**2).sum(-1), rtol=1e-12)
        return np.einsum("bihd,bjhd->bhij", *turned)

    assert np.allclose(scores(offset), scores(0), rtol=0, atol=1e-11)


def test_rope_offset_is_where_the_tokens_stand():
    x = rng.standard_normal((2, 9, 3, 8))
    cos, sin = F.rope_table(9, 8, dtype=np.float64)
    whole = F.rope(x, cos=cos, sin=sin).data
    for offset in range(9):
        assert np.array_equal(F.rope(x[:, offset:], cos=cos, sin=sin, offset=offset).data, whole[:, offset:])
    assert np.array_equal(whole[:, 0], x[:, 0])  # position 0 is not turned at all


@given(st.integers(0, 70_000), st.sampled_from([50_304, 32_000, 131_072, 2_000_000]))
def test_the_chunks_of_a_head_on_a_gpu_are_alike(N, V):
    with installed() as cupy:
        chunks = F._row_chunks(cupy.empty((N, 1), np.float16), V, None)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert sum(sizes) == N and [c.start for c in chunks] == np.cumsum([0, *sizes])[:-1].tolist()
    assert all(size * V * 2 <= max(1 << 30, 4096 * V * 2) for size in sizes)
    assert len(set(sizes[:-1])) <= 1 and all(sizes[0] - size < 256 * len(sizes) for size in sizes)


def test_rope_of_some_heads_copies_the_others():
    rng = np.random.default_rng(3)
    x, g = rng.standard_normal((2, 2, 5, 4, 6))
    cos, sin = F.rope_table(7, 6, dtype=np.float64)
    for heads in range(5):
        fused, parts = (Tensor(x.copy(), requires_grad=True) for _ in range(2))
        y = F.rope(fused, cos=cos, sin=sin, offset=2, heads=heads)
        turned = F.rope(parts[:, :, :heads], cos=cos, sin=sin, offset=2)
        y.backward(g)
        turned.backward(g[:, :, :heads])
        assert np.array_equal(y.data, np.concatenate([turned.data, x[:, :, heads:]], 2))
        assert np.array_equal(fused.grad, np.concatenate([parts.grad[:, :, :heads], g[:, :, heads:]], 2))


def test_rope_errors():
    cos, sin = F.rope_table(4, 8)
    with pytest.raises(ValueError, match="positions up to 5 need a longer table than 4 rows"):
        F.rope(np.zeros((1, 3, 1, 8), np.float32), cos=cos, sin=sin, offset=2)
    with pytest.raises(ValueError, match="head size 6 does not go with a table of width 4"):
        F.rope(np.zeros((1, 3, 1, 6), np.float32), cos=cos, sin=sin)
