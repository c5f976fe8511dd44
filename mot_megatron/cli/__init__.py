"""The command line: one module per command of ``mot``, and what they share.

Arguments are parsed before anything slow is imported, so that ``--help`` answers at once. That is
why the modules of this package import the packages they work with inside functions.
"""
