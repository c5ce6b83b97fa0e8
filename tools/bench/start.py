"""Measures the training command from its start to the end of its first step.

    python -m tools.bench.start --size 1b
    python -m tools.bench.start --size 1b --out start.jsonl train.prompts_per_step=8

It first writes a checkpoint of random weights in transformers' layout, and rows with images. Then
`configs/janus_pro_1b/unified.yaml` runs on them, with the rewards that need no network but
the policy: once with an empty compilation cache (`cold`), and once with the cache of that run
(`cached`). That run is saved after its first step, and continued (`resumed`). If the prompts of the
second step are padded to another length, the cache lacks its sampler and its update. Evaluation and
export are off. Seconds are from the start of the process to the end of its first step: imports, the
check of data and weights, loading, compilation, one step.
Arguments after --out are options of the run, as the training command takes them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import yaml

from corl_jax.config import files as config_files
from corl_jax.data.columns import ANSWER_COLUMN
from corl_jax.errors import InputError, exit_on_input_error
from corl_jax.input_files import parse_path
from corl_jax.params import flatten
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.family import FAMILY
from corl_jax.policies.janus.network import JanusConfig
from corl_jax.weights.export_folder import Export, write_export
from corl_jax.weights.kinds import Assets
from corl_jax.weights.sources import MemoryLeaves
from tools.bench import inputs
from tools.bench.random_files import choose_dtypes, draw_values
from tools.bench.scoring import UNIFIED
from tools.bench.sizes import SIZES
from tools.bench.vocabularies import write_processor

ROWS = 64
STEP = re.compile(r"step \d+/")
TINY = {"data.max_prompt_length": 128, "rollout.max_new_tokens": 8, "train.prompts_per_step": 8}


def write_model(folder: Path, config: JanusConfig) -> None:
    """Writes random bfloat16 weights, made on the host, with the mini Janus's tokenizer."""
    # bfloat16, as the published weights are stored: loading reads the same number of bytes.
    abstract = flatten(network.abstract(config))
    dtypes = choose_dtypes(FAMILY, abstract)
    leaves = {path: draw_values(path, x.shape, dtypes[path]) for path, x in abstract.items()}
    write_processor(folder.parent / "words", config)
    assets = Assets(folder.parent / "words", "transformers", folder.parent / "words/config.json")
    folder.mkdir()
    source = MemoryLeaves(leaves)
    write_export(folder, Export(KIND, "transformers", config, source, assets, carried={}))


def write_rows(file: Path, count: int = ROWS, words: int = inputs.CAPTION_WORDS) -> None:
    """Writes rows in the published layout, with answers for supervised training beside it.

    Of more than ROWS the others repeat them; `words` are those of a prompt or a question.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = inputs.make_rows(min(count, ROWS), 1, words=words)
    columns[ANSWER_COLUMN] = columns["qa_solution"]
    columns["real_image"] = [{"bytes": _encode_png(x), "path": ""} for x in columns["real_image"]]
    repeats = -(-count // ROWS)
    columns = {name: (values * repeats)[:count] for name, values in columns.items()}
    pq.write_table(pa.table(columns), file)


def _encode_png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def write_config(folder: Path, size: str, overrides: list[str]) -> Path:
    """Writes the published config with the files of `folder`.

    Raises: InputError for options that the run would refuse.
    """
    options = [f"{key}={value}" for key, value in (TINY if size == "tiny" else {}).items()]
    changed = {
        "output_dir": str(folder / "run"), "model.path": str(folder / "model"),
        "data.path": str(folder / "rows.parquet"), "eval.suite": "none", "eval.every": 0,
        "log.every": 1, "log.images_every": 0, "export.layout": "none",
        "rewards": '[{"name": "t2i_ti_sim"}, {"name": "qa_accuracy"}, {"name": "format"}]',
    }  # fmt: skip
    fixed = changed.keys() - {"rewards"}
    reserved = [override for override in overrides if override.partition("=")[0] in fixed]
    if reserved:
        raise InputError(
            f"{override}: the measurement sets this option; leave it out" for override in reserved
        )
    options += [f"{key}={value}" for key, value in changed.items()]
    config = config_files.load(UNIFIED, [*options, *overrides])
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude_unset=True)), encoding="utf-8")
    return file


def time_first_step(
    config: Path, output_dir: Path, settings: dict[str, str], *, saves: bool = False
) -> float:
    """Runs the training command until its first step has ended; `settings` extend its environment.

    With `saves` it then saves this step and ends by itself.

    Raises: InputError with the command's output, if it ends before.
    """
    environment = os.environ | settings
    began, said = time.perf_counter(), []
    command = [sys.executable, "-m", "corl_jax.train", "--config", str(config)]
    command += [f"output_dir={output_dir}", *(["train.stop_after=1"] if saves else [])]
    seconds = None
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stderr is not None
        try:
            for line in run.stderr:
                said.append(line)
                if seconds is None and STEP.match(line):
                    seconds = time.perf_counter() - began
                    print(f"{output_dir.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
                    if not saves:
                        return seconds
        finally:
            if seconds is None or not saves:
                # At once: a signal that the command handles would let it save first.
                run.kill()
    if seconds is None or run.returncode:
        problem = "no step was made" if seconds is None else "the step was not saved"
        raise InputError(f"{config}: {problem}; the command said: {''.join(said[-20:])}")
    return seconds


def measure(size: str, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """Yields a record for the cold start, one for the start with the cache, one for a resume."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder, size, overrides)
        write_model(folder / "model", SIZES[size].policy)
        write_rows(folder / "rows.parquet")
        settings = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        for start, output in (("cold", "cold"), ("cached", "run"), ("resumed", "run")):
            spent = time_first_step(config, folder / output, settings, saves=start == "cached")
            yield {"record": "start", "size": size, "start": start, "seconds": spent}


@exit_on_input_error
def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=("1b", "tiny"), default="1b")
    parser.add_argument(
        "--out", type=parse_path, metavar="FILE.json", help="one JSON object a line"
    )
    args, overrides = parser.parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the device is the training command's
    lines = []
    for record in measure(args.size, overrides):
        print(
            f"{record['start']:<8}{record['seconds']:6.1f} s to the end of the first step",
            flush=True,
        )
        lines.append(json.dumps(record) + "\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
