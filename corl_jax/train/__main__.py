"""Train a Janus: GRPO on both tasks, the supervised stage, or the image tokenizer.

python -m corl_jax.train --config FILE [key=value ...]

Rerunning the same command resumes from the newest checkpoint of its output_dir.
"""

from __future__ import annotations

import argparse

import jax

from corl_jax import config_file, processes, startup
from corl_jax.errors import exit_on_input_error
from corl_jax.train import report, rundir
from corl_jax.train.checkpoint import Checkpoints
from corl_jax.train.loop import train
from corl_jax.train.metrics import Metrics, Phases
from corl_jax.train.planning import Plan, plan
from corl_jax.train.record import Recorder
from corl_jax.train.setup import build
from corl_jax.train.watchdog import Watchdog


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m corl_jax.train",
        description=__doc__,
        epilog="Every option with its default, range and source:\n\n" + config_file.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument(
        "--check",
        action="store_true",
        help="check config, data, weights and mesh, print sizes and steps, and exit",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and exit"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.max_steps=10")
    return parser.parse_intermixed_args(argv)


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse(argv)
    config = config_file.load(args.config, args.overrides)
    if args.print_config:
        print(config_file.dump(config), end="")
        return
    startup.enable_compilation_cache()
    processes.initialize(config.distributed)
    with processes.failing_together():
        planned = plan(config)
        if not args.check:
            run_training(planned)
        elif jax.process_index() == 0:
            print(report.describe(planned))


def run_training(planned: Plan) -> None:
    """Resumes or starts the planned run, to its end or to train.stop_after."""
    config, primary = planned.config, jax.process_index() == 0
    with (
        rundir.opened(config, primary) as directory,
        Checkpoints(
            config.checkpoint.directory or directory.checkpoints, config.checkpoint.keep
        ) as checkpoints,
        jax.set_mesh(planned.mesh),
        processes.failing_together(),  # before anything above waits for the others
    ):
        resumed, before, watched = processes.agreed(checkpoints.latest()), 0.0, {}
        run, state = build(planned, Phases())
        if resumed is not None:
            tree, meta = checkpoints.restore(
                resumed, {"state": state}, config.model_dump(mode="json")
            )
            state = tree["state"]
            planned.train_loader.set_state(meta["data"])
            before, watched = meta["seconds"], meta.get("guards", {})
        start = resumed or 0
        stop = min(run.steps, start + (config.train.stop_after or run.steps))
        stacks = directory.path(f"stacks_{jax.process_index()}.txt")
        with (
            Metrics(directory, resumed, run.steps, primary) as metrics,
            Watchdog(config.guards.step_timeout_s, stacks) as watchdog,
        ):
            recorder = Recorder(
                config, directory, metrics, checkpoints, planned.model_dir, primary, before,
                watchdog=watchdog,
            )  # fmt: skip
            recorder.guards.restore(watched)
            if start == 0:
                recorder.milestone(run, state, 0)
            state = train(run, state, recorder, start, stop)
            if stop == run.steps:
                recorder.finish(run, state)
            elif stop > start:
                recorder.save(run, state, stop)
        checkpoints.wait()
        processes.met("the end")  # jax gives the last to leave no time for its export


if __name__ == "__main__":
    main()
