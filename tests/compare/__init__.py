"""Tests of the comparison of architectures."""
