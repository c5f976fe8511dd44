"""A corpus from raw files: sources, media, vocabulary, sampling and encoding."""
