"""Makes the steps of a config as training does, and prints the seconds of each as JSON.

`tools.bench.epoch` starts it for each config. Nothing is logged, saved or evaluated. Weights in the
folder of the config's file are random (see `random_files`).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from corl_jax.config import files as config_files
from corl_jax.config.schema import Config
from corl_jax.devices import startup
from corl_jax.errors import exit_on_input_error
from corl_jax.runs.pace import Phases, StepClock
from corl_jax.train.build import build
from corl_jax.train.resolve import resolve_run
from tools.bench.environment import describe_environment
from tools.bench.random_files import draw_on_reading
from tools.bench.timing import measure_memory


def make_steps(config: Config) -> Iterator[dict[str, Any]]:
    """Yields a record of the start, and one of each step with its seconds by phase."""
    startup.prepare_devices(config.distributed)
    planned = resolve_run(config)
    with jax.set_mesh(planned.mesh):
        began = time.perf_counter()
        run, state = build(planned, Phases())
        jax.block_until_ready(state)
        spent = time.perf_counter() - began
        yield {"record": "built", **describe_environment(), "seconds": spent, **measure_memory()}
        clock = StepClock(run.phases)
        # As `train.loop`, without log and milestones.
        for step, prompts in enumerate(run.train_loader.iterate(0, run.steps)):
            state, iteration = run.iterate(run, state, prompts, step)
            jax.block_until_ready((state, iteration.metrics))
            tokens = {name: x.input_ids.shape[1] for name, x in prompts.encoded.items()}
            seconds = clock.take()
            yield {"record": "step", **seconds, **measure_memory(), "prompt_tokens": tokens}
            clock.restart()


@exit_on_input_error
def main() -> None:
    """Runs the command: its only argument is the file of a config."""
    file = Path(sys.argv[1])
    with draw_on_reading(file.parent):
        for record in make_steps(config_files.load(file)):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
