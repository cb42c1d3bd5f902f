"""Reports of a plan for people and programs."""

from __future__ import annotations

from .table import Report

__all__ = ["Report"]
