"""Scores of generated images: torchmetrics classes over pixels in [-1, 1]."""
