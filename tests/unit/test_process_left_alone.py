"""Importing the library changes nothing of the program that imports it; only `marl run` sets its own process up."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest

from marl_core.run import host

LIBRARIES = "torch, transformers, peft, datasets, safetensors, requests, rich.progress, typer, yaml, pydantic, pluggy, huggingface_hub"
STATE = """
import atexit, json, logging, os, random, signal, sys, threading, warnings
def state():
    found = {
        "environment": dict(os.environ),
        "warning filters": [str(each) for each in warnings.filters],
        "showwarning": repr(warnings.showwarning),
        "loggers": {name: kept for name, each in logging.root.manager.loggerDict.items() if isinstance(each, logging.Logger)
                    if (kept := [each.level, len(each.handlers), each.propagate, each.disabled]) != [0, 0, True, False]},
        "root logger": [logging.root.level, len(logging.root.handlers)],
        "excepthook": [repr(sys.excepthook), repr(threading.excepthook), repr(sys.unraisablehook)],
        "displayhook": [repr(sys.displayhook), repr(sys.stdout), repr(sys.stderr)],
        "signals": [repr(signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)],
        "atexit": atexit._ncallbacks(),
        "random": hash(random.getstate()),
        "folder": os.getcwd(),
        "threads": threading.active_count(),
        "path": list(sys.path),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        import numpy, transformers
        from transformers.utils import logging as spoken
        found |= {
            "torch's random state": torch.initial_seed(),
            "torch's random numbers": torch.get_rng_state().tolist(),
            "numpy's random numbers": numpy.random.get_state()[1].tolist(),
            "torch's threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
            "torch's dtype and device": [str(torch.get_default_dtype()), str(torch.get_default_device())],
            "gradients": torch.is_grad_enabled(),
            "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
                              torch.backends.cudnn.deterministic, torch.get_float32_matmul_precision()],
            "transformers speaks": [spoken.get_verbosity(), spoken.is_progress_bar_enabled()],
        }
    return found
"""
OURS = """
import importlib, pkgutil
import marl_core, marl_plugins
for name in marl_core.__all__:
    getattr(marl_core, name)
for package in (marl_core, marl_plugins):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ImportError:
            pass  # an extra that isn't installed
"""


def changes(code: str, first: str) -> list[str]:
    """What `code` changes in a new process, after the libraries called `first` have been imported, which change much themselves."""
    after = "after = state()\nprint(json.dumps(sorted(name for name in before if before[name] != after[name])))"
    whole = f"{STATE}\nimport {first}\nbefore = state()\n{code}\n{after}"
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_A_RUN}
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


SET_BY_A_RUN = (host.ALIGN_VARIABLE, *host.KERNEL_CACHE_VARIABLES)


def test_importing_every_module_of_the_library_changes_nothing() -> None:
    assert changes(OURS, LIBRARIES) == []


def environment_after(code: str) -> list[str]:
    """Names that are in the environment after `code`, and weren't before."""
    whole = f"import os\nbefore = set(os.environ)\n{code}\nprint(sorted(set(os.environ) - before))"
    clean = {name: value for name, value in os.environ.items() if name not in SET_BY_A_RUN}
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, env=clean, check=True)
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


def test_naming_runner_first_sets_what_the_libraries_set_and_no_more() -> None:
    assert set(environment_after("from marl_core import Runner")) <= set(environment_after(f"import {LIBRARIES}"))


def test_the_test_sees_what_an_import_could_change() -> None:
    code = (
        "import os, random, warnings\nos.environ['A_NEW_ONE'] = '1'\nwarnings.simplefilter('ignore')\nrandom.seed(0)\n"
        "import torch\ntorch.manual_seed(1)\ntorch.set_num_threads(1 + torch.get_num_threads())"
    )
    expected = {
        "environment",
        "warning filters",
        "random",
        "torch's random state",
        "torch's random numbers",
        "torch's threads",
    }
    assert expected <= set(changes(code, "torch"))


RUN = """
import os, sys
from marl_core.cli.app import main
main(["run", "no-such.yaml"])
from marl_core.cli.app import _set_up_process
_set_up_process({device!r}, {trim!r})
print([name for name in {names!r} if name in os.environ])
"""


@pytest.mark.parametrize(
    ("device", "trim", "set_up"),
    [("cpu", None, True), ("cpu", False, False), ("cuda", None, False), ("cuda", True, True)],
)
def test_the_command_line_sets_its_own_process_up_where_memory_is_trimmed(
    device: str, trim: bool | None, set_up: bool
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_A_RUN}
    names = list(host.KERNEL_CACHE_VARIABLES)
    code = RUN.format(names=names, device=device, trim=trim)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip().splitlines()[-1] == str(names if set_up else [])
