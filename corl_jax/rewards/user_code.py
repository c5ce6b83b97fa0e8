"""Finds and imports the function that a config names in a user's file or module.

`locate` runs in the run's process, the rest in the process of the reward (see `worker`). The
module imports neither JAX nor numpy, so that the process of the reward starts fast.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corl_jax.errors import InputError
from corl_jax.input_files import describe_lfs_pointer, expand_path, is_lfs_pointer
from corl_jax.nearest import suggest_name


@dataclasses.dataclass(frozen=True)
class Source:
    """The file or module that `use` names before its colon."""

    name: str  # as the config spells it
    path: Path | None = None  # None for a module
    content: bytes = b""  # of the file when it was found; later edits affect later runs


def locate(use: str) -> tuple[Source, str]:
    """Returns the file or module of `FILE.py:FUNCTION` or `package.module:FUNCTION`, and FUNCTION.

    A file's path starts at the working directory. The user's code does not run yet.

    Raises: InputError for another form, and for a file that cannot be read.
    """
    name, _, function = use.rpartition(":")  # the last colon: a path may contain one
    if not name or not function.isidentifier():
        raise InputError("expected FILE.py:FUNCTION or package.module:FUNCTION")
    path = Path(expand_path(name))
    if path.suffix == ".py" or os.sep in name or path.is_file():
        if path.suffix != ".py":
            raise InputError(f"found {path.name}; expected a Python file, NAME.py")
        if is_lfs_pointer(path):
            raise InputError(describe_lfs_pointer(path))
        # The content is read now: the process may start again later, and must not then import an
        # edited file.
        try:
            return Source(name, path.resolve(), path.read_bytes()), function
        except OSError as error:
            raise InputError(
                f"cannot read {path} ({error.strerror}); paths start at the working directory, "
                f"{Path.cwd()}"
            ) from None
    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError("expected FILE.py:FUNCTION or package.module:FUNCTION")
    return Source(name), function


def import_module(source: Source) -> types.ModuleType:
    """Runs the user's code once.

    Raises: InputError for code that fails, and for a module that is not there.
    """
    if source.path is not None:
        try:
            return _run_file(source.path, source.content)
        except (Exception, SystemExit) as error:
            raise InputError(_describe_import_error(error)) from error
    try:
        return importlib.import_module(source.name)
    except ModuleNotFoundError as error:
        if not f"{source.name}.".startswith(f"{error.name}."):
            raise InputError(_describe_import_error(error)) from error
        raise InputError(
            f"no module {error.name} is installed; install it, or name a file, PATH.py:FUNCTION"
        ) from None
    except (Exception, SystemExit) as error:
        raise InputError(_describe_import_error(error)) from error


def find_function(module: types.ModuleType, source: str, name: str) -> Callable[..., Any]:
    """Returns the function `name` of the module that the config calls `source`.

    Raises: InputError for a name that is not there or is no function.
    """
    if not hasattr(module, name):
        # Only functions of the user's package: a file also has the names that it imports.
        function_names = [
            key
            for key, value in vars(module).items()
            if inspect.isroutine(value)
            and _get_package(value.__module__) == _get_package(module.__name__)
        ]
        if not function_names:
            raise InputError(f"{source} has no function {name}, nor any other")
        raise InputError(
            f"{source} has no function {name}; {suggest_name(name, function_names, 'found')}"
        )
    function = getattr(module, name)
    if isinstance(function, type) or not callable(function):
        kind = "a class" if isinstance(function, type) else f"of type {type(function).__name__}"
        raise InputError(f"{name} is {kind}; expected a function: def {name}(images, ..)")
    return function


def _get_package(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _run_file(path: Path, content: bytes) -> types.ModuleType:
    """Runs a file as the module that an import from its folder would create."""
    # Under that name, because a process that the file spawns unpickles functions by it.
    name = _name_module(path)
    parent, _, last = name.rpartition(".")
    package = importlib.import_module(parent) if parent else None
    if name in sys.modules:  # the package's __init__.py imports it
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and others look up the module of a class there
    # Not by the loader, which would read the file again. dont_inherit: this module's `from
    # __future__` must not apply to the user's code.
    exec(compile(content, str(path), "exec", dont_inherit=True), module.__dict__)
    if package is not None:  # as an import does: `import package.module` binds package.module
        setattr(package, last, module)
    return module


def _name_module(path: Path) -> str:
    """Returns the module name of a file, and makes the files beside it importable.

    A file in a package gets its dotted name, as pytest names it: the folders above it count as
    long as they have an __init__.py. A name that Python or an installed module has already
    (json.py) gives way to one that hides nothing.
    """
    folder, names = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    free = all(name.isidentifier() for name in names) and not _is_taken(names[0], folder)
    if not free:
        folder, names = path.parent, [path.stem]
    _put_on_path(folder, before_installed=free)
    if path.parent != folder:
        sys.path.append(str(path.parent))  # for those who name files of a package without it
    if free:
        return ".".join(names)
    return f"{path.stem.replace('.', '_')}_{hashlib.sha256(bytes(path)).hexdigest()[:16]}"


def _is_taken(name: str, folder: Path) -> bool:
    """Returns whether Python or an installed module has a top-level name."""
    if name in sys.stdlib_module_names or name in sys.modules:
        return True
    local = (Path.cwd(), folder)
    installed = [entry for entry in sys.path if Path(entry or ".").resolve() not in local]
    spec = importlib.machinery.PathFinder.find_spec(name, installed)
    return spec is not None and spec.loader is not None  # None: a mere folder


def _put_on_path(folder: Path, *, before_installed: bool) -> None:
    """Makes a folder's files importable, before those of the working directory.

    Modules of Python come before both: a file beside the reward must not hide one of them.
    """
    # [stdlib, lib-dynload | cwd, site-packages] -> stdlib, folder, rest; or, for a name that an
    # installed module has, stdlib, installed, folder, cwd.
    python = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    python |= {os.path.join(entry, "lib-dynload") for entry in python}
    first = [entry for entry in sys.path if entry in python]
    rest = [entry for entry in sys.path if entry not in first]
    if before_installed:
        sys.path[:] = [*first, str(folder), *rest]
        return
    here = [entry for entry in rest if Path(entry or ".").resolve() == Path.cwd()]
    installed = [entry for entry in rest if entry not in here]
    sys.path[:] = [*first, *installed, str(folder), *here]


def _describe_import_error(error: BaseException) -> str:
    """Returns why a user's module does not import: where, what and the remedy."""
    if isinstance(error, SyntaxError):
        file, line, text = error.filename, error.lineno, error.text
        problem = f"{type(error).__name__}: {error.msg}"
        remedy = "correct the line"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        skipped = (__file__, importlib.__file__, "<frozen ")
        # The user's first frame; the frames of this module and of importlib say nothing to a user.
        at = next((frame for frame in frames if not frame.filename.startswith(skipped)), None)
        file, line, text = (at.filename, at.lineno, at.line) if at else (None, None, None)
        problem = traceback.format_exception_only(error)[-1].strip()
        remedy = "importing the file must not fail"
    if isinstance(error, ModuleNotFoundError):
        remedy = "install it, or put it beside the file"
    elif isinstance(error, ImportError) and "relative import" in problem:
        remedy = "put an __init__.py into the file's folder, or leave out the dot"
    elif isinstance(error, ImportError) and _is_hidden_by_python(error.name, file):
        remedy = f"{error.name} is a module of Python itself; rename the file beside this one"
    elif isinstance(error, SystemExit):
        remedy = 'move what ends the program under if __name__ == "__main__"'
    place = f"{Path(file).name} line {line}: {(text or '').strip()}: " if file else ""
    return f"{place}{problem}; {remedy}"


def _is_hidden_by_python(name: str | None, file: str | None) -> bool:
    """Returns whether `name` is a module of Python that hides a file beside `file`."""
    hidden = Path(file or "").parent / f"{name}.py"
    return name in sys.stdlib_module_names and Path(file or "") != hidden and hidden.is_file()
