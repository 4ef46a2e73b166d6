"""The site of the docs: `make docs` builds it into build/site from the same pages that GitHub shows.

Sphinx, because it is kept well (as are MyST and Furo), checks links and anchors between pages, takes the API reference from
docstrings, and its search works from plain files: nothing is fetched when a page is looked at. The source folder is the
repository's root, so that relative links mean here what they mean there.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.ext.autodoc.mock import mock

import marl_core
from marl_core.artifacts.addresses import repository

ROOT = Path(__file__).parents[1]
MODULES = ("marl_core", "marl_core.testing", "marl_core.ppo")
START = ("docs/first-hour", "examples/first_run/README", "docs/metrics", "docs/trouble", "docs/after-training")
GUIDES = (
    "docs/rewards",
    "docs/data",
    "docs/adapters",
    "docs/from-trl",
    "docs/plugins",
    "docs/models",
    "docs/sizes",
    "docs/gpu",
)
LOOK_UP = ("docs/config", "docs/cli", "docs/strategies", "docs/run-folder", "docs/hooks", "docs/api")
BELOW = (
    "docs/architecture",
    "docs/reliability",
    "docs/upstream",
    "benchmarks/NOTES",
    "benchmarks/gpu/README",
    "CONTRIBUTING",
    "SECURITY",
    "CHANGELOG",
)
PYDANTIC = "model_config, model_post_init, model_fields, model_computed_fields"

project = "marl"
author = "the marl maintainers"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/**.md", "benchmarks/*.md", "benchmarks/gpu/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "marl_core", "plugins", "**/.*", "**/node_modules"]
myst_heading_anchors = 4  # the anchors that GitHub gives
default_role = "code"
suppress_warnings = ["ref.python"]  # a type's short name, such as `device`, may be an attribute's of two classes

autodoc_mock_imports = [
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "datasets",
    "bitsandbytes",
]  # heavy, and not needed
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False
toc_object_entries_show_parents = "hide"

highlight_language = "none"  # a block without a language is a command's line, what one printed, or a tree of files

html_theme = "furo"
html_title = f"marl {release}"
html_theme_options = (
    {"source_repository": repository(), "source_branch": "main", "source_directory": ""} if repository() else {}
)
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_search_summary = False  # it fetches pages, which browsers refuse for plain files
html_search_scorer = str(Path(__file__).with_name("scorer.js"))  # Sphinx looks for it where it was started
html_static_path = ["site.css", "excerpts.js"]
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor what a command printed


def navigation() -> str:
    """The toctrees of the first page; a page that nobody listed joins the guides by itself."""
    rest = {f"docs/{page.stem}" for page in (ROOT / "docs").glob("*.md")}.difference(START, GUIDES, LOOK_UP, BELOW)
    examples = {str(page.relative_to(ROOT).with_suffix("")) for page in (ROOT / "examples").glob("*/README.md")}
    parts = {
        "Getting started": START,
        "Guides": [*GUIDES, *sorted(rest)],
        "Examples": ["examples/README", *sorted(examples.difference(START))],
        "Reference": LOOK_UP,
        "How it is built": BELOW,
    }
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 1\n\n"
        + "\n".join(f"/{page}" for page in pages)
        + "\n```\n"
        for caption, pages in parts.items()
    )


def reference() -> str:
    """Every public name with its docstring, for the end of docs/api.md."""
    lines = []
    for module in MODULES:
        lines += [f"\n## {module}, in full\n", "```{eval-rst}", f".. currentmodule:: {module}", ""]
        with mock(autodoc_mock_imports):
            found = importlib.import_module(module)
            for name in sorted(found.__all__, key=str.lower):
                if not name.startswith("__"):
                    lines += directive(name, getattr(found, name))
        lines.append("```")
    return "\n".join(lines) + "\n"


def directive(name: str, found: Any) -> list[str]:
    """autodoc's directive for one public name."""
    if isinstance(found, type):
        return [f".. autoclass:: {name}", "   :members:", f"   :exclude-members: {PYDANTIC}", ""]
    if hasattr(found, "__code__"):
        return [f".. autofunction:: {name}", ""]
    return [
        f".. autodata:: {marl_core._HOME[name]}.{name}",
        "   :no-value:",
        "",
    ]  # the text below the assignment is read there


def add_to_page(app: Any, name: str, source: list[str]) -> None:
    """What GitHub needn't show: navigation, and the reference of all public names."""
    if name.endswith("/result"):
        source[0] = f"---\norphan: true\n---\n\n# What was printed\n\n{source[0]}"
    if name == root_doc:
        source[0] += navigation()
    if name == "docs/api":
        source[0] += reference()


def plain_docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with `code`: make them reStructuredText that says the same."""
    text = "\n".join(lines)
    pieces = re.split(r"(`[^`]+`)", text)
    lines[:] = "".join(
        f"`{piece}`" if piece.startswith("`") else re.sub(r"([*|\\]|(?<=\w)_\b)", r"\\\1", piece) for piece in pieces
    ).split("\n")


def short_names(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """`Tensor` for `torch.Tensor`: what is mocked would be written out."""
    long = re.compile(rf"~?\b(?:{'|'.join(autodoc_mock_imports)})\.(?:\w+\.)*(\w+)")
    if signature is None:
        return None
    return long.sub(r"\1", signature), returns and long.sub(r"\1", returns)


def add_index(app: Any, error: Exception | None) -> None:
    """The first page under the name that servers look for."""
    if error is None:
        shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def add_excerpts(app: Any, error: Exception | None) -> None:
    """The text of each section, from which excerpts.js shows what stands around the words that were searched for."""
    if error is None:
        sections = {page: sections_of(app.env.get_doctree(page)) for page in sorted(app.env.found_docs)}
        data = f"const SECTIONS = {json.dumps(sections, ensure_ascii=False)};\n"
        (Path(app.outdir) / "_static" / "sections.js").write_text(data, encoding="utf-8")


def sections_of(page: nodes.document) -> dict[str, str]:
    """The text of a page's sections by their anchors, each without the sections in it."""
    texts = {}
    for section in page.findall(nodes.section):
        parts = [part.astext() for part in section.children if not isinstance(part, nodes.section | nodes.title)]
        texts[section["ids"][0]] = " ".join(" ".join(parts).split())
    return texts


def load_excerpts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """The page of the search alone shows excerpts."""
    if page == "search":
        app.add_js_file("sections.js")
        app.add_js_file("excerpts.js")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    if "MARL_DOCS_VERSIONS" in os.environ:  # .ci/release.py writes it beside the sites
        app.add_js_file("../../versions.js")
    app.connect("source-read", add_to_page)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("autodoc-process-signature", short_names)
    app.connect("build-finished", add_index)
    app.connect("build-finished", add_excerpts)
    app.connect("html-page-context", load_excerpts)
