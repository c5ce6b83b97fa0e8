"""The function that a config names in a file or module of the user's, imported with care."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError


def find_function(use: str) -> Callable[..., Any]:
    """What `FILE.py:FUNCTION` or `package.module:FUNCTION` names.

    A file's path starts at the working directory. The file runs once, however often it is named.

    Raises:
        InputError: no such file, module or function, a class, or a file that fails on import.
    """
    source, _, name = use.rpartition(":")
    if not source or not name.isidentifier():
        raise InputError("expected FILE.py:FUNCTION or package.module:FUNCTION")
    module = _module(source)
    if not hasattr(module, name):
        listed = [
            key
            for key, value in vars(module).items()
            if inspect.isroutine(value) and _package(value.__module__) == _package(module.__name__)
        ]
        if not listed:
            raise InputError(f"{source} has no function {name}, nor any other")
        near = difflib.get_close_matches(name, listed, n=1, cutoff=0.0)[0]
        raise InputError(
            f"{source} has no function {name}; did you mean {near}? (found: {', '.join(listed)})"
        )
    function = getattr(module, name)
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise InputError(f"{name} is {kind}; expected a function: def {name}(images, ..)")
    return function


def _package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _module(source: str) -> types.ModuleType:
    path = Path(source)
    if path.suffix == ".py" or os.sep in source or path.is_file():
        if path.suffix != ".py":
            raise InputError(f"found {path.name}; expected a Python file, NAME.py")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"cannot read {path} ({error.strerror}); paths start at the working directory, "
                f"{Path.cwd()}"
            ) from None
        return _run_file(path.resolve(), content)
    if not all(part.isidentifier() for part in source.split(".")):
        raise InputError("expected FILE.py:FUNCTION or package.module:FUNCTION")
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if not f"{source}.".startswith(f"{error.name}."):
            raise InputError(_import_problem(error)) from error
        raise InputError(
            f"no module {error.name} is installed; install it, or name a file, PATH.py:FUNCTION"
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(_import_problem(error)) from error


@functools.cache
def _run_file(path: Path, content: bytes) -> types.ModuleType:
    """The module of a file, made once; not found by `import`, so that it hides no other."""
    digest = hashlib.sha256(b"\0".join([bytes(path), content])).hexdigest()
    name = f"{path.stem}_{digest[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and others look up the module of a class there
    try:
        exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise InputError(_import_problem(error)) from error
    return module


def _import_problem(error: BaseException) -> str:
    """Why a user's module does not import: where, what and the remedy."""
    if isinstance(error, SyntaxError):
        file, line, text = error.filename, error.lineno, error.text
        what = f"{type(error).__name__}: {error.msg}"
        remedy = "mend the line"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        skipped = (__file__, importlib.__file__, "<frozen ")
        at = next((frame for frame in frames if not frame.filename.startswith(skipped)), None)
        file, line, text = (at.filename, at.lineno, at.line) if at else (None, None, None)
        what = traceback.format_exception_only(error)[-1].strip()
        remedy = "importing the file must not fail"
    if isinstance(error, ModuleNotFoundError):
        remedy = "install it, or start where Python finds it"
    elif isinstance(error, SystemExit):
        remedy = 'move what ends the program under if __name__ == "__main__"'
    place = f"{Path(file).name} line {line}: {(text or '').strip()}: " if file else ""
    return f"{place}{what}; {remedy}"
