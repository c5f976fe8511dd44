"""Continuing a prompt into any modality: sampling, legal segments, key-value cache."""
