"""Pack a folder of captioned pictures into shards."""
