"""Tests of the package scaling."""
