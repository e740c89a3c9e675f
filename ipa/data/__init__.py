"""Files → batches, in this order.

shards, members, fields, captions, filters, records, sources: what lies in a shard, and which of it is a sample.
lanes, buckets, order: an endless sequence of samples, a pure function of seed and sources, dealt out to readers.
transforms, augment, draws, samples: what becomes of a record. cache: the same from feature shards.
stream, datamodule, cached: batches, shared among ranks and workers; the place that training has reached.

Ranks, workers and resume only choose who makes which part of the sequence, so they change nothing in what is seen.
Every draw of a sample has an address (``addresses``).
"""
