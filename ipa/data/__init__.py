"""Shards → batches; docs/architecture.md follows a sample through these folders.

Ranks, workers and resume only decide who makes which part of the order, so they do not change the samples. Every random
number of a sample has an address (``addresses``).
"""
