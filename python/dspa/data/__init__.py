"""What a user brings: preference triples, texts and prompts, and their tokens."""
