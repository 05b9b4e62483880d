"""
The optimizer: AdamW over flat memory, the global gradient norm, learning rates as functions of the step.

A model's parameters are views into one array and their gradients into another (minillm.model), so an update is a few
passes over long runs of memory, whatever the number of parameters.
"""

import math
from typing import NamedTuple

import numpy as np

from .kernels import adamw
from .kernels.device import address, beside, device_of, number, to_host, xp_of


class Run(NamedTuple):
    """Parameters that are neighbours in memory and are treated alike: flat views of data and gradient (n,)."""

    data: object
    grad: object
    decays: bool
    rate: float  # what the learning rate is multiplied by


class Stretch(NamedTuple):
    """Runs that are neighbours in memory, which one call updates: flat arrays (n,), as `step_inplace` takes them."""

    data: object
    m: object
    v: object
    grad: object
    schedule: object  # (runs, 3), the rows of these
    borders: object  # (runs - 1,), where the second and each later one begin; None for one run


def is_matrix(name, parameter):
    """Weight decay pulls matrices toward zero, a scalar head too, and leaves norms and biases alone."""
    return parameter.ndim >= 2


def one_rate(name, parameter):
    """The learning rate as it is, for all."""
    return 1.0


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, alg. 2, with alpha = 1 and eta_t = lr: the decay is
    lr weight_decay, as in PyTorch); equations in kernels/adamw.py.

    parameters    {name: Tensor}; those with requires_grad=False are left alone. A gradient that is None becomes zeros.
    decays        function(name, Tensor) -> whether weight_decay applies to it
    rates         function(name, Tensor) -> what the learning rate is multiplied by for it
    steps         how many updates have been made; on a GPU this waits for it, because only there it is known
    m, v          the moments, flat (n,) in the parameters' dtype, in the order of `parameters`

    On a GPU nothing else waits for it: the gradient's norm is an array there, what is done with it is decided there,
    and so is whether an update is left out, and counted.
    """

    def __init__(
        self, parameters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, decays=is_matrix, rates=one_rate
    ):
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        if not trained:
            raise ValueError("there is no parameter to train: none of them requires a gradient")
        for p in trained.values():
            if p.grad is None:
                p.grad = xp_of(p.data).zeros_like(p.data)
        self.runs = _runs(trained, decays, rates)
        first, size = self.runs[0].data, sum(run.data.size for run in self.runs)
        xp = xp_of(first)
        self.m, self.v = xp.zeros(size, first.dtype), xp.zeros(size, first.dtype)
        self._steps, self._schedule = xp.zeros(1, np.int32), xp.zeros((len(self.runs), 3), first.dtype)
        self.stretches = list(self._stretches(_runs(trained, lambda *_: True, one_rate)))
        self.gradients = [stretch.grad for stretch in self.stretches]  # in as few pieces as there are

    def _stretches(self, alike):
        """`alike`, the runs that there would be if all parameters were treated alike, as Stretches."""
        end, ends = 0, np.cumsum([run.data.size for run in self.runs])
        for data, grad, *_ in alike:
            part = slice(end, end := end + data.size)
            rows = slice(np.searchsorted(ends, part.start, "right"), np.searchsorted(ends, part.stop) + 1)
            borders = ends[rows][:-1] - part.start
            borders = beside(borders, data) if borders.size else None
            if data.size:
                yield Stretch(data, self.m[part], self.v[part], grad, self._schedule[rows], borders)

    @property
    def steps(self):
        return int(to_host(self._steps)[0])

    def step(self, lr=None, scale=1.0):
        """One update. lr: this step's learning rate (the constructor's); scale: multiplies every gradient first, a
        number or an array () on the GPU (`gpu_clip_scale`). Where it is not finite, nothing is changed or counted."""
        self.step_at(beside(self.rates(lr), self.m), scale)

    def rates(self, lr=None):
        """Each run's learning rate and weight decay in an update, for `step_at`: (runs, 2) float64, on the host."""
        lr = self.lr if lr is None else lr
        return np.array([(lr * run.rate, self.weight_decay if run.decays else 0.0) for run in self.runs])

    def step_at(self, rates, scale):
        """`step` with all that is another in each update in arrays beside the parameters: a CUDA graph can hold it."""
        scale, (beta1, beta2) = xp_of(self.m).full(1, scale, self.m.dtype), self.betas
        adamw.advance_inplace(self._schedule, rates, self._steps, scale, beta1=beta1, beta2=beta2)
        for stretch in self.stretches:
            adamw.step_inplace(*stretch, beta1=beta1, beta2=beta2, eps=self.eps, scale=scale)

    def zero_grad(self):
        """Set every gradient to zero, in place."""
        for gradient in self.gradients:
            gradient[...] = 0

    def state_dict(self):
        """What a checkpoint keeps: {"steps", "m", "v"}; the rest is configuration."""
        return {"steps": self.steps, "m": self.m, "v": self.v}

    def load_state_dict(self, state):
        """Go on from `state_dict()`. ValueError: the moments are of other parameters."""
        for name, ours in (("m", self.m), ("v", self.v)):
            theirs = state[name]
            if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
                raise ValueError(f"{theirs.size:,} moments in {theirs.dtype}, not {ours.size:,} in {ours.dtype}")
            ours[...] = xp_of(ours).asarray(theirs)
        self._steps[...] = int(state["steps"])

    def grad_norm(self):
        """The L2 norm of all gradients together, that of one long vector: a float, or on a GPU an array ()."""
        on_host = device_of(self.m) == "cpu"
        return global_norm([run.grad for run in self.runs] if on_host else self.gradients)


