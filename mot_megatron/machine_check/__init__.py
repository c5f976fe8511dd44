"""Checks of a machine: does training compute the right numbers on it, and how fast?"""
