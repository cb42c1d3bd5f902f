"""Reports of a plan for people and programs."""

from __future__ import annotations

from .graph import Picture, Step
from .roofline import Machine, Timing
from .table import Report

__all__ = ["Machine", "Picture", "Report", "Step", "Timing"]
