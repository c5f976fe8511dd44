"""Tests of ``mot_megatron.scaling``."""
