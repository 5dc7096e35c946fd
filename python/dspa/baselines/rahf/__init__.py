"""RAHF-SCIT (arXiv 2312.15997): a model learns what good and bad answers are, then a LoRA its shift between them."""
