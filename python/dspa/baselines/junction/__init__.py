"""Sparse Junction Steering: logits moved by a token-level value model where the next token is undecided."""
