"""Tests of the fused operations; Triton interprets them without a GPU."""
