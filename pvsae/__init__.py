"""pvsae: what a character trait is inside a language model, and what to do about it."""
