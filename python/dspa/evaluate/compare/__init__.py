"""Comparison of steering methods side by side: on a user's prompts and on held-out preference triples."""
