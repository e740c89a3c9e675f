"""A folder of pictures → shards, for ``python -m ipa.tools.pack``: folders, tables, captions, samples, shards."""
