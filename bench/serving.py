"""Tokens per second that vLLM serves, plain and with steering, by vLLM's own benchmark: `python -m bench.serving`.

Two servers, one after the other: vLLM's own, and that of `dspa serve` with the same options. Both get the same random
prompts from `vllm bench serve`, as many at a time as a batch holds: the second with no request steered (idle), every
second one (half), and all of them. Results name the device; on a CPU they say nothing about a GPU.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock
from urllib.error import URLError
from urllib.request import urlopen

import typer
import vllm
from rich.console import Console
from rich.table import Table

from bench.harness.machine import describe

PORT = 8123
PLAIN = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
STEERED = (sys.executable, "-m", "dspa", "serve")
# By name, every which request is steered, 0 for none.
SHARES = {"idle": 0, "half": 2, "all": 1}
START_SECONDS = 1800


@contextmanager
def server(command: Sequence[str]) -> Iterator[None]:
    """Run a server, from when it answers on.

    Raises:
        RuntimeError: another server on the port, or one that ends before it answers, or does not in half an hour.
    """
    if answers():
        raise RuntimeError(f"Another server answers on port {PORT}. Stop it first.")
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers():
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{' '.join(command)} does not answer:\n{log.read()[-4000:]}")
                time.sleep(1)
            yield
        finally:
            process.terminate()


def answers() -> bool:
    try:
        urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
    except (URLError, OSError):
        return False
    return True


def measure(model: str, batch: int, every: int, n_in: int, n_out: int, n_batches: int) -> dict[str, Any]:
    """Ask the server by vLLM's benchmark, and return its result.

    Args:
        model: the model, which names the tokenizer.
        batch: requests at a time.
        every: steer every which request, 0 for none.
        n_in, n_out: tokens of a prompt and of an answer.
        n_batches: batches of requests.

    Raises:
        RuntimeError: requests that failed.
    """
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    get_samples = serve.get_samples

    def steered_samples(*args: Any) -> list[Any]:
        samples: list[Any] = get_samples(*args)
        for sample in samples[::every] if every else ():
            sample.request_overrides = {"vllm_xargs": {"dspa": "on"}}
        return samples

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    n_requests = batch * n_batches
    arguments = ["--model", model, "--port", PORT, "--dataset-name", "random", "--random-input-len", n_in]
    arguments += ["--random-output-len", n_out, "--num-prompts", n_requests, "--max-concurrency", batch]
    arguments += ["--num-warmups", batch, "--ignore-eos", "--temperature", 0, "--disable-tqdm"]
    # With answers and errors.
    arguments += ["--save-detailed"]
    with mock.patch.object(serve, "get_samples", steered_samples):
        result: dict[str, Any] = serve.main(parser.parse_args(list(map(str, arguments))))
    if result["completed"] < n_requests:
        raise RuntimeError(f"{n_requests - result['completed']} of {n_requests} requests failed: {result['errors']}")
    return result


def main(
    model: Annotated[str, typer.Argument(help="The model: a folder, or a name on the Hub.")],
    cdmap: Annotated[str, typer.Option("--map", help="The map of the steered server.")],
    graphs: Annotated[
        list[str], typer.Option(help="Modes of vLLM's CUDA graphs, each with servers of its own; NONE is eager.")
    ] = ["PIECEWISE", "FULL"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Requests at a time.")] = [1, 8, 64],  # noqa: B006
    n_in: Annotated[int, typer.Option(help="Tokens per prompt.")] = 256,
    n_out: Annotated[int, typer.Option(help="Tokens per answer.")] = 128,
    n_batches: Annotated[int, typer.Option(help="Batches of requests per round.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds, of which the median counts.")] = 3,
    option: Annotated[list[str], typer.Option(help="A word that both servers get, such as --option=--seed.")] = [],  # noqa: B006
    steering: Annotated[
        list[str], typer.Option(help="A word that dspa serve gets, too, such as --steering=--alpha=1.")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Write results here, as JSON.")] = None,
    commit: Annotated[str, typer.Option(help="The commit that is measured, where git does not know it.")] = "",
) -> None:
    """Measure tokens per second, plain and with no, half of the and all requests steered."""
    machine, results = describe(commit), []
    for mode in graphs:
        same = ["--port", str(PORT), "--no-enable-prefix-caching", "--max-num-seqs", str(max(batch)), *option]
        same += ["--enforce-eager"] if mode == "NONE" else ["-O", json.dumps({"cudagraph_mode": mode})]
        servers: dict[tuple[str, ...], dict[str, int]] = {
            (*PLAIN, model, *same): {"plain": 0},
            (*STEERED, model, "--map", cdmap, *steering, *same): SHARES,
        }
        for command, shares in servers.items():
            with server(command):
                for size in batch:
                    ask = functools.partial(measure, model, size, n_in=n_in, n_out=n_out, n_batches=n_batches)
                    results += [{"graphs": mode, "batch": size} | row for row in compare(ask, shares, rounds)]
    show(results, machine["device"])
    if out is not None:
        settings = {
            "vllm": vllm.__version__,
            "model": model,
            "n_in": n_in,
            "n_out": n_out,
            "n_batches": n_batches,
            "options": option + steering,
        }
        out.write_text(json.dumps(machine | {"settings": settings, "results": results}, indent=1) + "\n")


def compare(ask: Callable[[int], dict[str, Any]], shares: Mapping[str, int], rounds: int) -> list[dict[str, Any]]:
    """Return tokens per second for each share of steered requests, and how many answers that changes."""
    results, first = [], None
    for name, every in shares.items():
        measured = [ask(every) for _ in range(rounds)]
        speeds, texts = [result["output_throughput"] for result in measured], measured[0]["generated_texts"]
        first = first or texts
        changed = sum(text != other for text, other in zip(texts, first, strict=True))
        results.append(
            {"requests": name, "tokens_s": statistics.median(speeds), "rounds": speeds}
            | {"answers": len(texts), "changed": changed}
        )
    return results


def show(results: Sequence[dict[str, Any]], device: str) -> None:
    """Print a table of tokens per second, and of their shares of plain."""
    table = Table(title=f"Output tokens per second on {device}, and the share of plain")
    for column in ("graphs", "batch", "plain", *SHARES):
        table.add_column(column, justify="left" if column == "graphs" else "right")
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for result in results:
        rows.setdefault((result["graphs"], result["batch"]), {})[result["requests"]] = result["tokens_s"]
    for (mode, size), speeds in rows.items():
        shares = [f"{speeds[name]:.1f} ({speeds[name] / speeds['plain']:.3f})" for name in SHARES]
        table.add_row(mode, str(size), f"{speeds['plain']:.1f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
