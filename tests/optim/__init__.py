"""Tests of ``mot_megatron.optim``."""
