"""The function that an option names, or is: `module:function`, `file.py:function`, or the function itself."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

from marl_core import ConfigError, PluginError, callable_name, near_match, raised_from

MAIN_MODULES = ("__main__", "__mp_main__")
"""The running program; and what a spawned process calls it while it executes it."""
_loaded: dict[Path, tuple[str, ModuleType]] = {}
"""Files executed here, each with the hash of its text."""
_loading: set[Path] = set()
_locks: dict[Path, RLock] = {}


class ExecutedAgain(PluginError):
    """A file that is executed to find a function in it makes a Runner, which would execute it again."""


def problems(target: str | Callable[..., Any]) -> Iterable[str]:
    """Why `target` can't be imported, found without importing it."""
    if not isinstance(target, str):
        return
    location, name = target.rsplit(":", 1)
    file = Path(os.path.expanduser(location))
    is_file = location.endswith(".py")
    if is_file and not os.path.isfile(file):
        yield f"reward.target: there is no file {location!r} (looked in {Path.cwd()}){_near_file(file)}"
    elif (running := _running(location, name)) is not None:
        if _found(running, name) is None:
            yield _not_defined(location, name, running)
    elif is_file:
        yield from _problems_of_file(file, location, name)
    elif not _module_exists(location):
        yield f"reward.target: there is no module {location!r} in this environment; for a file write {location}.py:{name}"


def load(target: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function, imported where it is named; ConfigError when it isn't there, PluginError when its module fails."""
    if not isinstance(target, str):
        return _instance(target, callable_name(target)) if inspect.isclass(target) else target
    location, name = target.rsplit(":", 1)
    try:
        module = _running(location, name) or _imported(location, name)
    except ExecutedAgain:
        raise  # said as it is, by whichever of the two asks
    except FileNotFoundError as error:
        raise ConfigError(f"reward.target: there is no file {location!r} (looked in {Path.cwd()}).") from error
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"reward.target: {location} could not be imported: {type(error).__name__}: {error}. {raised_from(error)}".rstrip()
        ) from error
    function = _found(module, name)
    if not callable(function):
        if module is _running(location, name):
            raise ConfigError(_not_defined(location, name, module) + ".")
        raise ConfigError(f"reward.target: {location} has no function {name!r}.")
    return _instance(function, target) if inspect.isclass(function) else function


def _problems_of_file(file: Path, location: str, name: str) -> Iterable[str]:
    """The same for a file, which is parsed and not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        yield f"reward.target: {location} is not Python: {error}"
        return
    line = _line_of_a_runner(tree)
    if line is not None:
        yield f"reward.target: {_makes_a_runner(location, name)} (line {line})"
        return
    names, name = _defined(tree), name.partition(".")[0]
    computed = any(isinstance(node, ast.If | ast.Try | ast.For | ast.With | ast.AnnAssign) for node in tree.body)
    if name not in names and not computed and "*" not in names:
        near = near_match(name, names)
        hint = f". Did you mean {near!r}?" if near else ""
        yield f"reward.target: {location} defines no {name!r}; it defines {', '.join(sorted(names)) or 'nothing'}{hint}"


def _makes_a_runner(location: str, name: str) -> str:
    return (
        f"{location} is executed to find {name!r} in it, and makes a Runner while that goes on. Put what is only for the program itself "
        'under `if __name__ == "__main__":`'
    )


def _line_of_a_runner(tree: ast.Module) -> int | None:
    """The line where a file makes a Runner when it is imported, as far as that can be seen; None where it doesn't.

    What stands in functions is left out, and what is under an `if`: of that nobody knows without executing it.
    """
    ahead: list[ast.AST] = list(tree.body)
    while ahead:
        node = ahead.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.If):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called == "Runner":
                return node.lineno
        ahead.extend(ast.iter_child_nodes(node))
    return None


def _near_file(file: Path) -> str:
    """The Python file beside a missing one that may be meant, as the end of a sentence."""
    try:
        near = near_match(file.stem, [other.stem for other in file.parent.glob("*.py")], cutoff=0.75)
    except (OSError, ValueError):  # a path that can't be one
        return ""
    return f". Did you mean {str(file.with_name(f'{near}.py'))!r}?" if near else ""


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _module_exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _found(module: ModuleType, name: str) -> Any:
    """What a module calls `function` or `Class.method`; None when there is no such thing."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _not_defined(location: str, name: str, running: ModuleType) -> str:
    """A function that the running program lacks: so far, or because it is another program."""
    if location in MAIN_MODULES and not _is_users_own(running):
        return (
            f"reward.target: {location}:{name} is a function of the Python program that wrote this config, and another one is running; "
            f"start from that program, or move the function into a file and name it: file.py:{name}"
        )
    return (
        f"reward.target: {location} is the running program and has no function {name!r} so far; "
        "define it above the line that makes the Runner"
    )


