"""Measure speed and memory on this machine: of the data path, single layers and training steps."""
