"""Configuration in, run folder out."""
