"""Audits: what a map edits, and what the edited latents stand for."""
