"""Draws the images that the harness of a benchmark reads; the harness scores them.

    corl-jax evaluate --model DIR --suite geneval --prompts evaluation_metadata.jsonl --out OUT
    corl-jax evaluate --model DIR --suite geneval2 --prompts geneval2_data.jsonl --out OUT
    corl-jax evaluate --model DIR --suite dpg --prompts ELLA/dpg_bench/prompts --out OUT
    corl-jax evaluate --model DIR --suite wise --prompts WISE/data_verified --out OUT
    corl-jax evaluate --model DIR --suite t2i_compbench --prompts T2I-CompBench/examples/dataset
        --out OUT

The prompts are those of your clone of the harness. OUT/images is what the harness reads, and holds
nothing else. OUT/NEXT.txt has the harness's own command. OUT/manifest.json records the model, the
settings and each image. The same command continues after an interruption; another seed, model,
prompt file or setting in the same OUT is refused.

An image depends on the seed, the number of its prompt and the number of its sample: batch size,
devices and processes change it only by rounding, and two models share their noise. The settings do
not depend on the checkpoint's generation_config.json.

Several processes, as Slurm starts them or with --coordinator-address, --num-processes and
--process-id, share the work; OUT must lie on a file system that all of them see.
"""

from __future__ import annotations

import argparse

from corl_jax.evaluate import draw_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suites."""
    draw_options.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, and draws."""
    plan = draw_options.check_arguments(args)
    # Imported here, so that wrong arguments are answered before the samplers are loaded.
    import jax

    from corl_jax.evaluate.draw_run import open_drawing, tell_drawing, tell_plan

    tell_plan(plan)
    with open_drawing(plan) as drawing:
        if jax.process_index() == 0:
            tell_drawing(drawing)
