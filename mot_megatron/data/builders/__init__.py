"""Builders of corpora from real data; each writes a corpus directory through ``CorpusWriter``."""
