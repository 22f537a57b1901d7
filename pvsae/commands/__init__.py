"""Commands with options of their own, a module each: `add...` puts them on the parser, the rest runs when the command does.

Knows: options and terminals. Does not know: what a stage or a model does; nothing heavy is imported before a command runs.
"""
