"""Puts a benchmark's table into README, between its marks."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
END = "<!-- end -->"


def block(question: str, table: str) -> str:
    """``table`` between the marks of ``question``."""
    return f"<!-- python -m benchmarks {question} -->\n{table}{END}"


def put(question: str, table: str) -> None:
    """Raises ValueError where README has no marks of ``question``."""
    begin = block(question, "").removesuffix(END)
    before, found, rest = README.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{README}: no {begin.strip()} … {END} around the table of {question}; put them back")
    README.write_text(before + block(question, table) + after, encoding="utf-8")
