"""Evaluation of any method: scores of preference triples, log-probabilities of responses, coherence of texts."""
