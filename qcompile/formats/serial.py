"""A format as JSON types and back, so that a file can hold the declarations of the formats it is written in.

An expression is a tree of lists: ``["+", a, b]``, ``["*", a, b]``, ``["^", a, 2]``, ``["call", "NF4", a]``; leaves are
integers, ``["/", 1, 3]``, ``["float", "0.1", 53]`` (bits of precision) and names of planes. Nothing of a file is evaluated
as code, and its size and degree are bounded before sympy sees it.
"""

from __future__ import annotations

import re
from typing import Any

import sympy
import torch

from ..errors import FormatError
from .spec import Codebook, FormatSpec, Plane

MAX_NODES, MAX_DEGREE, MAX_PLANES, MAX_POWER, MAX_BITS = 100, 6, 16, 4, 256
"""Of an expression in a file: nodes, factors that a term multiplies, planes, the largest exponent, bits of a number."""


def to_dict(spec: FormatSpec) -> dict[str, Any]:
    """``spec`` as JSON types, without its quantizer, which is code. Raises :class:`FormatError` for a value with functions or
    numbers that such a tree does not hold."""
    return {
        "name": spec.name,
        "planes": [[p.name, p.dtype, p.per, p.rows] for p in spec.planes],
        "value": _tree(spec.value),
        "codebooks": [
            {
                "name": book.name,
                "values": [repr(v) for v in book.values],
                "minifloat": book.minifloat,
                "cast": book.cast and str(book.cast).removeprefix("torch."),
            }
            for book in spec.codebooks
        ],
        "permuted": spec.permuted,
        "scaled": spec.scaled,
        "fingerprint": spec.fingerprint,
    }


def from_dict(data: Any) -> FormatSpec:
    """Inverse of :func:`to_dict`. Raises :class:`FormatError` for anything else, and when the fingerprint differs."""
    try:
        if len(data["planes"]) > MAX_PLANES:
            raise FormatError(f"format {data['name']!r}: {len(data['planes'])} planes; at most {MAX_PLANES} are read")
        books = tuple(_book(b) for b in data["codebooks"])
        planes = tuple(Plane(str(name), str(dtype), _whole(per), _whole(rows)) for name, dtype, per, rows in data["planes"])
        nodes = _count(data["value"])
        if nodes > MAX_NODES or _degree(data["value"]) > MAX_DEGREE:
            raise FormatError(f"format {data['name']!r}: its value is larger than {MAX_NODES} nodes of degree {MAX_DEGREE}")
        spec = FormatSpec(str(data["name"]), planes, _expr(data["value"]), books, permuted=bool(data["permuted"]),
                          scaled=bool(data.get("scaled", False)))  # fmt: skip
        fingerprint = data["fingerprint"]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError, AttributeError) as error:
        raise FormatError(f"not a format that a file can hold: {error!r}") from error
    if spec.fingerprint != fingerprint:
        raise FormatError(f"format {spec.name!r}: its declaration has the fingerprint {spec.fingerprint}, the file says "
                          f"{fingerprint}; the file is damaged")  # fmt: skip
    return spec


def _tree(expr: sympy.Expr) -> Any:
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Rational):
        return ["/", int(expr.p), int(expr.q)]
    if isinstance(expr, sympy.Float):
        match = re.fullmatch(r"Float\('(.*)', precision=(\d+)\)", sympy.srepr(expr))
        assert match is not None
        return ["float", match[1], int(match[2])]
    if isinstance(expr, sympy.Symbol):
        return expr.name
    if isinstance(expr, sympy.Add | sympy.Mul):
        return ["+" if isinstance(expr, sympy.Add) else "*", *map(_tree, expr.args)]
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer:
        return ["^", _tree(expr.base), int(expr.exp)]
    if isinstance(expr, sympy.Function) and len(expr.args) == 1:
        return ["call", expr.func.__name__, _tree(expr.args[0])]
    raise FormatError(f"{expr} cannot be written into a file; use numbers, planes, +, *, whole powers and codebooks")


def _expr(tree: Any) -> sympy.Expr:
    if isinstance(tree, str):
        return sympy.Symbol(tree, real=True)
    if isinstance(tree, int):
        return sympy.Integer(_small(tree))
    kind, *rest = tree
    match kind:
        case "/":
            return sympy.Rational(_small(rest[0]), _small(rest[1]))
        case "float":
            text = str(rest[0])[:100]
            float(text)
            return sympy.Float(text, precision=min(_whole(rest[1]), MAX_BITS))
        case "+":
            return sympy.Add(*map(_expr, rest))
        case "*":
            return sympy.Mul(*map(_expr, rest))
        case "^":
            base = _expr(rest[0])
            if base.is_number or not -MAX_POWER <= rest[1] <= MAX_POWER:
                raise FormatError(f"power {base}^{rest[1]}: not one of planes with an exponent of at most {MAX_POWER}")
            return sympy.Pow(base, int(rest[1]))
        case "call":
            return sympy.Function(str(rest[0]))(_expr(rest[1]))
    raise FormatError(f"{kind!r} is no operation of a value")


def _count(tree: Any) -> int:
    return 1 + sum(map(_count, tree[1:])) if isinstance(tree, list) else 1


def _degree(tree: Any) -> int:
    """Factors of planes that the longest term of an expanded tree multiplies."""
    if not isinstance(tree, list):
        return int(isinstance(tree, str))
    match tree[0]:
        case "+":
            return max(map(_degree, tree[1:]), default=0)
        case "*":
            return sum(map(_degree, tree[1:]))
        case "^":
            return _degree(tree[1]) * abs(tree[2])
        case "call":
            return max(1, _degree(tree[2]))
    return 0


def _book(data: dict[str, Any]) -> Codebook:
    if len(data["values"]) > 256:
        raise FormatError(f"codebook {data['name']!r}: {len(data['values'])} values; a code has at most 256")
    shape = data["minifloat"]
    cast = getattr(torch, data["cast"]) if data["cast"] else None
    if cast is not None and not (isinstance(cast, torch.dtype) and cast.itemsize == 1 and cast.is_floating_point):
        raise FormatError(f"codebook {data['name']!r}: {data['cast']!r} is no dtype of eight bits")
    values = tuple(int(v) if re.fullmatch(r"-?\d{1,9}", v) else float(v) for v in data["values"])
    return Codebook(str(data["name"]), values, None if shape is None else (_whole(shape[0]), _whole(shape[1])), cast)


def _small(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise FormatError(f"{str(value)[:80]} is no whole number of 64 bits")
    return value


def _whole(value: Any) -> int:
    if _small(value) < 0:
        raise FormatError(f"{value} is negative")
    return int(value)