def _runs(parameters, decays, rates):
    """`parameters` as Runs: neighbours in memory with the same weight decay and rate become one."""
    spans = []  # [owner of the data, its first element, the one after the last, owner of the gradient, *(decays, rate)]
    for name, p in parameters.items():
        data, begin = _place(name, p.data)
        grad, grad_begin = _place(name, p.grad)
        if p.grad.shape != p.shape or p.grad.dtype != p.dtype:
            raise ValueError(f"the gradient of {name} is not of its shape and dtype")
        kind, last = [bool(decays(name, p)), float(rates(name, p))], spans[-1] if spans else None
        if last and last[0] is data and last[3] is grad and last[2] == begin == grad_begin and last[4:] == kind:
            last[2] += p.size
        elif begin == grad_begin:
            spans.append([data, begin, begin + p.size, grad, *kind])
        else:  # its own memory on one side only
            spans.append([p.data.reshape(-1), 0, p.size, p.grad.reshape(-1), *kind])
    return [Run(data.reshape(-1)[a:b], grad.reshape(-1)[a:b], *kind) for data, a, b, grad, *kind in spans]


def _place(name, array):
    """(the array that owns this memory, the element of it where `array` begins)."""
    owner = array if array.base is None else array.base
    if not (array.flags.c_contiguous and owner.flags.c_contiguous and owner.dtype == array.dtype):
        raise ValueError(f"the optimizer updates contiguous memory, and {name} is not")
    return owner, (address(array) - address(owner)) // array.dtype.itemsize


def global_norm(gradients):
    """sqrt(sum of squares over all arrays): a float, or on a GPU an array () of float64."""
    gradients = list(gradients)
    if gradients and device_of(gradients[0]) == "cuda":
        return xp_of(gradients[0]).sqrt(sum(number(adamw.sum_of_squares(g).reshape(())) for g in gradients))
    return math.sqrt(adamw.host_sum_of_squares(gradients))


def clip_scale(norm, max_norm):
    """What to multiply gradients of this norm by so that they are no longer than max_norm, at most 1. 1 where max_norm
    is None or the norm is not finite: such a step is for the caller to skip, no factor can save it."""
    return max_norm / norm if max_norm is not None and max_norm < norm < math.inf else 1.0


def gpu_clip_scale(norm, max_norm, loss=0.0):
    """clip_scale for AdamW.step of a norm, an array () on a GPU, that nobody waits for: an array () too. But NaN where
    the norm or the loss (another such array, or a float) is not finite: such an update is left out."""
    xp, longest = xp_of(norm), math.inf if max_norm is None else max_norm
    return xp.where(xp.isfinite(norm + loss), xp.minimum(longest / norm, 1.0), math.nan)


def clip_grad_norm(parameters, max_norm):
    """Scale the gradients of {name: Tensor} in place so that their global norm is at most max_norm; the norm before, a
    float, or on a GPU an array ()."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = global_norm(gradients)
    if device_of(norm) == "cuda":
        xp, scale = xp_of(norm), gpu_clip_scale(norm, max_norm)
        scale = xp.where(xp.isnan(scale), 1.0, scale)
    elif (scale := clip_scale(norm, max_norm)) == 1:
        return norm
    for g in gradients:
        g *= scale
    return norm


def cosine_schedule(step, steps, lr=1.0, warmup=0, floor=0.1):
    """The learning rate of step 0 <= step < steps: a linear warm-up over `warmup` steps to lr, then half a cosine down
    from lr at the first step behind it to floor * lr at the last one (Loshchilov and Hutter 2017, eq. 5, with one
    period). Where these are one step, it has lr."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def linear_schedule(step, steps, lr=1.0, warmup=0, floor=0.0):
    """As cosine_schedule, but down a straight line."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * (1 - (1 - floor) * min(1.0, (step - warmup) / max(1, steps - 1 - warmup)))
