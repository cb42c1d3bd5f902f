"""Damage to files: what a bad disk, a cut download or an attacker may leave of a checkpoint."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40,
           2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 5, 64, 2**31, 2**63, 2**70, 1.5, -0.0, 1e308, "", "x", "F32", "U8", "I64",
                           "F4", "nf4", "float64", [], [0], [-1, 4], [2**40, 2**40], [1] * 70, {}, {"a": 1})  # fmt: skip


def mutate(rng: random.Random, folder: Path) -> str:
    """Damages one file of ``folder``; returns what was done, for the message of a failing test."""
    files = sorted(p for p in folder.iterdir() if p.stat().st_size)
    if not files:
        return "nothing is left"
    file = rng.choice(files)
    if rng.random() < 0.02:
        file.unlink()
        return f"{file.name} is gone"
    data = bytearray(file.read_bytes())
    kinds = [_cut, _bytes, _bytes, _field, _insert, _remove, _swap, _fill]
    if file.suffix == ".json":
        kinds = [_cut, _bytes, _json, _json, _json, _json]
    elif file.suffix == ".safetensors":
        kinds += [_header] * 8
    elif file.suffix == ".gguf":
        kinds += [_early_field, _early_field, _early_bytes, _early_bytes, _early_bytes]
    kind = rng.choice(kinds)
    try:
        damaged = kind(rng, bytearray(data))
    except (ValueError, AttributeError, TypeError):  # another damage has left no JSON, or no object
        kind, damaged = _bytes, _bytes(rng, data)
    file.write_bytes(damaged)
    return f"{kind.__name__} on {file.name}"


def _cut(rng: random.Random, data: bytearray) -> bytes:
    return bytes(data[: rng.choice([0, 3, 8, 9, rng.randrange(len(data)), rng.randrange(len(data)), len(data) - 1])])


def _bytes(rng: random.Random, data: bytearray, end: int | None = None) -> bytes:
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(min(end or len(data), len(data)))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(data)


def _field(rng: random.Random, data: bytearray, end: int | None = None) -> bytes:
    size = rng.choice([4, 8])
    at = rng.randrange(max(1, min(end or len(data), len(data)) - size))
    data[at : at + size] = (rng.choice(NUMBERS) & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    return bytes(data)


def _early_bytes(rng: random.Random, data: bytearray) -> bytes:
    return _bytes(rng, data, rng.choice([32, 512, 4096]))


def _early_field(rng: random.Random, data: bytearray) -> bytes:
    return _field(rng, data, rng.choice([32, 512, 4096]))


def _insert(rng: random.Random, data: bytearray) -> bytes:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice([1, 7, 64]))
    return bytes(data)


def _remove(rng: random.Random, data: bytearray) -> bytes:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice([1, 8, 4096])]
    return bytes(data)


def _swap(rng: random.Random, data: bytearray) -> bytes:
    a, b = (rng.randrange(max(1, len(data) - 8)) for _ in range(2))
    data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]
    return bytes(data)


def _fill(rng: random.Random, data: bytearray) -> bytes:
    """All ones: NaN in every float format."""
    at, size = rng.randrange(len(data)), rng.choice([16, 256, 1 << 14])
    data[at : at + size] = b"\xff" * len(data[at : at + size])
    return bytes(data)


def _json(rng: random.Random, data: bytearray) -> bytes:
    return json.dumps(_edited(rng, json.loads(data))).encode()


def _header(rng: random.Random, data: bytearray) -> bytes:
    """A header of safetensors that is still JSON, and whose length is right."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.get("__metadata__", {})
    texts = [key for key, value in meta.items() if value[:1] in "{["]
    if texts and rng.random() < 0.6:
        key = rng.choice(texts)
        meta[key] = json.dumps(_edited(rng, json.loads(meta[key])))
    else:
        header = _edited(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data[8 + length :])


def _edited(rng: random.Random, value: Any) -> Any:
    """One entry somewhere below changed, taken out, or given another's value."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if rng.random() < 0.08:
        del value[key]
    elif rng.random() < 0.08:
        value[key] = value[rng.choice(keys)]
    else:
        value[key] = _edited(rng, value[key])
    return value
