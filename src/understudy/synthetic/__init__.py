"""Embedded worlds whose truth is known: data, small models and oracle, one file a world."""
