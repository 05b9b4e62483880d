"""
One number per op: for random u and v, <u, vjp(v)> must equal <J u, v>, with J u by central differences.

Both directions are random. A cotangent of ones would make every row of g equal and hide an op that reads the wrong row.
"""

import numpy as np

from minillm.autograd import Tensor, backward

RTOL, ATOL = 1e-5, 1e-7

worst_errors = {}  # name -> [largest relative error, number of checks], for `pytest --errors`


def note_error(name, error):
    """Remember an error for the table that `pytest --errors` prints at the end."""
    worst, count = worst_errors.get(name, (0.0, 0))
    worst_errors[name] = max(worst, float(error)), count + 1


def tensors_of(result):
    return result if isinstance(result, tuple) else (result,)


def is_float(x):
    return x is not None and np.asarray(x).dtype.kind == "f"


def vjp(f, inputs, cotangents):
    """(outputs, gradients) of f at inputs; None for inputs that are not floats."""
    leaves = [Tensor(x.copy(), requires_grad=True) if is_float(x) else x for x in inputs]
    outputs = tensors_of(f(*leaves))
    backward(outputs, cotangents)
    gradients = [_gradient(x) if isinstance(x, Tensor) else None for x in leaves]
    return [o.data for o in outputs], gradients


def _gradient(leaf):
    return np.zeros_like(leaf.data) if leaf.grad is None else leaf.grad  # None: no path leads to it


def output_like(f, inputs):
    return [t.data for t in tensors_of(f(*inputs))]


def gradcheck(f, *inputs, rng, rtol=RTOL, atol=ATOL):
    """Assert that f's gradient is right in float64 and return the largest relative error over inputs and directions.

    f takes the inputs as Tensors or arrays and returns a Tensor or a tuple of them. Each input is checked alone, along
    a random direction, so that an error in one can not hide behind another's size; then all of them together.
    """
    inputs = [np.asarray(x, np.float64) if is_float(x) else x for x in inputs]
    outputs = output_like(f, inputs)
    cotangents = [rng.standard_normal(o.shape) for o in outputs]
    values, gradients = vjp(f, inputs, cotangents)
    for value, out in zip(values, outputs, strict=True):
        assert np.array_equal(value, out, equal_nan=True), "recording changes the result"
    floats = [i for i, x in enumerate(inputs) if is_float(x)]
    worst = 0.0
    for chosen in [*([i] for i in floats), floats]:
        directions = {i: rng.standard_normal(inputs[i].shape) for i in chosen}
        eps = 1e-5 * max(1.0, *(np.abs(inputs[i]).max(initial=0) for i in chosen))

        def along(step, directions=directions):
            moved = [x + step * directions[i] if i in directions else x for i, x in enumerate(inputs)]
            return sum((o * v).sum() for o, v in zip(output_like(f, moved), cotangents, strict=True))

        # Richardson: the eps^2 error cancels, which matters where a norm divides by something small
        coarse, fine = ((along(h) - along(-h)) / (2 * h) for h in (eps, eps / 2))
        numeric = (4 * fine - coarse) / 3
        analytic = sum((directions[i] * gradients[i]).sum() for i in chosen)
        # what the two would be without cancellation among their terms, so that a sum near 0 is judged fairly
        size = sum(np.abs(directions[i] * gradients[i]).sum() for i in chosen)
        error = abs(analytic - numeric)
        assert error <= atol + rtol * max(abs(numeric), abs(analytic)) + 1e-9 * size, (
            f"input {chosen}: analytic {analytic:.12g}, numeric {numeric:.12g}"
        )
        worst = max(worst, error / max(abs(numeric), abs(analytic), size, 1e-3))
    return worst
