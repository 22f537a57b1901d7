"""Screening: what training on a chat would add along persona vectors, row by row, before anything is trained.

Knows: chats, the base model's own answers to their prompts, projections of both (paper, section on data screening).
Does not know: traits, judges, run folders' results (stages/screen.py and stages/gate.py).
"""
