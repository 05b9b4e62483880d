"""
Reverse-mode automatic differentiation over NumPy and CuPy arrays. All of it is in this file.

An op is a function of plain arrays that returns its result and the way back:

    @op
    def mul(x, y):
        return x * y, (lambda g: g * y, lambda g: g * x)     # g = dL/dz for z = x * y

The way back is either one function g -> (dx, dy), for gradients that are computed together, or a tuple of functions,
one per input: those of inputs that need no gradient are dropped, with everything they would have kept in memory. What
a way back names is exactly what stays in memory until `backward`; `saved_arrays` shows it.

Positional arguments are inputs (Tensors or arrays), keyword arguments are constants. An op with several results returns
them as a tuple and gets one g for each. An op that names a keyword `needs` is told which inputs need a gradient. A way
back that names a keyword `into` is given the array that its gradient would be added to, where there is one and nothing
else will be added: it may do that itself, and return the array; of a function g -> (dx, dy), `into` has one per input.

First order only: gradients are arrays, not Tensors. Each op's docstring gives its equation, its gradient, what it
keeps, and under `Example:` a call whose sizes are letters: the tests draw thousands of such calls from that line, and
scripts/explain_gradient.py one.
"""

import builtins
import contextlib
import contextvars
import functools
import inspect
import itertools

import numpy as np

from minillm.kernels.device import beside, check_ids, concatenate, joined, upcast, xp_of

_clock = itertools.count()  # a node is born after its parents, so birth order is a topological order

# Whether ops record a way back: "yes", "no" (no_grad), or "inputs only" (inside checkpoint, where a Tensor from outside
# that needs a gradient would lose it without a word).
_recording = contextvars.ContextVar("recording", default="yes")


@contextlib.contextmanager
def _record(mode):
    token = _recording.set(mode)
    try:
        yield
    finally:
        _recording.reset(token)


def no_grad():
    """Context manager or decorator: run ops without recording them, for evaluation, rollouts and frozen models."""
    return _record("no")


class Node:
    """One recorded op: the nodes (or leaf Tensors) it came from, and the way back to them.

    It holds neither its own result nor its parents', only their nodes (and leaf Tensors): an activation that no way
    back names is freed.
    """

    __slots__ = ("born", "op", "outputs", "parents", "way_back")

    def __init__(self, op, parents, way_back, outputs):
        self.op, self.parents, self.way_back, self.outputs = op, parents, way_back, outputs
        self.born = next(_clock)


class Tensor:
    """An array, and where it came from.

    data           the array (NumPy or CuPy)
    requires_grad  whether backward() sends a gradient to it, or through it
    grad           for a leaf: None, or an array of data's shape and dtype that backward() adds into, in place
    """

    __slots__ = ("__weakref__", "born", "data", "grad", "index", "node", "requires_grad")
    __array_ufunc__ = None  # ndarray * Tensor must call Tensor.__rmul__

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor(Tensor) would cut the graph; use tensor.data for the array")
        if not hasattr(data, "dtype") or isinstance(data, np.generic):
            data = np.asarray(data)
        if requires_grad and data.dtype.kind in "iub":
            raise TypeError(f"only floats can have a gradient, and this array is {data.dtype}")
        self.data, self.requires_grad, self.grad = data, requires_grad, None
        self.node, self.index, self.born = None, 0, next(_clock)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)

    def __repr__(self):
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __len__(self):
        return len(self.data)

    def __array__(self, *_, **__):
        raise TypeError("a Tensor is not an array, and NumPy would lose its gradient; use tensor.data for the array")

    def item(self):
        """The one element as a Python number."""
        return self.data.item()

    def backward(self, gradient=None):
        """Add dself/dleaf into leaf.grad for every leaf that requires it. Consumes the graph.

        gradient: dL/dself, an array of self's shape; 1 for a scalar, which needs none.
        """
        if gradient is None:
            if self.size != 1:
                raise ValueError(f"backward() starts from a scalar, and this has shape {self.shape}; give its gradient")
            gradient = xp_of(self.data).ones_like(self.data)
        backward([self], [gradient])


def _source(tensor):
    """What the graph sees of a Tensor: the node that made it, or itself where it is a leaf."""
    return tensor.node or tensor


