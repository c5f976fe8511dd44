"""Configuration of axes, process groups and the CPU adaptation of megatron-core."""
