"""Tests of the watchdog, of stopping on signals, and of memory settings."""
