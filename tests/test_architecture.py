"""Imports run downwards only, and what is optional or slow to import stays inside the functions that need it."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Container, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top; a module may import from its own level and from those below. A folder is a level as a whole.
DSPA = (
    {"__main__"},
    {"cli"},
    {"demo", "serving"},
    {"audit", "personal"},
    {"fsrl"},
    {"baselines", "evaluate", "sae_ts"},
    {"steering", "testing"},
    {"maps"},
    {"saes"},
    {"resuming"},
    {"training_folder"},
    {"archives", "costs", "data", "expressions", "judges", "models", "files", "outputs"},
    {"config", "confusion", "distributed", "errors", "intervals", "schemas", "snapshot", "version"},
)
KERNELS = (
    {"fusing", "nn"},
    {"ops"},
    {"backends", "eager", "testing"},
    {"barriers", "cuda_library", "launch", "weights"},
    {"checks", "formulas", "screen"},
)
PACKAGES = {"dspa": ROOT / "python" / "dspa", "dspa_kernels": ROOT / "dspa_kernels"}


def sources(package: Path) -> Iterator[Path]:
    paths = sorted(package.rglob("*.py"))
    assert paths
    yield from paths


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


def module_graph(package: Path) -> dict[str, set[str]]:
    """The modules of a package and those of it that each imports, anywhere in its file."""
    modules = {}
    for path in sources(package):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    return {name: set(imported_files(path, modules)) for name, path in modules.items()}


def imported_files(path: Path, modules: Container[str]) -> Iterator[str]:
    """The modules that a file imports: `from package import module` is an import of the module alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from [name] if name in modules else [str(node.module)] if node.module in modules else []


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """A circle of modules, if there is one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("name", PACKAGES)
def test_no_file_imports_itself_through_others(name: str):
    assert circle_in(module_graph(PACKAGES[name])) == []


@pytest.mark.parametrize("form", ["import", "from", "in a function", "for types alone"])
def test_a_circle_is_noticed(tmp_path: Path, form: str):
    """Three files deep in two folders import each other, the last of them in this form."""
    back = {
        "import": "import dspa.low.a.first",
        "from": "from dspa.low.a.first import x",
        "in a function": "def f():\n    from dspa.low.a import first",
        "for types alone": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dspa.low.a.first import x",
    }[form]
    files = {
        "low/a/first.py": "from dspa.low.b.second import x",
        "low/b/second.py": "from dspa.low.b import third",
        "low/b/third.py": back,
    }
    package = tmp_path / "dspa"
    for path, text in files.items():
        for folder in (package, package / "low", (package / path).parent):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
        (package / path).write_text(text)
    circle = {"dspa.low.a.first", "dspa.low.b.second", "dspa.low.b.third"}
    assert set(circle_in(module_graph(package))) == circle
    (package / "low/b/third.py").write_text("")
    assert circle_in(module_graph(package)) == []


@pytest.mark.parametrize(
    ("package", "levels"), [(PACKAGES["dspa"], DSPA), (PACKAGES["dspa_kernels"], KERNELS)], ids=PACKAGES
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
        # The constructors of FusedSAE read files through dspa, where a function imports it.
        reads = {"dspa"} if path.name == "nn.py" else set()
        for module in imports(ast.parse(path.read_text())):
            unknown = {"dspa", "transformers", "safetensors", "datasets", "sae_lens"} - reads
            assert module.split(".")[0] not in unknown, path


def test_dspa_uses_public_names_of_the_kernels():
    for path in sources(ROOT / "python" / "dspa"):
        for module in imports(ast.parse(path.read_text())):
            assert not module.startswith("dspa_kernels.") or module.count(".") == 1, f"{path}: {module}"


def test_references_import_torch_alone():
    allowed = ("torch", "typing", "collections.abc", "dspa_kernels.ops", "dspa_kernels.formulas")
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
