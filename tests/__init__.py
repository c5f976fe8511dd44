"""Tests, laid out as ``mot_megatron`` is."""
