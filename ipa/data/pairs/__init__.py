"""Pairs: the reference of a sample is the image of another sample of its group."""
