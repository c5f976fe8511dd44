"""Conversion to and from torch_dist, the distributed checkpoints of megatron-core."""
