"""Which layer gets which format: each choice's loss measured, the best choices within a budget found exactly."""

from __future__ import annotations

from .policy_search import search
from .result import Choice, Search
from .table import Point

__all__ = ["Choice", "Point", "Search", "search"]
