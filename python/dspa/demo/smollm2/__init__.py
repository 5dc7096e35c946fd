"""The demo on a real chat model, SmolLM2-135M-Instruct."""
