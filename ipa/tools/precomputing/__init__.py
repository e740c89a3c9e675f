"""What `python -m ipa.tools.precompute` does: claims on shards, the decoding, the shards in the making, and the run."""
