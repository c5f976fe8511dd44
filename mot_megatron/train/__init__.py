"""Composition, training step, training loop, metrics, evaluation and generation."""