def _ancestors(tensors):
    """{node or leaf: how many gradients a backward() from these Tensors sends it}."""
    seen = {}
    for source in (_source(t) for t in tensors if t.requires_grad):
        seen[source] = seen.get(source, 0) + 1
    stack = list(seen)
    while stack:
        node = stack.pop()
        if isinstance(node, Node):
            if node.way_back is None:
                raise RuntimeError(
                    f"the graph behind {node.op.__name__} was consumed by an earlier backward(); run the forward again"
                )
            for parent, _ in node.parents:
                if parent is not None:
                    if parent in seen:
                        seen[parent] += 1
                    else:
                        seen[parent] = 1
                        stack.append(parent)
    return seen


def backward(tensors, gradients):
    """Add d(sum_i <tensor_i, gradient_i>)/dleaf into leaf.grad for every leaf that requires it. Consumes the graph."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient.shape != tensor.shape:
            raise ValueError(f"the gradient has shape {gradient.shape}, the Tensor {tensor.shape}")
    if not any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("backward() from a Tensor that nothing with requires_grad=True led to")
    awaited = _ancestors(tensors)  # {node: how many gradients it still gets}
    # {node: {index of its result: (its gradient so far, whether that array was made here)}}. Only a sum made here may
    # be added to in place: what a way back returned may be another node's gradient, or an array that an op keeps.
    pending = {node: {} for node in awaited}

    def send(node, index, g):
        have = pending[node]
        if index not in have:
            have[index] = g, False
        else:
            total, made_here = have[index]
            if made_here:
                total += g
            else:
                total = total + g
            have[index] = total, True
        if isinstance(node, Tensor):  # a leaf: nothing needs to wait for its turn, and the memory of g is free now
            awaited[node] -= 1
            if not awaited[node]:
                _accumulate(node, have.pop(0)[0])

    def buffer_of(parent):
        """The array that the next gradient of a leaf is added to, if it is the leaf's only one, else None."""
        only = isinstance(parent, Tensor) and awaited[parent] == 1 and not pending[parent]
        return parent.grad if only else None

    for tensor, gradient in zip(tensors, gradients, strict=True):
        if tensor.requires_grad:
            send(_source(tensor), tensor.index, gradient)
    for node in sorted(pending, key=lambda n: n.born, reverse=True):
        have = pending.pop(node)
        if isinstance(node, Tensor):
            continue
        op, parents, way_back = node.op, node.parents, node.way_back
        node.parents, node.way_back = (), None  # what it kept is freed as soon as it has run
        xp = xp_of(next(iter(have.values()))[0])
        g = [  # in the dtype of the result it belongs to, whatever the ops above computed in
            have[i][0].astype(dtype, copy=False) if i in have else xp.zeros(shape, dtype)
            for i, (shape, dtype) in enumerate(node.outputs)
        ]
        del have
        found = _run_back(way_back, g, parents, buffer_of)
        for i, ((parent, index), dx) in enumerate(zip(parents, found, strict=True)):
            if parent is not None:
                leaf = isinstance(parent, Tensor)
                if leaf and dx is not None and dx is parent.grad:
                    continue  # it has been added
                send(parent, index, _checked(dx, parent.data.shape if leaf else parent.outputs[index][0], op, i))


def _checked(dx, shape, op, i):
    """dx, the gradient of input i. RuntimeError: the op's way back gave none, or one of another shape."""
    if dx is None or dx.shape != shape:
        got = "no gradient" if dx is None else f"a gradient of shape {dx.shape}"
        raise RuntimeError(f"the way back of {op.__name__} gave input {i} of shape {shape} {got}")
    return dx


def _run_back(way_back, g, parents, buffer_of):
    if not callable(way_back):
        return [
            back and (back(*g, into=buffer_of(parent)) if _adds_itself(back) else back(*g))
            for back, (parent, _) in zip(way_back, parents, strict=True)
        ]
    return way_back(*g, into=[buffer_of(p) for p, _ in parents]) if _adds_itself(way_back) else way_back(*g)


def _adds_itself(back):
    constants = getattr(back, "__kwdefaults__", None)
    return constants is not None and "into" in constants


def _accumulate(leaf, g):
    if leaf.grad is None:  # a copy: an op may hand the same array to two leaves
        leaf.grad = xp_of(leaf.data).array(g, dtype=leaf.dtype)
    else:
        leaf.grad += g


