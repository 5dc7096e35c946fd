"""Conditional-difference maps: counting latents on preference triples, and reducing the counts to a map."""
