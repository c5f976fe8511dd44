"""Tests of mot_megatron.checkpoint."""
