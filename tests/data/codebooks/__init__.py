"""Tests of mot_megatron.data.codebooks."""
