"""Corpora on disk, packing, batches and the builders of the example corpora."""