def _is_users_own(running: ModuleType) -> bool:
    """Whether the running program isn't the command `marl`."""
    spec, file = getattr(running, "__spec__", None), getattr(running, "__file__", None) or ""
    return not (spec is not None and str(spec.name).startswith("marl_core.")) and Path(file).name not in (
        "marl",
        "marl.exe",
    )


def _running(location: str, name: str) -> ModuleType | None:
    """The module of the running program where `location` is that, or a module that Python is importing at this moment: executed again, a
    program that makes a Runner would make another one, and so on for ever.
    """
    mains = [sys.modules[name] for name in MAIN_MODULES if name in sys.modules]
    if location in MAIN_MODULES:
        return next((module for module in mains if _found(module, name) is not None), mains[0] if mains else None)
    if location in sys.modules:
        return sys.modules[location] if _is_being_imported(sys.modules[location]) else None
    file = location if location.endswith(".py") else _file_of(location)
    if file is None:
        return None
    for module in [*mains, *(module for module in list(sys.modules.values()) if _is_being_imported(module))]:
        own = getattr(module, "__file__", None)
        if isinstance(own, str) and _resolved(own) == _resolved(file):
            return module
    return None


def found_running(location: str, name: str) -> Any:
    """What the running program, or a module that is being imported now, calls `name`; None when it isn't there that it is looked for."""
    module = _running(location, name)
    return None if module is None else _found(module, name)


def source_file(location: str) -> str | None:
    """The file of a `file.py` or of a module, as far as it is known without importing anything."""
    if location.endswith(".py"):
        return os.path.expanduser(location)
    if location in sys.modules:
        return getattr(sys.modules[location], "__file__", None)
    file = _file_of(location)
    return file if file is not None and file.endswith(".py") else None


def _file_of(module: str) -> str | None:
    """The file of a module that isn't imported yet; None where its package isn't imported either, so that nothing is imported here."""
    parent = module.rpartition(".")[0]
    if parent and parent not in sys.modules:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin


def _is_being_imported(module: object) -> bool:
    spec = vars(module).get("__spec__") if isinstance(module, ModuleType) else None
    return bool(getattr(spec, "_initializing", False))


def _resolved(file: str | Path) -> Path:
    return Path(os.path.expanduser(file)).resolve()


def _instance(function_class: type, target: str) -> Callable[..., Any]:
    """An instance of a class, which is the reward function."""
    try:
        instance: Callable[..., Any] = function_class()
    except Exception as error:
        raise ConfigError(
            f"reward.target: {target} is a class, and can't be made without arguments ({error}). Make an instance in that module, "
            "and name it."
        ) from error
    if not callable(instance):
        raise ConfigError(
            f"reward.target: {target} is a class without __call__; a reward is a function or a callable instance."
        )
    return instance


def _imported(location: str, name: str) -> ModuleType:
    if not location.endswith(".py"):
        return importlib.import_module(location)
    file = _resolved(location)
    if not file.is_file():
        raise FileNotFoundError(file)
    with _locks.setdefault(
        file, RLock()
    ):  # a second thread waits; the same one comes in again when the file itself names itself
        if file in _loading:
            raise ExecutedAgain(f"reward.target: {_makes_a_runner(location, name)}.")
        _loading.add(file)
        try:
            return _executed(file)
        finally:
            _loading.discard(file)


def _executed(file: Path) -> ModuleType:
    """The file as a module, executed once for each text that it has had."""
    text = file.read_bytes()
    text_hash = hashlib.sha256(text).hexdigest()
    known = _loaded.get(file)
    if known is not None and known[0] == text_hash:
        return known[1]
    name = f"marl_reward_{hashlib.sha256(os.fsencode(file)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} can't be loaded as a module")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    _loaded[file] = (text_hash, module)
    return module
