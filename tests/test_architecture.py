"""Imports run downwards only, and what is optional or slow to import stays inside the functions that need it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top; a module may import from its own level and from those below.
DSPA = (
    {"__main__"},
    {"cli"},
    {"demo"},
    {"baselines"},
    {"plots"},
    {"map_reports"},
    {"stability"},
    {"fsrl"},
    {"steering", "build"},
    {"reduction"},
    {"cdmap", "count_table"},
    {"densities", "attach"},
    {"reader"},
    {"sae_training"},
    {"training_folder"},
    {"activations", "batchtopk"},
    {"shards"},
    {"pieces"},
    {"hooks", "preferences", "trace", "config"},
    {"saes"},
    {"sae_weights"},
    {"sae_files"},
    {"tensor_files"},
    {"errors", "version", "prompts", "ranks", "cost"},
)
KERNELS = ({"nn"}, {"ops"}, {"backends", "testing"}, {"barriers", "cuda_library", "launch", "weights"}, {"checks"})


def sources(package: Path) -> Iterator[Path]:
    found = sorted(package.rglob("*.py"))
    assert found
    yield from found


def imports(tree: ast.AST, *, top_level: bool = False) -> Iterator[str]:
    """Modules that a file imports, anywhere or, at `top_level`, outside of functions and type checking."""
    nodes = ast.walk(tree) if not top_level else (n for n in ast.iter_child_nodes(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(name: str, levels: tuple[set[str], ...]) -> int:
    matches = [n for n, names in enumerate(levels) if name in names]
    assert matches, f"{name} has no level: add it to this test"
    return matches[0]


@pytest.mark.parametrize(
    ("package", "levels"),
    [(ROOT / "python" / "dspa", DSPA), (ROOT / "dspa_kernels", KERNELS)],
    ids=["dspa", "dspa_kernels"],
)
def test_imports_run_downwards(package: Path, levels: tuple[set[str], ...]):
    for path in sources(package):
        here = path.relative_to(package).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for module in imports(ast.parse(path.read_text())):
            parts = module.split(".")
            if parts[0] == package.name and len(parts) > 1 and not parts[1].startswith("__"):
                assert level(parts[1], levels) >= level(here, levels), f"{path} imports {module}, which is above it"


def test_kernels_know_nothing_of_models():
    for path in sources(ROOT / "dspa_kernels"):
        for module in imports(ast.parse(path.read_text())):
            assert module.split(".")[0] not in {"dspa", "transformers", "safetensors", "datasets", "sae_lens"}, path


def test_dspa_uses_public_names_of_the_kernels():
    for path in sources(ROOT / "python" / "dspa"):
        for module in imports(ast.parse(path.read_text())):
            assert not module.startswith("dspa_kernels.") or module.count(".") == 1, f"{path}: {module}"


def test_references_import_torch_alone():
    allowed = ("torch", "typing", "collections.abc", "dspa_kernels.ops")
    for path in (ROOT / "dspa_kernels").rglob("reference.py"):
        for module in imports(ast.parse(path.read_text())):
            assert module.startswith(allowed), f"{path} imports {module}"


def test_triton_and_sae_lens_stay_inside():
    for package in (ROOT / "dspa_kernels", ROOT / "python" / "dspa"):
        for path in sources(package):
            names = {module.split(".")[0] for module in imports(ast.parse(path.read_text()), top_level=True)}
            assert "sae_lens" not in names, path
            assert "triton" not in names or path.name.startswith("triton_"), path


# transformers itself imports Triton where it is installed.
@pytest.mark.parametrize(
    ("package", "unwanted"),
    [
        ("dspa.cli", ["torch", "transformers", "scipy", "matplotlib"]),
        (
            "dspa.steering.dspa, dspa.maps.cdmap, dspa.data.triples",
            ["sae_lens", "trl", "peft", "datasets", "matplotlib"],
        ),
        ("dspa_kernels", ["transformers", "triton"]),
    ],
)
def test_import_is_light(package: str, unwanted: list[str]):
    """Importing touches no device and none of the optional packages."""
    code = (
        f"import sys, {package}; print([m for m in {unwanted} if m in sys.modules]); "
        "import torch; assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"
