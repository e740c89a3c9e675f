"""The feature cache: its format, its source, its batches, its datamodule."""
