"""Tests of the watch over the ranks, of stopping, and of the hardware report."""