def op(function):
    """Lift a function of arrays, which returns (result, way back), to Tensors. See the head of this file."""
    parameters = inspect.signature(function).parameters
    wants_needs = "needs" in parameters
    names = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    optional = {name for name in names if parameters[name].default is None}

    @functools.wraps(function)
    def lifted(*inputs, **constants):
        # an input may be given by its name, and an optional one that is not given is None
        for name in names[len(inputs) :]:
            if name not in constants and name not in optional:
                raise TypeError(f"{function.__name__} needs its input {name!r}")
            inputs = (*inputs, constants.pop(name, None))
        inputs = _as_tensors(function.__name__, inputs)
        needs = [x is not None and x.requires_grad for x in inputs]
        mode = _recording.get()
        if mode == "inputs only" and any(needs):
            at = needs.index(True)
            raise RuntimeError(
                f"inside checkpoint, input {at} of {function.__name__} (shape {inputs[at].shape}) needs a gradient "
                "but is not among checkpoint's inputs; pass it to checkpoint(f, *inputs)"
            )
        if mode != "yes":
            needs = [False] * len(inputs)
        if wants_needs:
            constants["needs"] = needs
        result, way_back = function(*(None if x is None else x.data for x in inputs), **constants)
        if not any(needs):
            return tuple(map(Tensor, result)) if isinstance(result, tuple) else Tensor(result)
        if not callable(way_back):
            way_back = tuple(back if need else None for back, need in zip(way_back, needs, strict=True))
        parents = tuple((_source(x), x.index) if need else (None, 0) for x, need in zip(inputs, needs, strict=True))
        results = result if isinstance(result, tuple) else (result,)
        node = Node(function, parents, way_back, tuple((r.shape, r.dtype) for r in results))
        tensors = tuple(_made_by(node, i, r) for i, r in enumerate(results))
        return tensors if isinstance(result, tuple) else tensors[0]

    lifted.is_op = True
    return lifted


def _as_tensors(name, inputs):
    """Arrays become Tensors, Python numbers take the dtype of the first Tensor or array, None stays (no such input).
    TypeError for anything else: nobody can tell whether a list holds ids or numbers of that dtype."""
    for i, x in enumerate(inputs):
        if x is not None and not hasattr(x, "dtype") and not isinstance(x, int | float):
            raise TypeError(f"{name}: input {i} is a {type(x).__name__}; give an array, as np.array(...)")
    first = next((x for x in inputs if hasattr(x, "dtype")), None)
    dtype, xp = getattr(first, "dtype", None), np
    if first is not None:
        xp = xp_of(first.data if isinstance(first, Tensor) else first)
    return [
        x if x is None or isinstance(x, Tensor) else Tensor(x if hasattr(x, "dtype") else xp.asarray(x, dtype))
        for x in inputs
    ]


def _made_by(node, index, data):
    tensor = Tensor(data)
    tensor.node, tensor.index, tensor.requires_grad = node, index, True
    return tensor


def checkpoint(f, *inputs):
    """f(*inputs), keeping only the inputs: f runs again on the way back (Chen et al. 2016). Same bits, both ways.

    f takes Tensors and returns a Tensor or a tuple of them, and must do the same each time it is called (dropout takes
    a seed, so it does). Every Tensor that needs a gradient, a block's parameters included, must be among `inputs`: one
    that f reaches in another way is an error.
    """

    def checkpointed(*arrays, needs):
        with _record("inputs only" if _recording.get() != "no" else "no"):
            outputs = f(*(None if a is None else Tensor(a) for a in arrays))
        several = isinstance(outputs, tuple)

        def way_back(*g, into=None):
            leaves = [None if a is None else Tensor(a, requires_grad=n) for a, n in zip(arrays, needs, strict=True)]
            for leaf, array in zip(leaves, into or (), strict=False):
                if leaf is not None:
                    leaf.grad = array
            with _record("yes"):
                again = f(*leaves)
            again = again if several else (again,)
            if any(x.requires_grad for x in again):  # f may not depend on them at all
                backward(again, g)
            return [_gradient_or_zero(x) if n else None for x, n in zip(leaves, needs, strict=True)]

        return tuple(t.data for t in outputs) if several else outputs.data, way_back

    checkpointed.__name__ = f"checkpoint({getattr(f, '__name__', 'f')})"
    return op(checkpointed)(*inputs)


