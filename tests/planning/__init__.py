"""Tests of memory estimates and of the placement of towers."""
