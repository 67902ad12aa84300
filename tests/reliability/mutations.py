"""Changes that make hostile files of good ones: of JSON values, of bytes, of arrays and of how arrays are announced."""

from __future__ import annotations

import copy
import io
import json
import struct
from random import Random
from typing import Any

import numpy as np

HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**12, 10**30, 10**400)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 3.5, 1e308, -0.0, float("nan"), float("inf"), *HUGE[:-1],
    "", " ", ".", "..", "../../../tmp/escaped", "/etc/passwd", "a/b", "a\\b", "\0", "posterior", "a" * 10_000, "ä",
    "<f8", "os.system", "pickle", "float64", "_dynamo", "onnx", "float16", "nan",
    [], {}, [[]], [None], [1, "a"], {"": 0}, {"a": {"b": {"c": [1, 2]}}},
    {"class": "Popen", "module": "subprocess"}, {"class": "MetaSSM", "module": "pyro_metassm.models"},
    {"class": "Linear", "module": "torch.nn"}, {"class": "DKF", "module": "pyro_metassm.guides"},
    {"class": "Mixed", "module": "pyro_metassm.likelihoods", "of": {"dict": {"*": 1}}},
    {"float": "nan"}, {"float": "1e5"}, {"tuple": [1, 2]}, {"tuple": 3}, {"dict": {}}, {"dict": []},
    {"__array__": "O", "shape": [1], "data": [{}]}, {"__array__": "<f8", "shape": [10**12], "data": [0]},
    {"__array__": "V1000000000", "shape": [1], "data": [1]},
    {"__array__": "(100000,100000)f4", "shape": [1], "data": [0]},
    {"__array__": "<U1000000000", "shape": [2], "data": ["a", "b"]},
    {"__array__": "<i8", "shape": [1], "data": [10**30]},
    {"__array__": "<f8", "shape": [-1], "data": [1, 2]}, {"__array__": "<f8"},
    {"__array__": "|S1000000000", "shape": [1], "data": ["a"]},
    {"__array__": "<U9", "shape": [2000], "data": ["a" * 10**6, *[""] * 1999]},
    {"__reduce__": ["os.system", ["touch escaped"]]}, {"py/object": "os.system"},
)  # fmt: skip


def json_value(rng: Random, value: Any) -> Any:
    """The value with one to three of its parts changed, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1:
                other, place = rng.choice(places)
                if _has(other, place) and _has(holder, key):
                    holder[key] = copy.deepcopy(other[place])
            case 2 if isinstance(holder, list):
                holder.extend(copy.deepcopy(holder[key : key + 1]) * rng.choice((1, 3, 1000)))
            case 2:
                holder[str(rng.choice(VALUES))[:50]] = holder[key]
            case 3 if isinstance(holder[key], str):
                text = holder[key]
                at = rng.randrange(len(text) + 1)
                holder[key] = text[:at] + rng.choice(("", "\0", "/", "'", "ü", "9" * 9)) + text[at + 1 :]
            case 3 | 4 if isinstance(holder[key], int | float):
                holder[key] = rng.choice(
                    (holder[key] + 1, -holder[key], holder[key] * 1000, rng.choice(HUGE))
                )
            case _:
                holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:200]:
        yield value, key
        yield from _places(item)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def json_text(rng: Random, value: Any) -> bytes:
    """The value as JSON, mostly with changed parts; at times text that is no JSON, or that is hard to read."""
    kind = rng.randrange(20)
    if kind > 4:
        value = json_value(rng, value)
    try:
        text = json.dumps(value).encode()
    except ValueError:  # a number of more digits than Python writes
        text = b'{"a": ' + b"9" * 5000 + b"}"
    match kind:
        case 0:
            depth = rng.choice((50, 900, 2000, 200_000))
            deep = rng.choice((b'{"a":', b"[")) * depth
            return rng.choice((deep, text[:-1] + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"))
        case 1:
            return b'{"a": ' + b"1" * rng.choice((100, 5000)) + b"}"
        case 2:
            return text[: rng.randrange(len(text))]
        case 3:
            return some_bytes(rng, text)
        case 4:
            return rng.choice(
                (b"", b"null", b"[]", b'"a"', b"\xff\xfe", b"NaN", b"{}", b"\x80\x04\x95" + text)
            )
    return text


def some_bytes(rng: Random, data: bytes) -> bytes:
    """Some bytes changed, cut out, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not changed:
            break
        at = rng.randrange(len(changed))
        match rng.randrange(6):
            case 0 | 1 | 2:
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                value = rng.choice(HUGE[:5]) % 2**64
                changed[at : at + 8] = struct.pack("<Q", value)[: len(changed) - at]
            case 4:
                del changed[at : at + rng.choice((1, 4, 100))]
            case 5:
                changed[at:at] = changed[at : at + rng.choice((1, 8, 64))]
    return bytes(changed)


