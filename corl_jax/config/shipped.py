"""The configs that come with the package, by their names without `.yaml`."""

from __future__ import annotations

from pathlib import Path

from corl_jax.errors import InputError
from corl_jax.input_files import expand_path
from corl_jax.nearest import suggest_name

# In a clone a link to the folder `configs` at the top; in an installed package its files.
FOLDER = Path(__file__).parents[1] / "configs"


def list_configs() -> list[str]:
    """Returns the names, such as `mini/unified`, in alphabetical order."""
    files = FOLDER.rglob("*.yaml")
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in files)


def find_config(text: str) -> Path:
    """Returns the file of a config, given by its path or by the name of a shipped one.

    Raises:
        InputError: there is neither.
    """
    path = Path(expand_path(text))
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path  # whose reader says what is wrong with it
    if text in list_configs():
        return FOLDER / f"{text}.yaml"
    raise InputError(
        f"config: found {text!r}, no file and no config of the package; "
        f"{suggest_name(text, list_configs())}"
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
