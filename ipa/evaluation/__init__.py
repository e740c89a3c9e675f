"""Benchmarks, the systems that are compared, generation and scoring in two steps, and the report."""