KINDS = (
    "|b1",
    "|u1",
    "<i2",
    "<i8",
    ">i4",
    "<u8",
    "<f2",
    "<f4",
    ">f4",
    "<f8",
    "<f16",
    "<c8",
    "<U3",
    "|S3",
    "<M8[s]",
    "<m8[s]",
)


def array(rng: Random) -> np.ndarray:
    """Any small array."""
    sizes = (0, 1, 1, 2, 3, 4, 5, 9)
    shape = tuple(rng.choice(sizes) for _ in range(rng.choice((0, 1, 1, 2, 3, 3, 3, 4))))
    kind = np.dtype(rng.choice(KINDS))
    raw = bytes(rng.choice((0, 0, 1, 1, 2, 65, 255)) for _ in range(min(64, kind.itemsize)))
    number = int(np.prod(shape)) * kind.itemsize
    if kind.kind == "U":
        return np.full(shape, rng.choice(("", "a", "{}", "ä", "..")), kind)
    return np.frombuffer((raw * (number // max(len(raw), 1) + 1))[:number], kind).reshape(shape).copy()


DESCRIPTIONS = (
    "'|O'", "'|V0'", "'<U0'", "'|S0'", "'<U999999999'", "'|V4'", "'<f8'", "'|u1'", "[('a', '<f4')]", "'f4,f4'",
    "('<f4', (1000, 1000))", "'(100000,100000)f4'", "[('a', '|O')]", "__import__('os')", "'<M8[ns]'", "7", "None",
)  # fmt: skip
SHAPES = (
    "(1000000000000,)", "(-1, 3)", "(-5,)", "(0, 10**30)", f"(0, {10**30})", f"({2**63},)", f"({2**32}, {2**32})", "()",
    "(True,)", "(2.0,)", "3", "None", "(" * 400 + ")" * 400, "(6, 9, 4)", "(1,) * 100", "(" + "1," * 70 + ")",
)  # fmt: skip


def npy(rng: Random, array: np.ndarray) -> bytes:
    """An array as a member of an `.npz`, announced as something else."""
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=False)
    data = out.getvalue()
    if rng.random() < 0.3:
        return some_bytes(rng, data)
    description = rng.choice((repr(array.dtype.str), rng.choice(DESCRIPTIONS)))
    shape = rng.choice((repr(array.shape), rng.choice(SHAPES)))
    order = rng.choice(("False", "False", "True", "1", "None"))
    more = rng.choice(("", "", ", 'more': 1"))
    text = f"{{'descr': {description}, 'fortran_order': {order}, 'shape': {shape}{more}}}\n".encode()
    if rng.random() < 0.05:
        text = rng.choice((b"(" * 9000, b"[" * 60_000, b" " * 60_000, b"{" + b"'a':{" * 2000, b"\xff" * 50))
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    size = len(text) if rng.random() < 0.8 else rng.choice((0, 1, 65535, 2**31, 2**32 - 1))
    length = struct.pack("<H", min(size, 65535)) if version == (1, 0) else struct.pack("<I", size)
    return b"\x93NUMPY" + bytes(version) + length + text + array.tobytes()
