"""Tests of the entry points in ``tools``."""
