"""Triton kernels for the elementwise operations of a layer, forward and backward.

Each module holds one operation; ``mot_megatron.model.operations`` chooses between them and plain
PyTorch, to which the tests compare them. All kernels compute in fp32, round once at the end, and
use no atomics, so results are reproducible. They are not specialized for numbers of rows, which
change with every micro-batch.
"""
