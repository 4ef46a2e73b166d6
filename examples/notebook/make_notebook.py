"""Execute the notebook's cells again and keep what they print: `python examples/notebook/make_notebook.py [--model FOLDER]`.

The report's frame is 150 kB of HTML that no repository should hold twice: the stored notebook leaves it out, and shows the curves.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("short_words.ipynb")
ROOT = NOTEBOOK.parents[2]


def execute(folder: Path, **parameters: Any) -> Any:
    """The notebook after its cells ran in `folder`; `parameters` replace values in the cell with the tag `parameters`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            lines = cell.source.splitlines()
            cell.source = "\n".join(
                f"{name} = {parameters[name]!r}" if (name := line.split(" = ")[0]) in parameters else line
                for line in lines
            )
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def is_kept(output: Any) -> bool:
    """Whether a stored notebook shows it: neither the report's frame, nor a bar, nor what this machine's libraries print."""
    kinds = output.get("data", {})
    return output.get("name") != "stderr" and not any(kind == "text/html" or "widget" in kind for kind in kinds)


def main() -> None:
    """Run it as a reader would, at the repository's root, and store the outputs beside the cells as they are written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub name; the notebook's own when absent")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    executed = execute(ROOT, **({"MODEL": given.model} if given.model else {}))
    written = nbformat.read(NOTEBOOK, as_version=4)
    for cell, done in zip(written.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.execution_count = done.execution_count
            cell.outputs = [output for output in done.outputs if is_kept(output)]
    nbformat.write(written, NOTEBOOK)


if __name__ == "__main__":
    main()
