"""Execute the notebook's cells again and keep what they print: `python examples/notebook/make_notebook.py [--model FOLDER]`.

The report's frame is 150 kB of HTML that no repository should hold twice: the stored notebook leaves it out, and shows the curves, in
fewer pixels and colours than curves.png has.
"""

from __future__ import annotations

import argparse
import base64
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = Path(__file__).with_name("short_words.ipynb")
ROOT = NOTEBOOK.parents[2]
PICTURE_WIDTH = 900
"""Pixels: as wide as a notebook shows a picture."""
PICTURE_COLORS = 64


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


def shrunk(output: Any) -> Any:
    """The same output with its picture as wide as it is shown, in a palette of the colours that it has most."""
    written = output.get("data", {}).get("image/png")
    if written is None:
        return output
    picture = Image.open(BytesIO(base64.b64decode(written))).convert("RGB")
    if picture.width > PICTURE_WIDTH:
        picture = picture.resize(
            (PICTURE_WIDTH, round(picture.height * PICTURE_WIDTH / picture.width)), Image.Resampling.LANCZOS
        )
    packed = BytesIO()
    picture.quantize(PICTURE_COLORS).save(packed, "PNG", optimize=True)
    output.data["image/png"] = base64.b64encode(packed.getvalue()).decode()
    return output


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
            cell.outputs = [shrunk(output) for output in done.outputs if is_kept(output)]
    nbformat.write(written, NOTEBOOK)


if __name__ == "__main__":
    main()
