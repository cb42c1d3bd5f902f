"""Which layer gets which format: each choice's loss measured, the best choices within a budget found exactly."""

from __future__ import annotations

from .result import Choice, Point, Search
from .policy_search import search

__all__ = ["Choice", "Point", "Search", "search"]
