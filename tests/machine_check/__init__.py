"""Tests of the check of a machine."""
