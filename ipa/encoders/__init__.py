"""Frozen image encoders: a reference picture in, features out."""
