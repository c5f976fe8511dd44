"""Tests of mot_megatron.conversion."""
