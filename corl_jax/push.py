"""Uploads a model directory to the Hugging Face hub, after checks of everything that it holds.

corl-jax push runs/mini/unified/export NAME/MODEL [--private] [--revision BRANCH]

DIR is a whole model of any layout, or an adapter of PEFT, with a README.md, such as the export of
a run. Hidden files are left out. The token is that of `hf auth login`, or HF_TOKEN.
Exit codes: 0 done, 1 the upload failed, 2 bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corl_jax.errors import (
    InputError,
    Problems,
    SaveError,
    exit_on_input_error,
    take_first_line,
)
from corl_jax.input_files import parse_path

CARD = "README.md"
HIDDEN = [".*", "**/.*"]  # patterns of names
REFUSED = (400, 401, 403, 404)  # HTTP status of a request that needs a change before it is repeated


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="corl-jax push", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=parse_path, metavar="DIR", help="model directory")
    parser.add_argument("repository", metavar="NAME/MODEL", help="on the hub; made if needed")
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private (default: public)"
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch to upload to; made if needed (default: main)"
    )
    return parser


# ---- checks before the upload


def check_request(folder: Path, repository: str, token: str | None) -> None:
    """Checks what can be checked without reading the model.

    Raises:
        InputError: listing every problem.
    """
    problems = Problems()
    if not folder.is_dir():
        problems.add(f"{folder}: no such directory; expected a model directory, as a run's export")
    elif not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        inner = f"; give {folder / 'export'}" if (folder / "export").is_dir() else ""
        problems.add(f"{folder}: found no config.json, expected a model directory{inner}")
    elif not (folder / CARD).is_file():
        problems.add(
            f"{folder / CARD}: not found, expected the model card; a run's export has one, for "
            "another model write what it is and where it comes from"
        )
    problems.add(_find_name_problems(repository))
    if not token:
        problems.add(
            "token: found none for the Hugging Face hub; make one with write access at "
            "https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
        )
    problems.raise_any()


def _find_name_problems(repository: str) -> list[str]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        return [f"{repository}: not the name of a repository: {take_first_line(error)}"]
    if "/" not in repository:
        return [f"{repository}: found no owner, expected NAME/MODEL"]
    return []


def check_model(folder: Path) -> None:
    """Checks the files of a model, or of an adapter, without reading the weights.

    Raises:
        InputError: listing every problem.
    """
    # Imported here, so that the checks above are answered before jax is loaded.
    from corl_jax.policies import inspect_policy
    from corl_jax.weights.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS
    from corl_jax.weights.storage import open_safetensors, read_json

    if not (folder / ADAPTER_CONFIG).is_file() or (folder / "config.json").is_file():
        inspect_policy(folder)  # refuses a folder with both
        return
    problems = Problems()
    with problems.collect():
        open_safetensors([folder / ADAPTER_WEIGHTS]).close()  # reads the header
    settings = problems.attempt(read_json, folder / ADAPTER_CONFIG) or {}
    base = settings.get("base_model_name_or_path")
    if isinstance(base, str) and (Path(base).is_absolute() or Path(base).exists()):
        problems.add(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {base}, which is on this "
            "machine only; write the hub id of the base model there"
        )
    problems.raise_any()


# ---- the upload


def upload_model(
    api: Any, folder: Path, repository: str, *, private: bool, revision: str | None
) -> str:
    """Uploads a checked directory with a `huggingface_hub.HfApi`; returns the address of it.

    Raises:
        InputError: the hub refuses the request.
        SaveError: the upload has failed.
    """
    with explain_hub_errors(f"{repository}: "):
        # None leaves an existing repository, and the default of an organisation, as they are.
        place = api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision,
            commit_message="Upload a model of corl_jax", ignore_patterns=list(HIDDEN),
        )  # fmt: skip
    return f"{place}/tree/{revision}" if revision else str(place)


@contextmanager
def explain_hub_errors(prefix: str) -> Iterator[None]:
    """Turns an error of the hub's client into an InputError or a SaveError of one line."""
    try:
        yield
    except Exception as error:  # the client raises its own, httpx's, OS errors and ValueErrors
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = getattr(error, "server_message", None)
        words = "; ".join(filter(None, [take_first_line(error), said]))
        reason = f"{prefix}the hub did not take the upload ({words})"
        if status in REFUSED or (status is None and isinstance(error, ValueError)):
            raise InputError(
                f"{reason}; check the name, the metadata of {CARD}, and that the token may write "
                "there: `hf auth whoami`"
            ) from error
        raise SaveError(f"{reason}; the same command uploads what is missing") from error


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = make_parser().parse_args(argv)
    import huggingface_hub

    check_request(args.folder, args.repository, huggingface_hub.get_token())
    check_model(args.folder)
    address = upload_model(
        huggingface_hub.HfApi(), args.folder, args.repository,
        private=args.private, revision=args.revision,
    )  # fmt: skip
    print(f"uploaded {args.folder} to {address}")


if __name__ == "__main__":
    main()
