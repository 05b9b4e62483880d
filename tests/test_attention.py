"""Attention's own promises: who sees whom; packing, padding, caching; rows that see nothing; extreme scores."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import autograd as ag
from minillm import functional as F
from minillm.autograd import Tensor
from minillm.kernels.attention import TILE
from tests.gradcheck import gradcheck

LENGTHS = [1, 2, 5, TILE - 1, TILE, TILE + 1, 2 * TILE + 1]


def draw(rng, B, Tq, Tk, H, Hk, D, dtype=np.float64):
    return [rng.standard_normal(s).astype(dtype) for s in ((B, Tq, H, D), (B, Tk, Hk, D), (B, Tk, Hk, D))]


def results(q, k, v, start=None, cotangent=None, scale=None):
    """[o, dq, dk, dv]"""
    q, k, v = (Tensor(x, requires_grad=True) for x in (q, k, v))
    o = F.attention(q, k, v, start=start, scale=scale)
    o.backward(np.random.default_rng(7).standard_normal(o.shape).astype(o.dtype) if cotangent is None else cotangent)
    return [o.data, q.grad, k.grad, v.grad]


def by_the_definition(q, k, v, start):
    """One query at a time, in plain loops."""
    (B, Tq, H, D), (Tk, Hk) = q.shape, k.shape[1:3]
    o = np.zeros_like(q)
    for b, i, h in itertools.product(range(B), range(Tq), range(H)):
        seen = [j for j in range(Tk) if start[b, i] <= j <= i + Tk - Tq]
        if seen:
            s = np.array([q[b, i, h] @ k[b, j, h // (H // Hk)] for j in seen]) / np.sqrt(D)
            p = np.exp(s - s.max())
            o[b, i, h] = (p / p.sum()) @ v[b, seen, h // (H // Hk)]
    return o


@settings(max_examples=40)
@given(
    st.sampled_from([(1, 1), (2, 5), (5, 5), (1, 67), (63, 65), (66, 66), (3, 64)]),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]),
    st.sampled_from([1, 2, 5, 24, 64]),
    st.integers(0, 2**32 - 1),
)
def test_it_is_the_definition(lengths, heads, D, seed):
    rng = np.random.default_rng(seed)
    (Tq, Tk), (H, Hk) = lengths, heads
    q, k, v = draw(rng, 2, Tq, Tk, H, Hk, D)
    start = np.sort(rng.integers(0, Tk + 1, (2, Tq)), 1).astype(np.int32)
    assert np.allclose(F.attention(q, k, v, start=start).data, by_the_definition(q, k, v, start), rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", LENGTHS)
def test_the_gradient_at_tile_borders(T):
    rng = np.random.default_rng(T)
    for Tq in sorted({T, max(1, T - 1), 1}):
        q, k, v = draw(rng, 1, Tq, T, 4, 2, 5)
        start = np.sort(rng.integers(0, T + 1, (1, Tq)), 1).astype(np.int32)
        gradcheck(lambda q, k, v, s=start: F.attention(q, k, v, start=s, scale=0.3), q, k, v, rng=rng)


@pytest.mark.parametrize("T", [5, TILE + 1, 2 * TILE + 1])
def test_causality_bit_for_bit(T):
    """What comes after token t moves nothing at t or before, and no gradient flows there from before."""
    rng = np.random.default_rng(0)
    q, k, v = draw(rng, 2, T, T, 4, 2, 8, np.float32)
    before = F.attention(q, k, v).data
    for t in (0, T // 2, T - 2):
        changed = [x.copy() for x in (q, k, v)]
        for x in changed:
            x[:, t + 1 :] = rng.standard_normal(x[:, t + 1 :].shape)
        assert np.array_equal(F.attention(*changed).data[:, : t + 1], before[:, : t + 1])
        cotangent = np.zeros_like(q)
        cotangent[:, : t + 1] = rng.standard_normal(cotangent[:, : t + 1].shape)
        _, dq, dk, dv = results(q, k, v, cotangent=cotangent)
        assert not dq[:, t + 1 :].any()
        assert not dk[:, t + 1 :].any()
        assert not dv[:, t + 1 :].any()


def test_packed_documents_equal_separate_ones():
    rng = np.random.default_rng(1)
    lengths = [3, TILE + 2, 1, 20]
    documents = [draw(rng, 1, n, n, 4, 2, 8) for n in lengths]
    packed = [np.concatenate(parts, 1) for parts in zip(*documents, strict=True)]
    ends = np.cumsum(lengths)
    start = np.repeat(ends - lengths, lengths)[None].astype(np.int32)
    cotangent = rng.standard_normal(packed[0].shape)
    together = results(*packed, start=start, cotangent=cotangent)
    for document, first, last in zip(documents, ends - lengths, ends, strict=True):
        alone = results(*document, cotangent=cotangent[:, first:last])
        for whole, one in zip(together, alone, strict=True):
            assert np.allclose(whole[:, first:last], one, rtol=0, atol=1e-13)


def test_left_padding_equals_the_row_alone_and_junk_there_changes_no_bit():
    rng = np.random.default_rng(2)
    T, pads = TILE + 9, [0, 5, TILE, TILE + 3]
    q, k, v = draw(rng, 4, T, T, 2, 2, 8, np.float32)
    start = np.repeat(np.array(pads, np.int32)[:, None], T, 1)
    cotangent = rng.standard_normal(q.shape).astype(np.float32)
    for b, pad in enumerate(pads):
        cotangent[b, :pad] = 0
    first = results(q, k, v, start, cotangent)
    for b, pad in enumerate(pads):
        alone = results(q[b : b + 1, pad:], k[b : b + 1, pad:], v[b : b + 1, pad:], None, cotangent[b : b + 1, pad:])
        for whole, one in zip(first, alone, strict=True):
            assert np.allclose(whole[b, pad:], one[0], rtol=1e-5, atol=1e-5)
            assert not whole[b, :pad].any()
        for x in (q, k, v):
            x[b, :pad] = 1e6 * rng.standard_normal(x[b, :pad].shape)
    for plain, junk in zip(first, results(q, k, v, start, cotangent), strict=True):
        assert np.array_equal(plain, junk)


@pytest.mark.parametrize("T", [7, TILE + 6])
def test_queries_after_a_cache_equal_the_whole(T):
    rng = np.random.default_rng(3)
    q, k, v = draw(rng, 2, T, T, 4, 2, 8)
    start = np.array([[0] * T, [3] * T], np.int32)
    whole = F.attention(q, k, v, start=start).data
    for split in range(T):
        part = F.attention(q[:, split:], k, v, start=start[:, split:]).data
        assert np.allclose(part, whole[:, split:], rtol=0, atol=1e-13)


def test_sliding_window():
    rng = np.random.default_rng(4)
    T, window = TILE + 20, 7
    q, k, v = draw(rng, 1, T, T, 1, 1, 4)
    start = np.maximum(np.arange(T) - window + 1, 0)[None].astype(np.int32)
    assert np.allclose(F.attention(q, k, v, start=start).data, by_the_definition(q, k, v, start), rtol=0, atol=1e-13)
    _, _, dk, _ = results(
        q, k, v, start, np.where(np.arange(T)[None, :, None, None] == T - 1, 1.0, 0.0) * np.ones_like(q)
    )
    assert not dk[:, : T - window].any()
    assert dk[:, T - window :].all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_see_nothing_are_zero_and_so_is_their_gradient(dtype):
    rng = np.random.default_rng(5)
    T = TILE + 3
    q, k, v = draw(rng, 2, T, T, 2, 1, 8, dtype)
    start = np.full((2, T), T, np.int32)  # row 0 sees nothing anywhere
    start[1, :-2] = 0
    o, dq, dk, dv = results(q, k, v, start)
    assert all(np.isfinite(x).all() for x in (o, dq, dk, dv))
    for x in (o[0], dq[0], dk[0], dv[0], o[1, -2:], dq[1, -2:]):
        assert not x.any()
    assert o[1, :-2].any()


def test_extreme_scores():
    """1e4 apart, equal to the last bit, and all of them huge: the largest takes all, or they share."""
    T = 5
    q, k = np.full((1, T, 1, 4), 100.0), np.zeros((1, T, 1, 4))
    v = np.arange(T, dtype=np.float64).reshape(1, T, 1, 1) * np.ones((1, T, 1, 4))
    k[0, 2] = 50.0  # q . k = 2e4, scaled 1e4
    for dtype in (np.float32, np.float64):
        o, dq, dk, dv = results(q.astype(dtype), k.astype(dtype), v.astype(dtype))
        assert np.allclose(o[0, :, 0, 0], [0, 0.5, 2, 2, 2], atol=1e-6)
        assert all(np.isfinite(x).all() for x in (dq, dk, dv))
        k_all = np.full_like(k, 50.0).astype(dtype)
        o = F.attention(q.astype(dtype), k_all, v.astype(dtype)).data
        assert np.allclose(o[0, :, 0, 0], np.arange(T) / 2, rtol=1e-6)


def test_a_nan_comes_out_where_it_went_in_and_only_there():
    rng = np.random.default_rng(6)
    q, k, v = draw(rng, 1, 10, 10, 2, 2, 4, np.float32)
    q[0, 3, 1] = np.nan
    o = F.attention(q, k, v).data
    assert np.isnan(o[0, 3, 1]).all()
    assert np.isnan(o).sum() == 4


def test_views_of_a_fused_projection():
    rng = np.random.default_rng(8)
    B, T, H, Hk, D = 2, 9, 4, 2, 6
    fused = rng.standard_normal((B, T, (H + 2 * Hk) * D))

    def attend(x):
        q, k, v = ag.split(x, sizes=(H * D, Hk * D, Hk * D))
        return F.attention(q.reshape(B, T, H, D), k.reshape(B, T, Hk, D), v.reshape(B, T, Hk, D))

    gradcheck(attend, fused, rng=rng)


def test_the_reference_can_be_forced(monkeypatch):
    rng = np.random.default_rng(9)
    q, k, v = draw(rng, 2, 70, 70, 4, 2, 8)
    fast = results(q, k, v)
    monkeypatch.setenv("MINILLM_KERNELS", "reference")
    for a, b in zip(fast, results(q, k, v), strict=True):
        assert not np.array_equal(a, b)  # another way of adding up
        assert np.allclose(a, b, rtol=0, atol=1e-10)


def test_errors_name_the_shapes():
    rng = np.random.default_rng(10)
    q, k, v = draw(rng, 1, 3, 4, 4, 2, 8)
    for arguments, message in (
        ((q, k[:, :2], v[:, :2]), "3 queries but only 2 keys"),
        ((q[:, :, :3], k, v), r"q \(1, 3, 3, 8\) does not go with k \(1, 4, 2, 8\)"),
        ((q, k, v[:, :3]), "does not go with"),
        ((q[..., :6], k, v), "does not go with"),
    ):
        with pytest.raises(ValueError, match=message):
            F.attention(*arguments)
    for start, message in (
        (np.zeros((1, 4), np.int32), r"start has shape \(1, 4\), the queries \(1, 3\)"),
        (np.array([[0, 2, 1]]), "never decrease, and row 0 falls from 2 to 1 at query 2$"),
        (np.array([[-1, 0, 0]]), "must be >= 0 and never decrease, and row 0 begins at -1$"),
        (np.array([[3, 2, 2]], np.uint8), "row 0 falls from 3 to 2 at query 1$"),
        (np.array([[0, 2**63, 1]], np.uint64), f"row 0 falls from {2**63} to 1 at query 2$"),
    ):
        with pytest.raises(ValueError, match=message):
            F.attention(q, k, v, start=start)
    for dtype in (float, bool, np.float32):
        with pytest.raises(TypeError, match=f"^attention: start must be whole numbers, and is {np.dtype(dtype)}$"):
            F.attention(q, k, v, start=np.zeros((1, 3), dtype))


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "u4", "i8", "u8"])
def test_any_whole_numbers_are_a_start_and_those_beyond_the_keys_see_nothing(dtype):
    q, k, v = draw(np.random.default_rng(12), 1, 3, 5, 2, 2, 4)
    last = int(np.iinfo(dtype).max)  # would be another number in 32 bits
    start = np.array([[0, 2, last]], dtype)
    plain = np.array([[0, 2, 5]], np.int32)
    for ours, expected in zip(results(q, k, v, start), results(q, k, v, plain), strict=True):
        assert np.array_equal(ours, expected)
    assert F.checked_start(start, 1, 3, q).dtype == np.int32


def test_no_queries_and_no_batch():
    rng = np.random.default_rng(11)
    for B, Tq, Tk in ((0, 3, 3), (2, 0, 3), (2, 0, 0)):
        o, dq, dk, dv = results(*draw(rng, B, Tq, Tk, 2, 2, 4))
        assert o.shape == dq.shape == (B, Tq, 2, 4)
        assert not dk.any()
        assert not dv.any()