def _gradient_or_zero(leaf):
    return xp_of(leaf.data).zeros_like(leaf.data) if leaf.grad is None else leaf.grad


def saved_arrays(*tensors):
    """What backward() from these Tensors would keep in memory until then: [(op name, array), ...], newest op first.

    The arrays that an op's way back names. An array that several ops keep is listed with each; leaves' own data, which
    is alive anyway, is listed where an op keeps it.
    """
    nodes = [n for n in _ancestors(tensors) if isinstance(n, Node)]
    nodes.sort(key=lambda n: n.born, reverse=True)
    return [(node.op.__name__, array) for node in nodes for array in _arrays_in(node.way_back)]


def saved_report(*tensors):
    """`saved_arrays` as a table in text: arrays and bytes per op, and each memory block once in the last line."""
    rows, blocks = {}, {}
    for name, array in saved_arrays(*tensors):
        block = array
        while getattr(block, "base", None) is not None and hasattr(block.base, "nbytes"):
            block = block.base
        count, size = rows.get(name, (0, 0))
        rows[name] = count + 1, size + array.nbytes
        blocks[id(block)] = block.nbytes
    lines = [f"{'op':<28}{'arrays':>8}{'bytes':>16}"]
    for name, (count, size) in sorted(rows.items(), key=lambda row: -row[1][1]):
        lines.append(f"{name:<28}{count:>8}{size:>16,}")
    return "\n".join([*lines, f"{'distinct memory':<28}{len(blocks):>8}{builtins.sum(blocks.values()):>16,}"])


def _arrays_in(thing, seen=None):
    """The arrays reachable from a closure: through cells, containers, nested functions and partials."""
    seen = set() if seen is None else seen
    if id(thing) in seen or thing is None or isinstance(thing, type):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        thing = thing.data
    if hasattr(thing, "nbytes") and hasattr(thing, "dtype"):
        if thing.ndim or not isinstance(thing, np.generic):
            yield thing
    elif isinstance(thing, tuple | list | set):
        for part in thing:
            yield from _arrays_in(part, seen)
    elif isinstance(thing, dict):
        yield from _arrays_in(list(thing.values()), seen)
    elif isinstance(thing, functools.partial):
        yield from _arrays_in([thing.func, *thing.args, *thing.keywords.values()], seen)
    elif callable(thing):
        for cell in getattr(thing, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # a cell that was never filled
                yield from _arrays_in(cell.cell_contents, seen)
        yield from _arrays_in(getattr(thing, "__defaults__", None), seen)


def unbroadcast(g, shape):
    """The adjoint of broadcasting is summing: reduce g back to `shape`."""
    if g.shape == shape:
        return g
    wide = upcast(g)
    if wide is not g:
        return unbroadcast(wide, shape).astype(g.dtype)
    if g.ndim > len(shape):
        g = g.sum(tuple(range(g.ndim - len(shape))))
    if g.shape == shape:
        return g
    return g.sum(tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1), keepdims=True)


def _passed(g, mask):
    """g where the mask holds, else 0: a product would make NaN of an infinite g that does not pass."""
    return xp_of(g).where(mask, g, g.dtype.type(0))


# ------------------------------------------------------------------ arithmetic


@op
def add(x, y):
    """z = x + y, broadcast.

    dx = g, dy = g, each summed over the axes that broadcasting added.
    Keeps nothing.
    Example: add(randn(A, 1, B), randn(C, B))
    """
    xs, ys = x.shape, y.shape  # a way back keeps what it names: shapes here, not arrays
    return x + y, (lambda g: unbroadcast(g, xs), lambda g: unbroadcast(g, ys))


@op
def sub(x, y):
    """z = x - y, broadcast.

    dx = g, dy = -g, each summed over the axes that broadcasting added.
    Keeps nothing.
    Example: sub(randn(A, 1, B), randn(C, B))
    """
    xs, ys = x.shape, y.shape
    return x - y, (lambda g: unbroadcast(g, xs), lambda g: unbroadcast(-g, ys))


