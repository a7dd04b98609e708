"""A teacher's outputs on disk: codecs, shards, capture."""
