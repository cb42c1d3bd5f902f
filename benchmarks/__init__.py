"""Benchmarks, one file for each question: ``python -m benchmarks linear | model | memory | all``."""
