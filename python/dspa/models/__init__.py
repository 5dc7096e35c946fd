"""Transformers models: their layers, reading residuals, prompts, and what is attached to them."""
