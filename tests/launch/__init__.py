"""Tests of the entry points that train."""
