"""Reading: shard specifications → names, a name → an open stream, tar → members → records of a source."""
