"""Records → tensors: decoding, resizing, augmentation, aspect-ratio buckets, batches."""
