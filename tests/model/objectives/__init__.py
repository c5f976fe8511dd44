"""Tests of the objectives: losses and gradients against plain references."""
