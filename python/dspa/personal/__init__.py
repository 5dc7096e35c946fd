"""Personalisation: the effect of ablating latents on axes of style, and personas that choose latents by it."""