@op
def mul(x, y):
    """z = x y, elementwise, broadcast.

    dx = g y, dy = g x, each summed over the axes that broadcasting added.
    Keeps y for dx and x for dy.
    Example: mul(randn(A, 1, B), randn(C, B))
    """
    xs, ys = x.shape, y.shape
    return x * y, (lambda g: unbroadcast(g * y, xs), lambda g: unbroadcast(g * x, ys))


@op
def div(x, y):
    """z = x / y, elementwise, broadcast.

    dx = g / y, dy = -g z / y (since dz/dy = -x / y^2), each summed over the axes that broadcasting added.
    Keeps y, and z for dy.
    Example: div(randn(A, 1, B), positive(C, B))
    """
    z, xs, ys = x / y, x.shape, y.shape
    return z, (lambda g: unbroadcast(g / y, xs), lambda g: unbroadcast(-g * z / y, ys))


@op
def affine(x, *, scale=1.0, shift=0.0):
    """y = scale x + shift for Python numbers, so that constants cost nothing on the way back.

    dx = scale g.
    Keeps nothing.
    Example: affine(randn(A, B), scale=-1.5, shift=0.25)
    """
    y = x if scale == 1 else scale * x
    if shift != 0 or y is x:  # a result is an array of its own, never x
        y = y + shift
    return y, (lambda g: g if scale == 1 else scale * g,)


@op
def power(x, *, n):
    """y = x^n for a Python number n.

    dx = g n x^(n-1); 0 for n = 0, also at x = 0.
    Keeps x.
    Example: power(positive(A, B), n=2.5)
    """
    return x**n, (lambda g: g * (n * x ** (n - 1)) if n != 0 else g * 0,)


@op
def exp(x):
    """y = e^x.

    dx = g y.
    Keeps y.
    Example: exp(randn(A, B))
    """
    y = xp_of(x).exp(x)
    return y, (lambda g: g * y,)


@op
def log(x):
    """y = ln x.

    dx = g / x.
    Keeps x.
    Example: log(positive(A, B))
    """
    return xp_of(x).log(x), (lambda g: g / x,)


@op
def tanh(x):
    """y = tanh x.

    dx = g (1 - y^2).
    Keeps y.
    Example: tanh(randn(A, B))
    """
    y = xp_of(x).tanh(x)
    return y, (lambda g: g * (1 - y * y),)


@op
def sigmoid(x):
    """y = 1 / (1 + e^-x), computed from e^-|x| so that nothing overflows.

    dx = g y (1 - y).
    Keeps y.
    Example: sigmoid(randn(A, B))
    """
    xp = xp_of(x)
    e = xp.exp(-xp.abs(x))
    y = xp.where(x >= 0, 1, e) / (1 + e)
    return y, (lambda g: g * (y * (1 - y)),)


@op
def log_sigmoid(x):
    """y = ln sigmoid(x) = min(x, 0) - ln(1 + e^-|x|): exact also where sigmoid is 0 or 1 in floating point.

    dx = g sigmoid(-x) = g (1 - e^y).
    Keeps x.
    Example: log_sigmoid(randn(A, B))
    """
    xp = xp_of(x)
    y = xp.minimum(x, 0) - xp.log1p(xp.exp(-xp.abs(x)))

    def back(g):
        e = xp.exp(-xp.abs(x))
        return g * (xp.where(x >= 0, e, 1) / (1 + e))  # sigmoid(-x), without the cancellation of 1 - e^y

    return y, (back,)


@op
def relu(x):
    """y = max(x, 0).

    dx = g where x > 0, else 0 (0 at the kink).
    Keeps one bool per element.
    Example: relu(spread(A, B))
    """
    passes = x > 0
    return xp_of(x).maximum(x, 0), (lambda g: _passed(g, passes),)


@op
def maximum(x, y):
    """z = max(x, y), elementwise, broadcast.

    dx = g where x >= y, dy = g where y > x: a tie goes to x, so that the whole gradient arrives once.
    Keeps one bool per element.
    Example: maximum(spread(A, 1, B), spread(C, B))
    """
    first, xs, ys = x >= y, x.shape, y.shape
    return xp_of(x).maximum(x, y), (
        lambda g: unbroadcast(_passed(g, first), xs),
        lambda g: unbroadcast(_passed(g, ~first), ys),
    )


