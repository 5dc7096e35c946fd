"""Judges: language models behind a chat endpoint, whose answers are kept on disk."""
