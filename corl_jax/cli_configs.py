"""Lists the configs and studies that come with the package: `corl-jax configs`."""

from __future__ import annotations

import argparse

from corl_jax.config.shipped import FOLDER, describe_config, list_configs, list_studies
from corl_jax.errors import exit_on_input_error


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Prints name and purpose of each config."""
    parser = argparse.ArgumentParser(prog="corl-jax configs", description=__doc__)
    parser.parse_args(argv)
    width = max(map(len, [*list_configs(), *list_studies()]))
    for name in list_configs():
        print(f"{name:{width}}  {describe_config(name)}")
    print("\nTrain with one: corl-jax train NAME [key=value ...]. Compare variants of one:\n")
    for name in list_studies():
        print(f"{name:{width}}  {describe_config(name)}")
    print(f"\nRun one: corl-jax study NAME [key=value ...]. The files: {FOLDER.resolve()}")


if __name__ == "__main__":
    main()
