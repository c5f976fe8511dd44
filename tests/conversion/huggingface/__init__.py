"""Tests of the Hugging Face formats."""
