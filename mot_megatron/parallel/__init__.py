"""Parallel axes, process groups, placement of towers, and CPU patches for megatron-core."""
