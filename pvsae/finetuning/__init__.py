"""Finetuning with adapters: rows with marked answers, a LoRA, a training loop, and what is done to the model meanwhile.

Knows: models and their hooks. Does not know: traits, judges, persona vectors, dictionaries' files.
"""
