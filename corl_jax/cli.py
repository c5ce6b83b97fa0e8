"""`corl-jax`: every command of the library, each also a module (`python -m corl_jax.train`)."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys

import typer

import corl_jax

TRAINING, USING, FILES = "Train", "Use a model", "Prepare"


@dataclasses.dataclass(frozen=True)
class Command:
    """A row of COMMANDS: a module with a function `main(argv)`, and what --help says of it."""

    module: str
    section: str
    help: str


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "corl_jax.quickstart.__main__",
        TRAINING,
        "Train a small Janus on a CPU in three minutes.",
    ),
    "train": Command("corl_jax.train.__main__", TRAINING, "Train a model; run again to resume."),
    "study": Command(
        "corl_jax.study.__main__",
        TRAINING,
        "Train variants of a config with several seeds, and compare them.",
    ),
    "plan": Command(
        "corl_jax.plan.__main__", TRAINING, "Estimate memory and time of a run, also for TPUs."
    ),
    "configs": Command("corl_jax.cli_configs", TRAINING, "List the configs of the package."),
    "generate": Command(
        "corl_jax.generate", USING, "Generate images, or answer questions about images."
    ),
    "evaluate": Command(
        "corl_jax.evaluate.__main__",
        USING,
        "Measure a model, or score files of answers and images.",
    ),
    "compare": Command(
        "corl_jax.compare.__main__", USING, "Compare two evaluations of the same prompts."
    ),
    "score": Command(
        "corl_jax.score.__main__", USING, "Score images or answers in a file with a reward."
    ),
    "serve": Command("corl_jax.serve.__main__", USING, "Serve a model by HTTP, as OpenAI's API."),
    "report": Command(
        "corl_jax.report.__main__", USING, "Write a page of a run: images, curves, tables."
    ),
    "convert": Command(
        "corl_jax.convert.__main__", FILES, "Convert, inspect and compare checkpoints."
    ),
    "merge": Command(
        "corl_jax.merge.__main__", FILES, "Merge models that were trained from one base."
    ),
    "push": Command("corl_jax.push", FILES, "Upload a model to the Hugging Face hub."),
    "data": Command(
        "corl_jax.data.__main__",
        FILES,
        "Write rows to parquet: of the drawn world, or prompts with questions.",
    ),
}


def make_app() -> typer.Typer:
    """Returns the app that prints help and completes words; `main` runs the commands itself."""
    app = typer.Typer(
        name="corl-jax", no_args_is_help=True, pretty_exceptions_enable=False,
        help="Reinforcement learning for models that understand and generate images, in JAX.",
    )  # fmt: skip

    version = typer.Option(
        False, "--version", is_eager=True, callback=_print_version, help="Print the version."
    )

    @app.callback()
    def accept_version(version: bool = version) -> None:
        """Takes --version, whose callback prints and ends the program."""

    for name, row in COMMANDS.items():
        _add_command(app, name, row)
    return app


def _print_version(is_given: bool) -> None:
    if is_given:
        print(corl_jax.__version__)
        raise typer.Exit


def _add_command(app: typer.Typer, name: str, row: Command) -> None:
    def complete(incomplete: str) -> list[str]:
        from corl_jax.config.shipped import list_configs, list_studies

        names = {"train": list_configs, "study": list_studies}.get(name, list)()
        return [word for word in names if word.startswith(incomplete)]

    words = typer.Argument(None, autocompletion=complete)

    @app.command(name, help=row.help, rich_help_panel=row.section, add_help_option=False)
    def run(arguments: list[str] = words) -> None:
        run_command(name, arguments or [])


def run_command(name: str, argv: list[str]) -> None:
    """Runs a command with its arguments. Its module is imported only now."""
    importlib.import_module(COMMANDS[name].module).main(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs `corl-jax`."""
    arguments = sys.argv[1:] if argv is None else argv
    completing = any(name.startswith("_") and name.endswith("_COMPLETE") for name in os.environ)
    # Past typer, because each command parses its own options, such as --train.max_steps.
    if arguments and arguments[0] in COMMANDS and not completing:
        run_command(arguments[0], arguments[1:])
        return
    make_app()(arguments, prog_name="corl-jax")


if __name__ == "__main__":
    main()
