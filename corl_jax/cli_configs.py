"""Lists the configs that come with the package: `corl-jax configs`."""

from __future__ import annotations

import argparse

from corl_jax.config.shipped import FOLDER, describe_config, list_configs
from corl_jax.errors import exit_on_input_error


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Prints name and purpose of each config."""
    parser = argparse.ArgumentParser(prog="corl-jax configs", description=__doc__)
    parser.parse_args(argv)
    width = max(map(len, list_configs()))
    for name in list_configs():
        print(f"{name:{width}}  {describe_config(name)}")
    print(f"\nTrain with one: corl-jax train NAME [key=value ...]. The files: {FOLDER.resolve()}")


if __name__ == "__main__":
    main()
