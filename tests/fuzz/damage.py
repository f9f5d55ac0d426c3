"""Damage to files of every kind: bytes, lines of text, values of JSON, headers of safetensors."""

import json
import random
from collections.abc import Callable
from typing import Any

DEEP = 100_000
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 1e308, -1e-9, 0.5, 2**31, 2**63, 10**55),
    *("", "x", "x" * 70_000, "\ud800", "\u2028", "../../etc/passwd", "~", "a\0b", "nan", "\ufeff"),
    *([], {}, [[]], [1, 10**55, 1], ["x"] * 50, {"bits": 4}, {"a": {"b": []}}, [-1], [0, 0, 0]),
    *(float("nan"), float("inf")),
)
"""Values that other programs, or an attacker, may write in place of any."""


def damaged(data: bytes, name: str, rng: random.Random) -> bytes:
    """`data` of a file of this name, damaged in one to three ways."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [_bytes]
    if name.endswith((".json", ".png.json")):
        ways += [_json] * 4
    elif name.endswith(".jsonl"):
        ways += [_lines, _lines, _text]
    elif name.endswith((".txt", ".model.txt")):
        ways += [_text] * 3
    elif name.endswith(".safetensors"):
        ways += [_header] * 4
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(ways)(data, rng)
    return data


def _bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(rng.randrange(1, 2000))
    start = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 600))))
    end = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 64, 512, 5000)))
    part = data[start:end]
    kind = rng.randrange(7)
    if kind == 0:
        return data[:start]
    if kind == 1:
        part = bytes(b ^ (1 << rng.randrange(8)) for b in part)
    elif kind == 2:
        part = b""
    elif kind == 3:
        part = part * rng.choice((2, 3, 50))
    elif kind == 4:
        part = rng.randbytes(len(part))
    elif kind == 5:
        part = bytes([rng.choice((0, 0xFF, 0x7F, 0x80))]) * len(part)
    else:
        part = part + rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * DEEP, b"9" * 5000))
    return data[:start] + part + data[end:]


def _text(data: bytes, rng: random.Random) -> bytes:
    insert = rng.choice(
        (
            *(b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", "\u2028".encode(), "\x85".encode()),
            *(b"\0", b"\x1b[2J", b"# ", b"x" * 100_000, b"\n" * 1000, b"caf\xe9", b"\xed\xa0\x80"),
        )
    )
    at = rng.choice((0, rng.randrange(len(data) + 1)))
    return data[:at] + insert + data[at:]


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = rng.choice((_json, _bytes, lambda *_: b"[" * DEEP, lambda *_: b"null"))(
        lines[at], rng
    )
    return b"\n".join(lines)


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    if rng.random() < 0.03:
        return rng.choice(
            (b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b"1" * 5000, b"\xef\xbb\xbf" + data)
        )
    return json.dumps(edited(values, rng)).encode("utf-8", "surrogatepass")


def edited(values: Any, rng: random.Random) -> Any:
    """JSON values with one of them replaced, removed, added, repeated or moved."""
    places: list[tuple[Any, Any]] = []
    level = [values]
    while level:
        value = level.pop()
        if isinstance(value, dict | list):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            places += [(value, key) for key in keys]
            level += [value[key] for key in keys]
    if not places or rng.random() < 0.03:
        return rng.choice(NASTY)
    inside, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(("unknown", "", "\ud800", "x" * 70_000, str(key) + "s"))] = inside[key]
    elif kind == 2 and isinstance(inside, list):
        inside *= rng.choice((2, 100))
    elif kind == 3:
        inside[key] = [inside[key]]
    elif kind == 4 and isinstance(inside[key], int | float):
        inside[key] = rng.choice(
            (-inside[key], inside[key] * 2, inside[key] + 1, inside[key] * 1000)
        )
    else:
        inside[key] = rng.choice(NASTY)
    return values


def _header(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    try:
        values = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return _bytes(data, rng)
    kind = rng.randrange(6)
    names = [name for name in values if name != "__metadata__"] if isinstance(values, dict) else []
    if kind == 0 and names:
        entry = values[rng.choice(names)]
        if isinstance(entry, dict):
            entry["dtype"] = rng.choice(
                ("F8_E4M3", "F8_E5M2", "F4", "F64", "I64", "U8", "BOOL", "F16", "BF16", "F32", "?")
            )
    elif kind == 1 and names:
        name = rng.choice(names)
        values[rng.choice((name + ".x", "lora_A", "a" * 70_000, ""))] = values.pop(name)
    elif kind == 2:
        sizes = (0, 1, length - 1, length + 1, 2**31, 2**62, 2**64 - 1)
        return rng.choice(sizes).to_bytes(8, "little") + data[8:]
    else:
        values = edited(values, rng)
    header = json.dumps(values).encode("utf-8", "surrogatepass")
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
