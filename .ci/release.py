"""Make a release: look whether this commit may be one, build sdist and wheel, check both, tag, build the docs of all versions.

`make release` does it; `make release ARGS=--try` does all but the tag, and lists what stands in the way of one. Nothing is sent anywhere:
pushing the tag and uploading dist/ are for a person to do, and the last lines say how.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from marl_core.artifacts.addresses import filled  # noqa: E402  of this checkout, not of an installed one

DIST, SITES = ROOT / "dist", ROOT / "build" / "versions"
SWITCH = """document.addEventListener("DOMContentLoaded", () => {
  const here = location.pathname.split("/").find((part) => VERSIONS.includes(part));
  const select = document.createElement("select");
  select.ariaLabel = "version";
  for (const version of VERSIONS) select.add(new Option(version, version, false, version === here));
  select.onchange = () => { location.href = location.href.replace(`/${here}/`, `/${select.value}/`).replace(/#.*/, ""); };
  document.querySelector(".sidebar-brand")?.after(select);
});
"""


def main() -> int:
    """The whole release; 1 when something stands in its way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--try", dest="trying", action="store_true", help="do all but the tag")
    trying = parser.parse_args().trying
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project["version"]
    problems = obstacles(version, project["urls"]["Repository"])
    for problem in problems:
        print(f"release: {problem}", file=sys.stderr)
    if problems and not trying:
        return 1
    build(version, project["urls"]["Repository"])
    print(f"docs of every version: {versioned_docs('latest' if trying else version)}")
    if trying:
        print("tried; no tag was set")
        return 0
    git("tag", "--annotate", f"v{version}", "--message", f"marl-core {version}")  # last: all that may fail has passed
    print(f"tagged v{version}. To publish: git push origin v{version} && {sys.executable} -m twine upload dist/*")
    return 0


def obstacles(version: str, repository: str) -> list[str]:
    """What keeps this commit from being a release, each with what to do."""
    found = []
    if git("status", "--porcelain"):
        found.append("the checkout has changes; commit them or put them away")
    if f"v{version}" in git("tag").split():
        found.append(f"v{version} is a tag already; raise version in pyproject.toml")
    if not re.search(
        rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    ):
        found.append(
            f"CHANGELOG.md has no heading `## {version} (YYYY-MM-DD)`; write the date in place of (unreleased)"
        )
    if filled(repository) is None:
        found.append("Repository in pyproject.toml is a placeholder; write the project's address there")
    return found


def build(version: str, repository: str) -> None:
    """Sdist and wheel (from the sdist) of the commit, checked by twine and by starting what the wheel holds."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        checkout("HEAD", Path(folder))
        readme = Path(folder) / "README.md"
        text = readme.read_text(encoding="utf-8")  # an index shows it without the repository around it
        readme.write_text(
            re.sub(r"\]\((?!\w+:|#)([^)]+)\)", rf"]({repository.rstrip('/')}/blob/v{version}/\1)", text),
            encoding="utf-8",
        )
        python("-m", "build", "--no-isolation", "--outdir", str(DIST), folder, quiet=True)
        files = sorted(map(str, DIST.iterdir()))
        python("-m", "twine", "check", "--strict", *files)
        site = Path(folder) / "installed"
        python(
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            str(site),
            files[0],
        )
        said = python(
            "-m", "marl_core.cli", "--version", env={"PYTHONPATH": str(site)}, cwd=folder + "/installed", quiet=True
        )
        if said.strip() != f"marl-core {version}":
            raise SystemExit(f"release: the wheel says {said!r} and not {version}")


def versioned_docs(newest: str) -> Path:
    """A site for this commit, called `newest`, and one for each tag `v*` in build/versions, with a list in each to switch by."""
    shutil.rmtree(SITES, ignore_errors=True)
    SITES.mkdir(parents=True)
    tags = [tag for tag in git("tag", "--list", "v*", "--sort=-version:refname").split() if tag]
    names = {newest: "HEAD"} | {tag.removeprefix("v"): tag for tag in tags}
    for name, commit in names.items():
        with tempfile.TemporaryDirectory() as folder:
            checkout(commit, Path(folder))
            paths = {"PYTHONPATH": os.pathsep.join((folder, f"{folder}/plugins")), "MARL_DOCS_VERSIONS": "1"}
            python(
                "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(SITES / name), env=paths, cwd=folder
            )
    (SITES / "versions.js").write_text(f"const VERSIONS = {json.dumps(list(names))};\n{SWITCH}", encoding="utf-8")
    first = next(iter(names))
    (SITES / "index.html").write_text(
        f'<meta http-equiv="refresh" content="0; url={first}/index.html">\n', encoding="utf-8"
    )
    return SITES / "index.html"


def checkout(commit: str, folder: Path) -> None:
    """The files of a commit, and nothing else, into a folder."""
    packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


def git(*words: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def python(*words: str, env: dict[str, str] | None = None, cwd: str | Path = ROOT, quiet: bool = False) -> str:
    """Run this Python; what it printed. SystemExit with all of that when it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"release: {' '.join(words[:3])} failed:\n{done.stdout}{done.stderr}")
    if not quiet:
        print(done.stdout, end="")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main())
