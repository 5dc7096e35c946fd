"""Transformers models: their layers, their residuals, prompts, and what is attached to them."""
