"""
A Jinja environment for somebody else's chat template: it can reach its arguments alone, and can not take for ever.

    environment = Sandbox()
    tree = metered(environment.parse(source))
    with allowance(source, [messages, variables]):
        text = environment.from_string(tree).render(messages=messages, **variables)

Jinja's sandbox keeps a program from attributes and files, but not from "x" * 10**9 or a loop in a loop in a loop. Here
every step has a price in units of about one character or 20 ns, and is paid *before* it is done: turns of a loop,
calls, texts that grow, values that are compared, printed or searched. Who has no units left is stopped, at the same
step on every machine. The allowance grows with the template and with what it is given: a long conversation is no fault.

Filters that nobody needs for a chat, and whose work is hard to foretell, are left out (LEFT_OUT).
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, KeysView, Mapping, Sized, ValuesView
from contextvars import ContextVar

import jinja2
from jinja2 import nodes
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

LONGEST_SOURCE = 1 << 16  # characters of a template; the longest on the hub have some 30,000
MOST_PARTS = 10_000  # nodes of its tree, because compiling takes time, too
STEP = 50  # units of a call, or of a turn of a loop
PIECE = 64  # units of a new object, an item of a list
LOOK = 20  # units of looking at an object
AT_LEAST, PER_CHARACTER, PER_SOURCE = 5_000_000, 100, 10
LONGEST_NUMBER = 4096  # bits
LONGEST_TEXT, TEXT_PER_CHARACTER = 1_000_000, 20  # what it may write

LEFT_OUT = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
CHEAP_FILTERS = ("attr", "count", "d", "default", "first", "last", "length")
LAZY_FILTERS = ("batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice")
COSTLY_TESTS = ("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan",
                "lower", "lt", "ne", "upper")  # fmt: skip
PAY, WEIGH = "(pay)", "(weigh)"  # filters that `metered` puts into a template, under names that nobody can write

_left = ContextVar("_left")


class TooMuch(jinja2.TemplateRuntimeError):
    """A template asks for more work than its allowance has."""

    def __init__(self):
        super().__init__("it takes far more work or text than its conversation needs")


@contextlib.contextmanager
def allowance(source, data):
    """What a template may spend in this block, as a dict; `data` is what it is given. ValueError: it is too long."""
    if len(source) > LONGEST_SOURCE:
        raise ValueError(f"the chat template has {len(source):,} characters, and {LONGEST_SOURCE:,} are the most")
    size = sum(_sizes(data))
    messages = max((len(part) for part in data if isinstance(part, list | tuple)), default=0)
    left = AT_LEAST + PER_CHARACTER * size + PER_SOURCE * len(source) * (1 + messages)
    token = _left.set({"units": left, "text": LONGEST_TEXT + len(source) + TEXT_PER_CHARACTER * size})
    try:
        yield _left.get()
    finally:
        _left.reset(token)


def pay(units):
    """Take so many units from the allowance; True. TooMuch: there are not so many left."""
    left = _left.get()
    left["units"] -= units
    if left["units"] < 0:
        raise TooMuch
    return True


def weigh(value):
    """`value`, after paying for all that is in it, however often: what comparing or printing it costs."""
    if type(value) is str:
        pay(len(value))
    else:
        for size in _sizes(value):
            pay(size)
    return value


def _sizes(value):
    """The size of everything in a value. A value may hold another one twice, and that one a third one twice: this is a
    generator, so that who adds up may stop. TooMuch: a number that nobody needs."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str | bytes):
            yield LOOK + len(value)
        elif isinstance(value, int):
            if value.bit_length() > LONGEST_NUMBER:
                raise TooMuch
            yield LOOK
        elif isinstance(value, Namespace):
            waiting.append(value._Namespace__attrs)  # which it prints
        elif isinstance(value, Mapping):
            yield LOOK * (1 + len(value))
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | KeysView | ValuesView | type({}.items())):
            yield LOOK * (1 + len(value))
            waiting += value
        else:
            yield LOOK * (1 + (len(value) if isinstance(value, range) else 0))