@op
def minimum(x, y):
    """z = min(x, y), elementwise, broadcast.

    dx = g where x <= y, dy = g where y < x: a tie goes to x, so that the whole gradient arrives once.
    Keeps one bool per element.
    Example: minimum(spread(A, 1, B), spread(C, B))
    """
    first, xs, ys = x <= y, x.shape, y.shape
    return xp_of(x).minimum(x, y), (
        lambda g: unbroadcast(_passed(g, first), xs),
        lambda g: unbroadcast(_passed(g, ~first), ys),
    )


@op
def clip(x, *, low=None, high=None):
    """y = min(max(x, low), high); None leaves a side open.

    dx = g where low <= x <= high, else 0.
    Keeps one bool per element.
    Example: clip(spread(A, B), low=-0.7, high=0.9)
    """
    xp = xp_of(x)
    inside = xp.ones(x.shape, bool)
    if low is not None:
        inside &= x >= low
    if high is not None:
        inside &= x <= high
    return x if low is None and high is None else xp.clip(x, low, high), (lambda g: _passed(g, inside),)


@op
def where(x, y, *, condition):
    """z = x where the bool array condition holds, else y; all broadcast.

    dx = g where condition, else 0; dy = g where not, else 0. What is not chosen has gradient exactly 0, NaN or not.
    Keeps condition.
    Example: where(randn(A, 1, B), randn(C, B), condition=coin(A, C, B))
    """
    xp, xs, ys = xp_of(x), x.shape, y.shape
    condition = beside(condition, x)
    z = xp.where(condition, x, y)
    return z, (
        lambda g: unbroadcast(xp.where(condition, g, g.dtype.type(0)), xs),
        lambda g: unbroadcast(xp.where(condition, g.dtype.type(0), g), ys),
    )


@op
def cast(x, *, dtype):
    """y = x in another float dtype.

    dx = g in x's dtype.
    Keeps nothing.
    Example: cast(randn(A, B), dtype="float64")
    """
    before = x.dtype
    return x.astype(dtype), (lambda g: g.astype(before),)


# ------------------------------------------------------------------ reductions


