"""Tests of memory plans and of the placement of towers."""
