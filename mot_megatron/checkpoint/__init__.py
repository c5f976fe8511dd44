"""Saving and loading of training state, verified before use."""
