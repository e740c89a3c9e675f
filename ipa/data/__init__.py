"""Files → batches, in this order: shards, records, order, transforms, draws, stream, datamodule.

One training order for all: ``(seed, shards)`` fix an endless sequence of samples (``order``), and step s takes the
samples s·G … s·G + G - 1 of it, G = world size × batch size (``stream``). Ranks, workers and resume only choose who
makes which part, so they change nothing in what is seen. Every draw of a sample has an address (``addresses``).
"""
