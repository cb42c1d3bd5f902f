"""Benchmarks, one file for each question: ``python -m benchmarks linear | memory | host | all``."""
