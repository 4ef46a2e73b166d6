"""The browser that pages are looked at with."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OFFLINE = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--no-first-run"]
Look = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def look(tmp_path_factory: pytest.TempPathFactory) -> Look:
    """`look(address, *options)` opens a page in headless Chromium, without a network."""
    browser = os.environ.get("MARL_BROWSER") or next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        pytest.fail(f"no browser found (looked for {', '.join(NAMES)}, and MARL_BROWSER): no page was looked at")
    profile: Path = tmp_path_factory.mktemp("profile")

    def one(address: str, *options: str) -> subprocess.CompletedProcess[str]:
        plain = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command = [browser, *plain, *OFFLINE, *options, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    return one
