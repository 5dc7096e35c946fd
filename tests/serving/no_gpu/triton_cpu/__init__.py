"""A backend that Triton counts as active, so that vLLM's model runner V2 starts on a CPU with interpreted kernels."""
