"""DPO (arXiv 2305.18290) by TRL: a model is trained to prefer chosen to rejected responses."""
