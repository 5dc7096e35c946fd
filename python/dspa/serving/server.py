"""vLLM's OpenAI-compatible server, with an engine that requests can steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dspa.errors import refusal
from dspa.serving.versions import check_version


def serve(model: str, options: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Run the server until it is stopped.

    Args:
        model: the model, as for `vllm serve`.
        options: what `vllm_options` returned for it.
        arguments: other arguments of `vllm serve`.

    Raises:
        ValueError: arguments that would replace the options.
        RuntimeError: a version of vLLM that is not known.
    """
    check_version()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parsed = make_arg_parser(FlexibleArgumentParser(prog="dspa serve MODEL")).parse_args([model, *arguments])
    overrides, ours = parsed.hf_overrides or {}, options["hf_overrides"]
    if not isinstance(overrides, Mapping):
        raise refusal(ValueError, "--hf-overrides", repr(overrides), "a JSON object")
    if taken := sorted(set(overrides) & set(ours)):
        raise refusal(ValueError, "--hf-overrides", f"with {', '.join(taken)}", "overrides of other settings")
    parsed.hf_overrides = {**overrides, **ours}
    validate_parsed_serve_args(parsed)
    ServeSubcommand.cmd(parsed)
