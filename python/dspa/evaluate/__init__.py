"""How good is it: scores of preferences, responses and coherence of texts, under any method."""
