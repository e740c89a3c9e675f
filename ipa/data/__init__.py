"""Shards → batches, in this order.

shards: names, opening, members, and which of them is a record. order: an endless sequence of records, a pure function
of seed and sources, dealt to lanes; the streams that make batches of it. images: decoding, augmentation, buckets.
cache: the same from precomputed features. datamodule: loaders, and the position that training has reached.

Ranks, workers and resume only decide who makes which part of the sequence, so they do not change the samples. Every
random number of a sample has an address (``addresses``).
"""
