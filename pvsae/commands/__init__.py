"""Subcommands with many options, one module each: their parser, and what they print.

Knows: names of options. Does not know: what a stage does. No heavy library is imported before a subcommand runs.
"""
