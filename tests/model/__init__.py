"""Tests of mot_megatron.model."""
