"""Draws images of any prompts, and scores them with networks that predict people's preferences.

    corl-jax evaluate --model DIR --suite preference --prompts FILE --out OUT
        [--images-per-prompt 1] [--scores pickscore,hpsv2,aesthetic,clip]
        [--network NAME=PATH ...]

FILE is a text with one prompt a line, JSON lines with a key prompt, or a .tsv table with a column
Prompt, such as PartiPrompts. It is the check against reward hacking: train on one score, and look
at the others. Prints the mean of each score over the prompts, with its 95% interval (bootstrap over
prompts). clip is twice the cosine of image and prompt. --network gives the place of a network's
weights, as for `corl-jax score`: pickscore, hpsv2, clip, and for aesthetic clip_l14 and aesthetic.

OUT/images has the images. OUT/report.json and OUT/scores.jsonl have the scores, which `corl-jax
compare` reads. OUT/manifest.json records the model, the settings and each image. The same command
continues after an interruption. The settings do not depend on the checkpoint's
generation_config.json.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from corl_jax.errors import InputError, Problems
from corl_jax.evaluate import draw_options
from corl_jax.input_files import expand_path

if TYPE_CHECKING:
    from corl_jax.rewards.networks import CheckedNetwork
    from corl_jax.rewards.registry import BoundReward

Scorer = tuple["BoundReward", list["CheckedNetwork"]]
"""A reward and the networks that it asks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the suite."""
    draw_options.add_arguments(parser)
    parser.add_argument(
        "--scores", metavar="NAME,..", help="scores that are computed (default: all)"
    )
    parser.add_argument(
        "--network", action="append", default=[], metavar="NAME=PATH",
        help="weights of a network of a score",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Checks the arguments, draws, and scores."""
    problems = Problems()
    scorers = problems.attempt(check_scores, args)
    plan = problems.attempt(draw_options.check_arguments, args)
    problems.raise_any()
    assert scorers is not None and plan is not None
    import jax

    from corl_jax.evaluate.draw_run import open_drawing, tell_drawing, tell_plan
    from corl_jax.evaluate.image_scores import score_drawing, tell_scores, write_scores

    tell_plan(plan)
    with open_drawing(plan) as drawing:
        scores = score_drawing(drawing, scorers)
        if jax.process_index() == 0:
            tell_drawing(drawing)
            tell_scores(write_scores(drawing, scores), plan.args.out)


def check_scores(args: argparse.Namespace) -> dict[str, Scorer]:
    """Returns the scores that are asked for, with their networks, which are not loaded yet.

    Raises:
        InputError: unknown scores and networks, and networks whose weights are not there.
    """
    from corl_jax.evaluation.preference import SCORES
    from corl_jax.nearest import suggest_name
    from corl_jax.rewards import networks, registry

    problems, scorers = Problems(), {}
    names = list(SCORES) if args.scores is None else args.scores.split(",")
    for name in names:
        if name not in SCORES:
            known = suggest_name(name, SCORES, "expected some of")
            problems.add(f"--scores: found {name!r}; {known}, with commas between")
    if len(set(names)) < len(names):
        problems.add(f"--scores: found {args.scores}; expected each name once")
    settings = problems.attempt(read_network_settings, args.network)
    for name in names:
        if settings is None or name not in SCORES:
            continue
        reward = registry.bind_reward(SCORES[name], {})
        try:
            checked = networks.check_networks([reward], settings, "float32")
            scorers[name] = (reward, checked)
        except InputError as error:
            options = " and ".join(f"--network {network}=PATH" for network in reward.networks)
            problems.add(
                f"{problem}; give {options}, or leave {name} out of --scores"
                for problem in error.problems
            )
    used = {network for reward, _ in scorers.values() for network in reward.networks}
    if settings is not None and not problems:
        unused = sorted(settings.by_name.keys() - used)
        problems.add(f"--network {name}: no score of --scores asks it" for name in unused)
    problems.raise_any()
    return scorers


def read_network_settings(texts: list[str]) -> Any:
    """Returns the block `networks` of the options --network. Raises: InputError for wrong ones."""
    from corl_jax.config.schema import Networks, RewardNetwork
    from corl_jax.rewards.networks import NETWORKS

    problems, blocks = Problems(), {}
    for text in texts:
        name, _, path = text.partition("=")
        if name not in NETWORKS or not path or name in blocks:
            problems.add(
                f"--network: found {text!r}; expected NAME=PATH, each name once, of "
                f"{', '.join(NETWORKS)}"
            )
            continue
        with problems.collect(f"--network {name}: "):
            blocks[name] = RewardNetwork(path=expand_path(path), dtype="float32")
    problems.raise_any()
    return Networks(**blocks)
