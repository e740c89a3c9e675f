"""Scores of generated pictures: torchmetrics classes over tensors of pixels in [-1, 1]."""
