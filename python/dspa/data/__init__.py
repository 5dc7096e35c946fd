"""Preference triples, texts and prompts of the user, and their tokens."""
