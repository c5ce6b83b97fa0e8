"""Scores images by `geneval` in one of two processes: only the second one's have colours.

    python tests/support/score_geneval_apart.py ADDRESS INDEX DETECTOR CLIP

Prints the scores of its own two images as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from corl_jax.config.schema import Distributed
from corl_jax.devices import processes
from corl_jax.devices.mesh import make_mesh
from corl_jax.evaluation.geneval.detector import make_detector
from corl_jax.rewards.geneval import score_geneval
from corl_jax.rewards.networks import CheckedNetwork, load_frozen_network
from corl_jax.rewards.samples import Context, Samples
from corl_jax.weights.checkpoint import open_checkpoint
from corl_jax.weights.layouts import KINDS
from tests.support.tiny_detector import draw_images

KIND_NAMES = {"mask2former": "mask2former", "clip_l14": "clip"}


def main(address: str, index: int, *folders: str) -> None:
    processes.initialize(
        Distributed(coordinator_address=address, num_processes=2, process_id=index)
    )
    # Each process has its own rows, and a part of the parameters.
    mesh, networks = make_mesh(data=1, fsdp=4, tensor=1), {}
    for (name, kind), folder in zip(KIND_NAMES.items(), folders, strict=True):
        with open_checkpoint(Path(folder), KINDS[kind]) as opened:
            checked = CheckedNetwork(name, Path(folder), opened.parameters, "float32", ())
        networks[name] = load_frozen_network(checked, mesh, offload=True)
    images = [*draw_images(4)[2 * index : 2 * index + 2]]
    with networks["mask2former"].use() as network:
        seen = [next(iter(boxes)) for boxes in make_detector(network).detect(images)]
    demands = []
    for name in seen:
        entry = {"class": name, "count": 1} | ({"color": "red"} if index else {})
        demands.append(json.dumps({"tag": "colors", "prompt": "p", "include": [entry]}))
    context = Context(None, None, None, None, None, 0, 0, networks)
    scores = score_geneval(Samples({"geneval": demands}, images=np.stack(images)), context)
    print(json.dumps(scores.tolist()), flush=True)
    processes.barrier("scored")


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", None)
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
