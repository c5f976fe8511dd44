"""Drills: training jobs that are killed, stopped, cut off from the disk and damaged on purpose."""
