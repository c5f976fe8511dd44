"""Conversion of checkpoints on one machine's CPU: no model is built, and tensors are streamed.

``CheckpointSource`` reads a checkpoint of this program, ``write_checkpoint`` writes one; between
them are tensors by name, each read or produced when it is needed.
"""
