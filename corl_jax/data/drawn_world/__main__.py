"""The command of the drawn world: writes its rows as parquet; see `generator`."""

from corl_jax.data.drawn_world.generator import main

if __name__ == "__main__":
    main()
