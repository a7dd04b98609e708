"""A teacher's answers on disk: codecs, shards, capture."""
