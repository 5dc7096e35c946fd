"""Pages of the site that are not files in docs/, links that leave docs/, and a check that pages load no remote file."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Files outside of docs/ that are pages, too.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
# Packages whose public names are the reference. A page holds the names of a module, or of a folder of modules.
PACKAGES = {
    "dspa": ROOT / "python" / "dspa",
    "dspa.fsrl": ROOT / "python" / "dspa" / "fsrl",
    "dspa.serving": ROOT / "python" / "dspa" / "serving",
    "dspa_kernels": ROOT / "dspa_kernels",
}
# Modules with public names that no package exports, and their pages.
MODULES = {
    "dspa.audit.explain": "dspa.audit",
    "dspa.audit.explained": "dspa.audit",
    "dspa.audit.scoring": "dspa.audit",
    "dspa.audit.shares": "dspa.audit",
    "dspa.audit.neuronpedia": "dspa.audit",
    "dspa.baselines.static_sae": "dspa.baselines",
    "dspa.baselines.random_set": "dspa.baselines",
    "dspa.baselines.shuffled_map": "dspa.baselines",
    "dspa.baselines.wrong_layer": "dspa.baselines",
    "dspa.judges.judge": "dspa.judges",
    "dspa.judges.questions": "dspa.judges",
    "dspa.saes.config": "dspa.saes",
    "dspa.saes.training": "dspa.saes",
    "dspa_kernels.nn": "dspa_kernels.nn",
}

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
LOADED = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\ssrc=["']?(https?:[^"'\s>]+)|<link\b[^>]*\shref=["']?(https?:[^"'\s>]+)"""
)
EXTERNAL = re.compile(r"""<a[^>]*\shref=["']?(https?:[^"'\s>]+)""")

log = logging.getLogger("mkdocs.hooks.dspa")
external: set[str] = set()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation: the pages of the reference, without pages that are not written yet."""
    assert config.nav is not None
    config.nav = [entry for entry in map(_nav_entry, config.nav) if entry]
    return config


def _nav_entry(entry: dict[str, Any]) -> dict[str, Any] | None:
    ((title, target),) = entry.items()
    if target == "reference":
        return {title: [{name: _reference_path(name)} for name in reference()]}
    if isinstance(target, list):
        return {title: [child for child in map(_nav_entry, target) if child]}
    return entry if target in PAGES or _source(target).exists() else None


def _source(page: str) -> Path:
    """Return the file that a page is made from: a notebook for a tutorial."""
    path = ROOT / "docs" / page
    return path.with_suffix(".ipynb") if path.parent.name == "tutorials" else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not Markdown files in docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_from_root((ROOT / source).read_text(encoding="utf-8"))))
    for name, members in reference().items():
        files.append(File.generated(config, _reference_path(name), content=_reference_page(name, members)))
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        files.remove(files.src_uris[f"tutorials/{path.name}"])
        notebook = json.loads(path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=notebook_page(notebook)))
    return files


def _from_root(text: str) -> str:
    """Return a page of the repository's root with its relative links as they are from docs/."""

    def moved(link: re.Match[str]) -> str:
        title, target, anchor = link[1], link[2], link[3] or ""
        if re.match(r"[a-z]+:", target):
            return link[0]
        pages = {source: page for page, source in PAGES.items()}
        target = pages.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}")
        # Executed notebooks are pages of the site.
        target = re.sub(r"\.ipynb$", ".md", target)
        return f"[{title}]({target}{anchor})"

    text = re.sub(r"(!\[[^\]]*\])\(docs/", r"\1(", text)
    return re.sub(r'(<img[^>]*src=")docs/', r"\1", LINK.sub(moved, text))


# The reference


def reference() -> dict[str, list[str]]:
    """Return the public names on each page of the reference, by the page's name, in the order of the code."""
    pages: dict[str, list[str]] = {}
    for package, folder in PACKAGES.items():
        homes = _homes(folder / "__init__.py")
        for name in _exported(folder / "__init__.py"):
            if name in homes:
                page = _page_of(package, homes[name])
                pages.setdefault(page, []).append(f"{package}.{name}")
    for module, page in MODULES.items():
        nodes = ast.parse(_file(module).read_text(encoding="utf-8")).body
        names = [node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        pages.setdefault(page, []).extend(f"{module}.{name}" for name in names if not name.startswith("_"))
    return {name: pages[name] for name in sorted(pages)}


def _exported(path: Path) -> list[str]:
    """Return `__all__` of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name != "__version__"]
    raise PluginError(f"{path} has no __all__.")


def _homes(path: Path) -> dict[str, str]:
    """Return the module that each name is imported from, also where only type checkers import it."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names if node.module != "dspa"}


def _page_of(package: str, home: str) -> str:
    """Return the page of a name: its folder or module in the package. All of FSRL is one page."""
    if package == "dspa.fsrl":
        return package
    return ".".join(home.split(".")[:2])


def _file(module: str) -> Path:
    """Return the source of a module of the two packages."""
    package, *parts = module.split(".")
    folder = PACKAGES[package].joinpath(*parts)
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def _reference_path(name: str) -> str:
    return f"reference/{name}.md"


def _reference_page(name: str, members: list[str]) -> str:
    """Return a page with the docstring of a folder or module, and its public names."""
    intro = ast.get_docstring(ast.parse(_file(name).read_text(encoding="utf-8")))
    if not intro:
        raise PluginError(f"{name} has no docstring.")
    return "\n\n".join([f"# `{name}`", intro, *(f"::: {member}" for member in members)]) + "\n"


# Notebooks


def notebook_page(notebook: dict[str, Any]) -> str:
    """Return an executed notebook as Markdown."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _cell_parts(cell)) + "\n"


def _cell_parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [re.sub(r"\.ipynb(?=[)#])", ".md", source)]
    return [f"```python\n{source}\n```", *(_output(output) for output in cell["outputs"])]


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="plot" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    text = "".join(output.get("text") or data["text/plain"])
    return f"```text\n{text.rstrip()}\n```"


# Links


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files that are not pages by the names of those files."""

    def named(link: re.Match[str]) -> str:
        target = link[2]
        if not target.startswith("../"):
            return link[0]
        path = (ROOT / "docs" / Path(page.file.src_uri).parent / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return link[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist.")
        name = str(path.relative_to(ROOT))
        return link[1] if link[1].strip("`") == name else f"{link[1]} (`{name}`)"

    return LINK.sub(named, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that loads something from a network, and note its external links."""
    loaded = [address for match in LOADED.findall(output) for address in match if address]
    if loaded:
        raise PluginError(f"{page.file.src_uri} loads {', '.join(loaded)}. Use a file in docs/.")
    external.update(EXTERNAL.findall(output))
    return output


def on_post_build(config: MkDocsConfig) -> None:
    """List the external links, which need a network and are not checked."""
    log.info("External links, not checked:\n%s", "\n".join(f"  {address}" for address in sorted(external)))
