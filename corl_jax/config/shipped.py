"""The configs and studies that come with the package, by their names without `.yaml`."""

from __future__ import annotations

from pathlib import Path

from corl_jax.errors import InputError
from corl_jax.input_files import expand_path
from corl_jax.nearest import suggest_name

# In a clone a link to the folder `configs` at the top; in an installed package its files.
FOLDER = Path(__file__).parents[1] / "configs"


STUDIES = "studies"
"""The folder of studies in FOLDER; all other files are configs."""


def list_configs() -> list[str]:
    """Returns the names, such as `mini/unified`, in alphabetical order."""
    return [name for name in _list_names() if not name.startswith(f"{STUDIES}/")]


def list_studies() -> list[str]:
    """Returns the names, such as `studies/figure1`, in alphabetical order."""
    return [name for name in _list_names() if name.startswith(f"{STUDIES}/")]


def _list_names() -> list[str]:
    files = FOLDER.rglob("*.yaml")
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in files)


def find_config(text: str) -> Path:
    """Returns the file of a config, given by its path or by the name of a shipped one.

    Raises:
        InputError: there is neither.
    """
    return _find_file(text, "config", list_configs())


def find_study(text: str) -> Path:
    """Returns the file of a study, as `find_config` does that of a config."""
    return _find_file(text, "study", list_studies())


def _find_file(text: str, what: str, names: list[str]) -> Path:
    path = Path(expand_path(text))
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path  # whose reader says what is wrong with it
    if text in names:
        return FOLDER / f"{text}.yaml"
    raise InputError(
        f"{what}: found {text!r}, no file and no {what} of the package; {suggest_name(text, names)}"
    )


def name_config(path: str | Path) -> str:
    """Returns the name of a shipped config's file; the path of any other file."""
    file, folder = Path(path).resolve(), FOLDER.resolve()
    if file.is_relative_to(folder):
        return file.relative_to(folder).with_suffix("").as_posix()
    return str(path)


def describe_config(name: str) -> str:
    """Returns the first line of a config's head comment."""
    with (FOLDER / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
