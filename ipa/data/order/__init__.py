"""The training order: lanes, an endless sequence of records per lane, and the streams that make batches of it."""
