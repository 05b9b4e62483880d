"""Published PyTorch inputs and outputs: masked attention, RoPE, 1,000 AdamW steps. They are data, not part of this
repository; where the folder `shared` is not beside it, these tests have nothing to compare with."""

from pathlib import Path

import numpy as np
import pytest

from minillm import functional as F
from minillm.kernels.adamw import schedule_for, step_inplace

VECTORS = Path(__file__).parents[2] / "shared" / "data" / "vectors" / "torch_sdpa_rope_adamw.npz"
pytestmark = pytest.mark.skipif(not VECTORS.exists(), reason="the PyTorch vectors are not beside this checkout")


@pytest.fixture(scope="module")
def stored():
    return np.load(VECTORS)


def test_attention_over_the_keys_of_a_mask(stored):
    q, k, v, mask = (stored[f"sdpa_{name}"] for name in ["q", "k", "v", "mask"])
    for b, i in np.ndindex(*q.shape[:2]):
        seen = mask[b, i]
        o = F.attention(q[b, i][None, None, None], k[b, seen][None, :, None], v[b, seen][None, :, None])
        assert np.allclose(o.data[0, 0, 0], stored["sdpa_expected"][b, i], rtol=1e-5, atol=1e-6)


def test_rope_up_to_the_pairing(stored):
    """The vectors pair neighbours (0, 1), (2, 3), ...; ours pairs d with d + D/2: the same up to a permutation."""
    x, positions = stored["rope_in"], stored["rope_pos"]
    cos, sin = F.rope_table(positions.max() + 1, x.shape[-1], theta=float(stored["rope_theta"]))
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], -1)[:, :, None]
    y = F.rope(halves, cos=cos[positions], sin=sin[positions]).data[:, :, 0]
    ours = np.stack(np.split(y, 2, -1), -1).reshape(x.shape)
    assert np.allclose(ours, stored["rope_expected_interleaved"], rtol=1e-5, atol=1e-6)


def test_a_thousand_adamw_steps(stored):
    """A regression y = w x on the targets (x0 + x1, -x2) with the squared error, one sample a step."""
    lr, weight_decay, beta1, beta2, eps = map(float, stored["adamw_lr_wd_b1_b2_eps"])
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-5)):
        w = stored["adamw_w0"].astype(dtype)
        m, v = np.zeros_like(w), np.zeros_like(w)
        for step, x in enumerate(stored["adamw_x"].astype(dtype), 1):
            g = 2 * np.outer(w @ x - np.array([x[0] + x[1], -x[2]]), x).astype(dtype)
            schedule = schedule_for(w, lr, beta1, beta2, weight_decay, step)
            step_inplace(w, m, v, g, schedule, beta1=beta1, beta2=beta2, eps=eps)
        assert np.abs(w - stored["adamw_expected_after_1000"]).max() < tolerance
