"""SAELens' own tests with every SAE for inference fused: `python tests/fusing/sae_lens_suite.py FOLDER [TEST ...]`.

FOLDER holds SAELens' `tests`, from its repository at about the version installed. It is run as it is, fused, and fused
with sparse calls on the CPU. A test that passes as it is has to pass fused. Nothing is fetched: in place of the model
that the tests take from a hub, one of random weights lies in a cache of its own. Tests that fail as they are, because
they need the network, another package or another version, are listed by name and left out.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

TESTS = ("tests/saes", "tests/analysis", "tests/refactor_compatibility", "tests/test_evals.py")
MODEL = "roneneldan/TinyStories-1M"
# The models that tests load, by TransformerLens' names. All get the one above.
MODELS = ("tiny-stories-1M", "solu-1l", "gpt2")
RUNS = {"as it is": (), "fused": ("--fuse=auto",), "fused, sparse calls": ("--fuse=reference",)}

outcomes: dict[str, str] = {}
fused: collections.Counter[str] = collections.Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuse", help="backend of the SAEs that are fused")
    parser.addoption("--outcomes", type=Path, help="file to write the outcome of every test to")


def pytest_configure(config: pytest.Config) -> None:
    from transformer_lens import HookedTransformer

    load = HookedTransformer.from_pretrained.__func__

    def load_stand_in(cls: Any, model_name: str, *args: Any, **kwargs: Any) -> Any:
        return load(cls, MODELS[0] if model_name in MODELS else model_name, *args, **kwargs)

    HookedTransformer.from_pretrained = classmethod(load_stand_in)
    backend = config.getoption("--fuse")
    if backend is None:
        return
    from sae_lens import SAE

    from dspa_kernels import InputError, fuse
    from dspa_kernels.fusing import FusedCalls

    made = SAE.__init__

    @functools.wraps(made)
    def made_fused(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        try:
            fuse(self, backend=backend)
        except InputError:
            fused[f"{type(self).__name__} refused"] += 1
        else:
            fused[f"{type(self).__name__} made"] += 1

    SAE.__init__ = made_fused
    for name in ("encode", "decode", "forward"):
        setattr(FusedCalls, name, counted(name, getattr(FusedCalls, name)))


def counted(name: str, method: Any) -> Any:
    @functools.wraps(method)
    def call(self: Any, *args: Any) -> Any:
        fused[f"calls of {name}"] += 1
        return method(self, *args)

    return call


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.outcome != "passed":
        # The last line is the error, such as that of a missing package.
        outcomes[report.nodeid] = f"{report.outcome}: {str(report.longrepr).splitlines()[-1]}"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        reason = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", report.longrepr or ""))
        outcomes[report.nodeid] = "passed" if report.outcome == "passed" else f"{report.outcome}: {reason}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--outcomes")
    path.write_text(json.dumps({"outcomes": outcomes, "fused": fused}))


def write_model(cache: Path) -> None:
    """Write a model of random weights where transformers looks for the one that the tests load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    folder = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0")
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(snapshot)
    config = GPTNeoConfig(
        vocab_size=50257, hidden_size=64, num_layers=8, num_heads=16, attention_types=[[["global", "local"], 4]]
    )
    GPTNeoForCausalLM(config).save_pretrained(snapshot)


def run(name: str, folder: Path, tests: list[str], scratch: Path) -> dict[str, Any]:
    path = scratch / f"{name}.json"
    here = Path(__file__).resolve()
    paths = [str(folder), str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    environment |= {"HF_HUB_CACHE": str(scratch / "hub"), "HF_HOME": str(scratch)}
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--tb=line", f"--rootdir={folder}"]
    options.append("--continue-on-collection-errors")
    plugin = ["-p", here.stem, *RUNS[name], f"--outcomes={path}"]
    subprocess.run([sys.executable, "-m", "pytest", *options, *plugin, *tests], cwd=folder, env=environment)
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        write_model(Path(scratch) / "hub")
        results = {name: run(name, arguments.folder.resolve(), arguments.tests, Path(scratch)) for name in RUNS}
    plain = results["as it is"]["outcomes"]
    print("\nLeft out, as they do not pass as they are:")
    for test, outcome in plain.items():
        if outcome != "passed":
            print(f"  {test}: {outcome.splitlines()[0][:160]}")
    n_differing = 0
    for name, result in results.items():
        passed = [test for test, outcome in result["outcomes"].items() if outcome == "passed"]
        print(f"\n{name}: {len(passed)} of {len(result['outcomes'])} pass. {result['fused'] or ''}")
        for test, outcome in plain.items():
            if (outcome == "passed") != (test in passed):
                n_differing += 1
                print(f"  {test}: {result['outcomes'].get(test, 'not run')[:400]}")
    return int(n_differing > 0 or "passed" not in plain.values())


if __name__ == "__main__":
    sys.exit(main())
