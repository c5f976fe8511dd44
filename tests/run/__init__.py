"""Tests of the book-keeping of a run."""
