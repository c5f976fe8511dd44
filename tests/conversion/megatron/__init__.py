"""Tests of megatron-core's distributed checkpoints."""
