"""Tests, in the same folder structure as ``mot_megatron``."""
