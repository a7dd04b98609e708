"""Teachers behind a server that scores tokens."""
