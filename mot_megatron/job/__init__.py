"""Ranks started, watched and stopped; the hardware they run on."""
