"""Literals and expressions over 32-bit words in generated Triton text."""

from __future__ import annotations


def shifted(word: str, left: int) -> str:
    return f"({word} << {left})" if left > 0 else f"({word} >> {-left})" if left else word


def pair(half: int) -> int:
    """A 16-bit pattern in both halves of an int32 literal."""
    return signed(half * 0x00010001)


def signed(word: int) -> int:
    """A 32-bit pattern as the int32 that Triton's literals need."""
    return word - 2**32 if word >= 2**31 else word


def joined(names: list[str]) -> str:
    """``tl.join`` of 2^m tensors: m dims are added at the end, the lowest index bit first."""
    if len(names) == 1:
        return names[0]
    half = len(names) // 2
    return f"tl.join({joined(names[:half])}, {joined(names[half:])})"
