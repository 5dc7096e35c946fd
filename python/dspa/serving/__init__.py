"""DSPA in vLLM: steering is a property of a request, beside others in one batch."""

from dspa.serving.options import vllm_options

__all__ = ["vllm_options"]
