"""A session, its training step and pipeline, its state; models trained before."""
