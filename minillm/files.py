"""
Files from elsewhere: strict JSON, and the headers of *.safetensors. Nothing is unpickled, nothing is believed.

What a file claims is checked before memory is taken for it, and what is wrong with it is one ValueError of one line.
"""

import difflib
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

LARGEST_OBJECT = 128 << 20  # bytes of a JSON file; the largest tokenizers have some 30 MB
LARGEST_HEADER = 16 << 20  # bytes of a safetensors header: some 150,000 tensors
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

# ------------------------------------------------------------------ JSON


def parse_json(text):
    """The value that a text spells. ValueError with the reason, in columns (and lines), where it is not JSON.

    Strict: NaN, numbers beyond float64, a key that occurs twice and lone surrogates are no JSON.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg.lower().removesuffix(' at')} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: it is nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:  # a lone surrogate can only come from an escape: the text was valid UTF-8
        _refuse_surrogates(value)
    return value


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r:.60} occurs twice")
    return found


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def _whole(digits):
    if len(digits) > 400:  # beyond float64, and Python takes time that grows with the square
        raise ValueError(f"a whole number of {len(digits):,} digits is too large")
    return int(digits)


def _finite(digits):
    if not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
)


def _refuse_surrogates(value):
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise ValueError(f"lone surrogate U+{code:04X} at character {error.start} of a string") from None
    elif isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_surrogates(part)


def json_type(value):
    """What a value is called in messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def read_text(path, most=LARGEST_OBJECT):
    """The text of a file, without a byte-order mark. FileNotFoundError: there is none. ValueError: it can not be read,
    a folder for example, is larger than `most` bytes, or not UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read(min(most, max(os.fstat(file.fileno()).st_size, 1 << 16)) + 1)  # which is taken at once
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} can not be read: {os.strerror(error.errno).lower()}") from None
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most:,} bytes, the most that such a file may have")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16; convert it to UTF-8")
    try:
        return data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02X} at position {error.start}"
        raise ValueError(f"{path} is not UTF-8 text: {byte}") from None


def read_object(path):
    """The dict in a JSON file. ValueError: as `read_text`, no strict JSON, something else than an object."""
    text = read_text(path)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable JSON object: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a readable JSON object: it is {json_type(found)}")
    return found


def check_keys(values, known, where, foreign=False):
    """ValueError where a dict of our own making has a key that is none of `known`. With `foreign`, others may have
    added keys of their own, and only one that looks like a slip of the pen is refused."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.8 if foreign else 0.6)
            if near or not foreign:
                hint = f"perhaps you meant {near[0]}" if near else f"known are {', '.join(known)}"
                raise ValueError(f"{where}: no key {key!r:.60}; {hint}")


# ------------------------------------------------------------------ *.safetensors


class Stored(NamedTuple):
    """A tensor in a safetensors file: its dtype there ("BF16"), its shape, and where its bytes begin."""

    path: Path
    dtype: str
    shape: tuple
    offset: int

    def map(self):
        """The tensor as a read-only array whose memory is the file's, mapped as long as the array lives."""
        if 0 in self.shape:  # nothing to map
            return np.zeros(self.shape, DTYPES[self.dtype])
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def read_header(path):
    """{name: Stored} of a safetensors file, from its header alone. ValueError where that is not right.

    Checked are the length of the header before it is read, its JSON, every name and dtype; and by the library that
    shapes and offsets agree, and that tensors cover the file without a gap and without lying upon each other.
    """
    return open_safetensors(path)[0]


def open_safetensors(path):
    """({name: Stored}, metadata) of a safetensors file; both as `read_header` says, metadata a dict of strings."""
    again = "fetch or save it again"
    try:
        with open(path, "rb") as file:
            size, there = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if size > min(LARGEST_HEADER, there - 8):
                told = f"a header of {size:,} bytes, and {LARGEST_HEADER:,} are the most" if there - 8 >= size else ""
                told = told or f"it ends before its header does, after {there:,} bytes"
                raise ValueError(f"{path} is not a readable safetensors file: {told}; {again}")
            text = file.read(size).decode()
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path} can not be read: {os.strerror(error.errno).lower()}") from None
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}; {again}") from None
    try:
        header = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable safetensors file: its header: {error}; {again}") from None
    metadata = header.pop("__metadata__", None) or {}
    for name in header:
        if not re.fullmatch(r"[\w.-]{1,500}", name):  # it will stand in messages
            raise ValueError(f"{path}: {name!r:.60} is no name of a tensor")
    return {
        name: Stored(path, tensor["dtype"], tuple(tensor["shape"]), 8 + size + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }, metadata
