"""Builders that turn real data into corpora; each writes its directory with ``CorpusWriter``."""
