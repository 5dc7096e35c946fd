"""vLLM's OpenAI-compatible server, with an engine that requests can steer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dspa.errors import refusal
from dspa.serving.plugin import attach
from dspa.serving.versions import check_version


def serve(model: str, options: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Run the server until it is stopped.

    Args:
        model: the model, as for `vllm serve`.
        options: what `vllm_options` returned for it.
        arguments: other arguments of `vllm serve`.

    Raises:
        ValueError: arguments that would replace the options.
        RuntimeError: a version of vLLM that is not known, or that lacks what the checks of requests need.
    """
    check_version()
    attach()
    # The last two are defined in other modules in 0.33 than in 0.32.
    from vllm.entrypoints.cli.serve import ServeSubcommand, make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # As vLLM's own command has it: a device does not survive a fork.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    parsed = make_arg_parser(FlexibleArgumentParser(prog="dspa serve MODEL")).parse_args([model, *arguments])
    overrides, ours = parsed.hf_overrides or {}, options["hf_overrides"]
    if not isinstance(overrides, Mapping):
        raise refusal(ValueError, "--hf-overrides", repr(overrides), "a JSON object")
    if taken := sorted(set(overrides) & set(ours)):
        raise refusal(ValueError, "--hf-overrides", f"with {', '.join(taken)}", "overrides of other settings")
    parsed.hf_overrides = {**overrides, **ours}
    validate_parsed_serve_args(parsed)
    ServeSubcommand.cmd(parsed)
