"""Objects that a user's Python file defines: ``FILE.py:OBJECT`` is a data set, a network or a recipe.

Nothing is registered: the name says where the object is. So worker processes find it, and so does whoever opens the
run of a config.json.
"""

import functools
import hashlib
import importlib.util
import inspect
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.settings.sources import in_python_file
from experiments.settings.suggestions import unknown


def find(name: str) -> Any:
    """The object that ``FILE.py:OBJECT`` names.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file has an error, or no such object.
    """
    found = in_python_file(name)
    assert found is not None
    path, attribute = found
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}, named by {name}.")
    module = _module(path.resolve())
    own = [key for key in vars(module) if not key.startswith("_")]
    if attribute not in own:
        raise unknown(
            f"object in {path} named", attribute, [key for key in own if _is_defined(module, key)] or ["none"]
        )
    return vars(module)[attribute]


def call(name: str, **given: Any) -> Any:
    """Calls a function of a file, or a class; what it raises is a ValueError that names the line."""
    return told(name, functools.partial(_function(name), **given))


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of a function or a class in a file."""
    function = _function(name)
    if inspect.isclass(function):  # whose metaclass may hide its signature, as nnx's does
        _, *own = inspect.signature(function.__init__).parameters.items()
        return dict(own)
    return dict(inspect.signature(function).parameters)


def _is_defined(module: types.ModuleType, name: str) -> bool:
    """Whether a name of a module is no import."""
    value = vars(module)[name]
    is_code = inspect.isclass(value) or inspect.isroutine(value)
    return value.__module__ == module.__name__ if is_code else not inspect.ismodule(value)


@functools.cache
def _module(path: Path) -> types.ModuleType:
    """The file as a module; its neighbours can be imported as in ``python FILE.py``."""
    module_name = f"file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look it up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    _told(str(path), path, functools.partial(spec.loader.exec_module, module))
    return module


def _function(name: str) -> Any:
    function = find(name)
    if not callable(function):
        raise ValueError(f"{name} must be a function, got {type(function).__name__}.")
    return function


def told(name: str, act: Callable[[], Any]) -> Any:
    """What a call gives; what it raises is a ValueError that names the object and the line of its file."""
    found = in_python_file(name)
    assert found is not None
    return _told(name, found[0].resolve(), act)


def _told(name: str, path: Path, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines = [error.lineno]
        where = f"{name}, line {lines[-1]}" if lines else name
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