def _reduced_axes(axis, ndim):
    """The axes of a reduction as a tuple of numbers >= 0: all of them if None."""
    axes = tuple(range(ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    return tuple(a % ndim for a in axes)


def _expand(g, shape, axis, keepdims):
    """g as an array that broadcasts to `shape`: the reduced axes come back with size 1."""
    if keepdims or not shape:
        return g
    axes = _reduced_axes(axis, len(shape))
    return g.reshape(tuple(1 if i in axes else n for i, n in enumerate(shape)))


def _reduced(name, x, axis, keepdims):
    """x.sum(axis) or x.mean(axis), added up in upcast(x), as an array of x's dtype (NumPy's, for whole numbers)."""
    wide = upcast(x)
    y = getattr(wide, name)(axis, keepdims=keepdims)
    return xp_of(x).asarray(y if wide is x else y.astype(x.dtype))


@op
def sum(x, *, axis=None, keepdims=False):
    """y = sum of x over `axis` (all axes if None).

    dx = g, repeated along the axes that were summed.
    Keeps nothing.
    Example: sum(randn(A, B, C), axis=(0, -1))
    """
    xp, shape = xp_of(x), x.shape
    return _reduced("sum", x, axis, keepdims), (lambda g: xp.broadcast_to(_expand(g, shape, axis, keepdims), shape),)


@op
def mean(x, *, axis=None, keepdims=False):
    """y = mean of x over `axis` (all axes if None), over n elements.

    dx = g / n, repeated along the axes that were averaged.
    Keeps nothing.
    Example: mean(randn(A, P, Q), axis=-1)
    """
    xp, shape = xp_of(x), x.shape
    y = _reduced("mean", x, axis, keepdims)
    n = builtins.max(x.size, 1) / builtins.max(y.size, 1)
    return y, (lambda g: xp.broadcast_to(_expand(g / n, shape, axis, keepdims), shape),)


@op
def max(x, *, axis=None, keepdims=False):
    """y = max of x over `axis` (all axes if None).

    dx = g at the largest elements, 0 elsewhere; k elements that tie get g / k each (the subgradient of least norm).
    Keeps one bool per element.
    Example: max(spread(A, P, Q), axis=1)
    """
    xp, shape = xp_of(x), x.shape
    y = x.max(axis, keepdims=True)
    chosen = x == y
    if not keepdims:
        y = y.squeeze(axis)

    def back(g):
        g = upcast(g)  # 16 bits can not count the elements that tie
        return _expand(g, shape, axis, keepdims) * (chosen / chosen.sum(axis, keepdims=True, dtype=g.dtype))

    return xp.asarray(y), (back,)


@op
def logsumexp(x, *, axis=-1, keepdims=False):
    """y = ln sum e^x over one axis, shifted by the maximum m so that nothing overflows.

    dx = g softmax(x), since dy/dx_j = e^x_j / sum e^x = e^((x_j - m) - (y - m)). If all x are -inf, y is, and dx = 0.
    Keeps x, and m and y - m.
    Example: logsumexp(randn(A, P, B), axis=1)
    """
    xp = xp_of(x)
    m = upcast(x.max(axis, keepdims=True))
    m = xp.where(xp.isfinite(m), m, x.dtype.type(0))
    total = xp.exp(x - m).sum(axis, keepdims=True)
    log_total = xp.log(xp.where(total == 0, 1, total))
    y = xp.where(total == 0, -xp.inf, m + log_total).astype(x.dtype)

    def back(g):
        return (g if keepdims else xp.expand_dims(g, axis)) * xp.exp(x - m - log_total)

    return y if keepdims else y.squeeze(axis), (back,)


# ------------------------------------------------------------------ linear algebra and shape


@op
def matmul(x, y):
    """z = x y for matrices, batched over leading axes, which broadcast.

    dx = g y^T, dy = x^T g: z_ij = sum_k x_ik y_kj, so x_ik meets g_ij through y_kj for every j.
    Keeps y for dx and x for dy.
    Example: matmul(randn(A, 1, M, K), randn(C, K, N))
    """
    if x.ndim < 2 or y.ndim < 2:
        raise ValueError(f"matmul takes matrices, and got shapes {x.shape} and {y.shape}")
    xs, ys = x.shape, y.shape
    return x @ y, (
        lambda g: unbroadcast(g @ y.swapaxes(-1, -2), xs),
        lambda g: unbroadcast(x.swapaxes(-1, -2) @ g, ys),
    )


@op
def reshape(x, *, shape):
    """y = x with another shape, in the same order.

    dx = g with x's shape.
    Keeps nothing.
    Example: reshape(randn(A, P, B), shape=(A * P, B))
    """
    back = x.shape
    return x.reshape(shape), (lambda g: g.reshape(back),)


@op
def transpose(x, *, axes=None):
    """y = x with its axes in another order (reversed if None).

    dx = g with the axes put back.
    Keeps nothing.
    Example: transpose(randn(A, B, C), axes=(2, 0, 1))
    """
    axes = tuple(reversed(range(x.ndim))) if axes is None else tuple(a % x.ndim for a in axes)
    back = tuple(axes.index(i) for i in range(x.ndim))
    return x.transpose(axes), (lambda g: g.transpose(back),)


@op
def getitem(x, *, index):
    """y = x[index] for NumPy's basic and advanced indexing.

    dx[index] += g, and an element that was picked twice gets both gradients.
    Keeps index.
    Example: getitem(randn(P, Q, B), index=(ids(P, N), slice(None, None, -1)))
    """
    shape, parts = x.shape, index if isinstance(index, tuple) else (index,)
    index = tuple(beside(i, x) if isinstance(i, np.ndarray) else i for i in parts)
    # Slices, whole numbers and masks pick nothing twice; lists and arrays of ids may.
    may_repeat = any(isinstance(i, list) or getattr(i, "dtype", np.dtype(bool)) != np.dtype(bool) for i in parts)

    def back(g):
        xp, g = xp_of(g), upcast(g)  # CuPy adds no bfloat16 here
        dx = xp.zeros(shape, g.dtype)
        if may_repeat:
            xp.add.at(dx, index, g)  # `dx[index] += g` would keep only the last of several picks
        else:
            dx[index] = g
        return dx

    return x[index], (back,)


@op
def gather(x, *, ids, axis=-1):
    """y = x taken at ids along one axis, elsewhere position by position (NumPy's take_along_axis).

    dx has g added at every place it was taken from; a place taken twice gets both gradients.
    Keeps ids.
    Example: gather(randn(A, P), ids=ids(P, A, N), axis=-1)
    """
    xp, shape = xp_of(x), x.shape
    axis = axis % x.ndim
    check_ids("gather", ids, shape[axis])
    ids = beside(ids, x)

    def back(g):
        g = upcast(g)
        dx = xp.zeros(shape, g.dtype)
        # g's own position on every axis but the one that ids index, and 0 where x was broadcast
        places = (xp.arange(n) if n == m else xp.zeros(n, int) for n, m in zip(g.shape, shape, strict=True))
        at = list(xp.meshgrid(*places, indexing="ij", sparse=True))
        at[axis] = ids
        xp.add.at(dx, tuple(at), g)
        return dx

    return xp.take_along_axis(x, ids, axis), (back,)


@op
def concat(*inputs, axis=-1):
    """y = the inputs one after another along an axis.

    dx_i = the part of g where x_i stands.
    Keeps nothing.
    Example: concat(randn(A, P, B), randn(A, Q, B), axis=1)
    """
    ends = np.cumsum([x.shape[axis] for x in inputs]).tolist()

    def part(first, last, ndim):
        return lambda g: g[(slice(None),) * (axis % ndim) + (slice(first, last),)]

    backs = (part(first, last, inputs[0].ndim) for first, last in zip([0, *ends], ends, strict=False))
    return concatenate(inputs, axis), tuple(backs)


@op
def split(x, *, sizes, axis=-1):
    """y_1, y_2, ... = x cut along an axis into pieces of these sizes (views, not copies).

    dx = the g's one after another (zeros for a piece that was not used); no copy where they lie so already, as those of
    q|k|v from attention do and those of gate|up from swiglu.
    Keeps nothing.
    Example: split(randn(A, 3, B), sizes=(1, 2), axis=1)
    """
    if builtins.sum(sizes) != x.shape[axis]:
        raise ValueError(f"split sizes {tuple(sizes)} do not add up to axis {axis} of shape {x.shape}")
    xp, cuts = xp_of(x), np.cumsum(sizes).tolist()[:-1]
    return tuple(xp.split(x, cuts, axis)), lambda *g: (joined(g, axis),)


# ------------------------------------------------------------------ operators


def _binary(function, with_number, reflected):
    """The methods x . y and y . x. A number stays a Python number, so that it takes the array's dtype."""

    def forwards(x, y):
        return with_number(x, float(y)) if isinstance(y, int | float | np.number) else function(x, y)

    def backwards(x, y):
        return reflected(x, float(y)) if isinstance(y, int | float | np.number) else function(y, x)

    return forwards, backwards


Tensor.__add__, Tensor.__radd__ = _binary(add, lambda x, y: affine(x, shift=y), lambda x, y: affine(x, shift=y))
Tensor.__sub__, Tensor.__rsub__ = _binary(
    sub, lambda x, y: affine(x, shift=-y), lambda x, y: affine(x, scale=-1, shift=y)
)
Tensor.__mul__, Tensor.__rmul__ = _binary(mul, lambda x, y: affine(x, scale=y), lambda x, y: affine(x, scale=y))
Tensor.__truediv__, Tensor.__rtruediv__ = _binary(
    div, lambda x, y: affine(x, scale=1 / y), lambda x, y: affine(power(x, n=-1), scale=y)
)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda x, y: matmul(y, x)
Tensor.__neg__ = lambda x: affine(x, scale=-1)
Tensor.__pow__ = lambda x, n: power(x, n=n)
Tensor.__getitem__ = lambda x, index: getitem(x, index=index)
Tensor.sum = lambda x, axis=None, keepdims=False: sum(x, axis=axis, keepdims=keepdims)
Tensor.mean = lambda x, axis=None, keepdims=False: mean(x, axis=axis, keepdims=keepdims)
Tensor.max = lambda x, axis=None, keepdims=False: max(x, axis=axis, keepdims=keepdims)
Tensor.reshape = lambda x, *shape: reshape(x, shape=shape[0] if isinstance(shape[0], tuple) else shape)
Tensor.transpose = lambda x, *axes: transpose(x, axes=axes or None)
