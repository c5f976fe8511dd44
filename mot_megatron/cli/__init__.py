"""The command line: one module per command of ``mot``, and shared helpers.

Arguments are parsed before anything slow is imported, so that ``--help`` responds immediately. For
this reason, the modules of this package import heavy packages inside functions.
"""