def _count(value):
    """How many characters or items a value has; 0 where that makes no sense."""
    return len(value) if isinstance(value, Sized) and not isinstance(value, jinja2.Undefined) else 0


def _number(value, default=0):
    return abs(value) if isinstance(value, int) else default


# ------------------------------------------------------------------ what a template is made to pay for


def metered(tree):
    """A parsed template that pays for its loops, macros, comparisons, slices and joins; the tree itself, changed."""
    meter = _Meter()
    meter.visit(tree)
    if meter.parts > MOST_PARTS:
        raise jinja2.TemplateRuntimeError(f"it has {meter.parts:,} parts, and {MOST_PARTS:,} are the most")
    return tree


def _filtered(node, name):
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Meter(NodeTransformer):
    """`parts` is how many nodes there were so far, `cost` that and the characters of the template's own text."""

    def __init__(self):
        self.parts = self.cost = 0

    def generic_visit(self, node):
        self.parts += 1
        self.cost += 1 + (len(node.data) if isinstance(node, nodes.TemplateData) else 0)
        return super().generic_visit(node)

    def _visit_repeated(self, node):
        before = self.cost
        self.generic_visit(node)
        price = nodes.Const(STEP + self.cost - before, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(_filtered(price, PAY), lineno=node.lineno))
        if getattr(node, "test", None) is not None:  # of items that never come into the body
            node.test = nodes.And(_filtered(price, PAY), node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _visit_repeated

    def visit_Compare(self, node):
        self.generic_visit(node)
        for part in (node, *node.ops):
            part.expr = self._weighed(part.expr)
        return node

    def visit_Concat(self, node):
        self.generic_visit(node)
        node.nodes = [self._weighed(part) for part in node.nodes]
        return node

    def visit_Getitem(self, node):
        self.generic_visit(node)
        return _filtered(node, WEIGH) if isinstance(node.arg, nodes.Slice) else node

    def _weighed(self, node):
        return node if isinstance(node, nodes.Const) else _filtered(node, WEIGH)


# ------------------------------------------------------------------ the environment


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as Hugging Face's transformers sets it up, in which everything has its price."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, extensions=()):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", *extensions],
            optimized=False,  # nothing is computed while it is compiled
            finalize=_printed,
        )
        del self.globals["lipsum"]
        self.filters["tojson"] = tojson
        for name in LEFT_OUT:
            del self.filters[name]
        for name in self.filters.keys() - set(CHEAP_FILTERS):
            self.filters[name] = _priced(name, self.filters[name])
        for name in COSTLY_TESTS:
            self.tests[name] = _priced(name, self.tests[name])
        self.filters |= {PAY: pay, WEIGH: weigh}

    def call_binop(self, context, operator, left, right):
        if isinstance(left, str | bytes) and operator == "%":
            _pay_for_percent(left, right)
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int):
                weigh(one)
            pay(_count(one) * (_number(other, 1) if operator == "*" else 1) * (1 if isinstance(one, str) else 8))
        if operator == "**" and isinstance(left, int) and left.bit_length() * _number(right) > LONGEST_NUMBER:
            raise TooMuch
        return super().call_binop(context, operator, left, right)

    def call(__self, __context, __obj, *args, **kwargs):
        pay(STEP)
        if isinstance(__obj, type):
            pay(8 * sum(map(_count, args)))
        elif not isinstance(__obj, Macro):
            args = _pay_for_call(__obj, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        pay(_count(result) if isinstance(result, str | bytes | list | dict) else 0)
        return result

    def wrap_str_format(self, value):
        function = super().wrap_str_format(value)
        if function is None:
            return None
        text = value.__self__

        @functools.wraps(function)
        def run(*args, **kwargs):
            _pay_for_fields(text, text.count("{"), r"\d{4}|:[^}]*\{", [args, kwargs])
            return function(*args, **kwargs)

        return run


@jinja2.pass_context
def _printed(context, value):
    return weigh(value)


def _pay_for_percent(text, values):
    mark = "%" if isinstance(text, str) else b"%"
    _pay_for_fields(text.decode("latin-1") if isinstance(text, bytes) else text, text.count(mark), r"\d{4}|\*", values)


def _pay_for_fields(text, count, wide, values):
    """For a format with `count` fields, each of which may show all values; `wide` finds a width that is too large."""
    if re.search(wide, text):
        raise TooMuch
    pay(len(text) + 1000 * count)
    for size in _sizes(values):
        pay(count * size)


def _pay_for_call(function, args, kwargs):
    """For a call of anything but a macro or a class; the arguments, because what comes only once is in a list then."""
    args = [_listed(arg) for arg in args]
    weigh(args)
    weigh(kwargs)
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, Mapping):
        pay(_count(owner))
    if isinstance(owner, str | bytes):
        if name == "replace" and len(args) >= 2 and isinstance(args[0], type(owner)):
            pay(owner.count(args[0]) * _count(args[1]))
        elif name == "join" and args:
            pay(len(owner) * _count(args[0]))
        elif name == "translate":
            pay(len(owner) * sum(_sizes(args)))
        elif name in ("split", "rsplit", "splitlines"):
            given = args[0] if args and isinstance(args[0], type(owner)) and args[0] else None
            pay(PIECE * (len(owner) // 2 if given is None else owner.count(given)))
        elif name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            pay(sum(map(_number, [*args, *kwargs.values()])) * max(1, len(owner) if name == "expandtabs" else 1))
    elif isinstance(owner, int):
        pay(sum(map(_number, [*args, *kwargs.values()])))  # to_bytes
    elif isinstance(owner, list | tuple):
        weigh(owner)
    return args


def _listed(value):
    """What comes one by one and only once (map, select), as a list."""
    return [item for item in value if pay(STEP)] if isinstance(value, Iterator) else value


def _priced(name, function):
    """A filter or a test that pays for its arguments, and for what it makes of them."""
    context = hasattr(function, "jinja_pass_arg")  # Jinja passes something of its own before the value

    @functools.wraps(function)
    def run(*args, **kwargs):
        values = [_listed(arg) for arg in args[context:]]
        if name in LAZY_FILTERS:
            weigh(values[1:])
            pay((PIECE if values and isinstance(values[0], str) else STEP) * _count(values[0] if values else 0))
        else:
            weigh(values)
        weigh(kwargs)
        if name in _GROWTH:
            pay(_GROWTH[name](*values, **kwargs))
        result = function(*args[:context], *values, **kwargs)
        pay(_count(result) * (1 if isinstance(result, str) else PIECE) if isinstance(result, str | list) else 1)
        if isinstance(result, int):
            weigh(result)
        return result

    return run


def _rounding(value, precision=0, method="common"):
    return 1000 * _number(precision)


def _centering(value, width=80):
    return _number(width)


def _indenting(value, width=4, first=False, blank=False):
    return (str(value).count("\n") + 1) * (_count(width) or _number(width))


def _joining(value, d="", attribute=None):
    return _count(value) * len(str(d))


def _replacing(value, old, new, count=None):
    return str(value).count(str(old)) * len(str(new))


def _batching(value, linecount, fill_with=None):
    return 8 * _number(linecount)


def _slicing(value, slices, fill_with=None):
    return STEP * _number(slices)


def _formatting(value, *args, **kwargs):
    _pay_for_percent(str(value), kwargs or args)
    return 0


def _summing(iterable, attribute=None, start=0):
    if not isinstance(start, int | float):
        raise jinja2.TemplateRuntimeError("sum adds numbers only")
    return 0


# What these make may be longer than all that they are given. Arguments are named as the filters' own.
_GROWTH = {
    "batch": _batching,
    "center": _centering,
    "format": _formatting,
    "indent": _indenting,
    "join": _joining,
    "replace": _replacing,
    "round": _rounding,
    "slice": _slicing,
    "sum": _summing,
}


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers has it: Jinja's own escapes for HTML."""
    settings = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
    if indent is None and separators is None:
        return json.dumps(value, **settings)
    parts = []
    for part in json.JSONEncoder(**settings).iterencode(value):  # an indent of a million is written piece by piece
        pay(len(part))
        parts.append(part)
    return "".join(parts)
