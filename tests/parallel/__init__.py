"""Tests of mot_megatron.parallel."""
