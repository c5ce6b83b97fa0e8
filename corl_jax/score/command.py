"""Computes a reward for the cases of a file, as the arguments of `corl-jax score` say."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from corl_jax.config.schema import Networks, Reward, RewardNetwork
from corl_jax.config.yaml_text import parse_yaml
from corl_jax.data.column_values import find_value_problem
from corl_jax.data.images import decode_image
from corl_jax.data.questions import holds_surrogate
from corl_jax.devices.startup import prepare_devices
from corl_jax.errors import InputError, Problems, RewardError
from corl_jax.input_files import LONE_SURROGATE, expand_path, read_text
from corl_jax.policies import inspect_policy, load_policy
from corl_jax.rewards import networks, registry
from corl_jax.rewards.registry import BoundReward, Context, RewardRow, Samples
from corl_jax.rewards.repeated import call_once, describe_differences, describe_failures
from corl_jax.rewards.samples import FrozenNetwork, Policy
from corl_jax.tasks import IMAGES, TEXTS
from corl_jax.types import DTYPES

SHORT = ("problem", "solution", "type")
LENGTH = "num_tokens"
"""Key of a case: the number of tokens of its completion, which the text alone does not tell."""


def run_score(args: argparse.Namespace) -> None:
    """Prints the rewards of the cases, or the list of rewards.

    Raises:
        InputError: listing all problems of the arguments and the input.
        RewardError: a call of the reward failed.
    """
    if args.list:
        print(describe_rewards())
        return
    reward, checked_networks, cases = check_arguments(args)
    context = _load_context(args, reward, checked_networks)
    calls = [call_once(reward, cases.samples, context) for _ in range(args.repeat)]
    traces = {number: call for number, call in enumerate(calls, 1) if isinstance(call, str)}
    if len(traces) < len(calls):
        _print_rewards(reward.name, cases, calls)
    if traces:
        raise RewardError(describe_failures(reward, traces, len(calls)))


def _print_rewards(name: str, cases: Cases, calls: list[np.ndarray | str]) -> None:
    """Prints a line per case, and the mean to stderr. A call that is a str has failed."""
    count = len(cases.lines)
    failed = np.full(count, np.nan, np.float32)
    values = np.stack([failed if isinstance(call, str) else call for call in calls])
    for index, (line, rewards) in enumerate(zip(cases.lines, values.T, strict=True)):
        # 7 digits: float32 has no more, and JSON would print those of a float64.
        numbers = [None if np.isnan(value) else float(f"{value:.7g}") for value in rewards]
        more = {"rewards": numbers} if len(calls) > 1 else {}
        print(json.dumps({"index": index, "line": line, "reward": numbers[0]} | more))
    valid = values[~np.isnan(values)]
    mean = f"mean {valid.mean():.4f}" if valid.size else "no mean"
    text = f"{name}: {mean} over {valid.size} of {values.size} cases"
    if len(calls) > 1:
        ended = np.stack([call for call in calls if not isinstance(call, str)])
        text += f"; {describe_differences(ended, [f'that of line {x}' for x in cases.lines])}"
    print(text, file=sys.stderr)


def describe_rewards() -> str:
    """Returns a text that describes every registered reward."""
    blocks = []
    for name, entry in registry.REGISTRY.items():
        columns = [*entry.columns, *(["|".join(entry.either)] if entry.either else [])]
        columns += [f"[{column}]" for column in entry.optional]
        options = registry.list_options(name).items()
        lines = [
            name,
            f"  {(inspect.getdoc(entry.function) or '').splitlines()[0]}",
            f"  scores {entry.scores}; networks: {_name_networks(entry)}; "
            f"columns: {' '.join(columns) or 'none'}",
            f"  options: {' '.join(f'{k}={o.default}' for k, o in options) or 'none'}",
        ]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _name_networks(entry: RewardRow) -> str:
    chosen = (
        f"{network} ({option}={value})"
        for option, values in entry.chosen.items()
        for value, network in values.items()
    )
    return ", ".join((*entry.networks, *chosen)) or "none"


class Cases:
    """The cases of an input: their line numbers and their samples."""

    def __init__(self, lines: list[int], samples: Samples):
        self.lines = lines
        self.samples = samples


def check_arguments(
    args: argparse.Namespace,
) -> tuple[BoundReward, list[networks.CheckedNetwork], Cases]:
    """Checks arguments and input without a device; returns the reward, its networks and cases.

    Raises:
        InputError: listing all problems of the arguments and the input.
    """
    problems = Problems()
    for name in ("reward", "input"):
        if getattr(args, name) is None:
            problems.add(f"--{name}: missing; expected --reward NAME --input FILE, or --list")
    options = _read_options(args.options, problems)
    if args.seed < 0:
        problems.add(f"--seed: found {args.seed}; expected 0 or more")
    if args.repeat < 1:
        problems.add(f"--repeat: found {args.repeat}; expected 1 or more")
    reward = args.reward and problems.attempt(_bind_reward, args.reward, options)
    used, checked_networks = reward.networks if reward else (), None
    settings = problems.attempt(_read_network_settings, args.network, args.dtype, used)
    if reward and settings:
        checked_networks = problems.attempt(networks.check_networks, [reward], settings, args.dtype)
        unused = networks.find_unused_settings([reward], settings)
        sys.stderr.writelines(f"warning: {line}\n" for line in unused)
    if reward and reward.row.reads_lengths and reward.options["max_tokens"] is None:
        problems.add(
            f"option max_tokens: found null, which is rollout.max_new_tokens of a run; "
            f"{reward.name} needs a number here, max_tokens=N"
        )
    needs_policy = bool(reward and {"policy", "initial"} & set(reward.scorers))
    if needs_policy and not args.model:
        problems.add(f"--model: missing; {reward.name} asks the policy")
    # Without a valid reward it is not known whether the model is needed; its problems are shown.
    elif args.model and (needs_policy or reward is None):
        model = problems.attempt(inspect_policy, args.model)
        if reward and model:
            problems.add(networks.find_scorer_problems(reward, model))
    entry = reward.row if reward else registry.REGISTRY.get(args.reward)
    cases = args.input and problems.attempt(read_cases, args.input, entry)
    problems.raise_any()
    assert reward and checked_networks is not None and cases
    return reward, checked_networks, cases


def _bind_reward(name: str, options: dict[str, Any]) -> BoundReward:
    # In a run a few failures count as "does not apply". This command must show the first one.
    if ":" in name:
        return registry.bind_user_reward(
            Reward(use=name, options=options, max_failures=1), "reward"
        )
    if name in registry.REGISTRY and "max_failures" in registry.list_options(name):
        options = {**options, "max_failures": 1}
    return registry.bind_reward(name, options)


def _read_network_settings(
    texts: list[str], dtype: Literal["float32", "bfloat16"], used: tuple[str, ...]
) -> Networks:
    """Returns the block `networks` of --network and --dtype. The reward runs those in `used`."""
    known, problems, paths = list(networks.NETWORKS), Problems(), {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path or name not in known:
            problems.add(
                f"--network: found {text!r}, expected NAME=PATH with a name of {', '.join(known)}"
            )
        with problems.collect(f"--network {name}: "):
            paths[name] = expand_path(path)
    problems.raise_any()
    blocks: Any = {
        n: RewardNetwork(path=paths.get(n), dtype=dtype if n in used else "float32") for n in known
    }
    return Networks(**blocks)


def _read_options(texts: list[str], problems: Problems) -> dict[str, Any]:
    """Reads the options of key=value arguments; adds their problems to `problems`."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            problems.add(f"argument {text!r}: expected key=value, an option of the reward")
        elif key in options:
            problems.add(f"argument {text!r}: option {key} is given twice")
        else:
            try:
                parsed = parse_yaml(value)
                is_path = key == "scorer" and isinstance(parsed, str)
                options[key] = expand_path(parsed) if is_path else parsed
            except ValueError as error:
                problems.add(f"argument {text!r}: the value cannot be read: {error}")
    return options


def read_cases(path: Path, entry: RewardRow | None) -> Cases:
    """Reads the cases of a JSON lines file. Without an entry it only checks the file itself.

    Raises:
        InputError: listing the problems of all lines.
    """
    text = read_text(path, "JSON lines")
    lines, rows, problems = [], [], Problems()
    # Not splitlines(): it also splits at characters such as U+2028, which JSON strings may have.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        of_line = Problems()
        rows.append(_read_case(line, path.parent, entry, of_line))
        lines.append(number)
        problems.add(of_line, f"{path}: line {number}: ")
    if not lines:
        problems.add(f"{path}: found no cases; expected a JSON object a line")
    if entry and not entry.any_size and not problems:
        problems.attempt(_check_sizes, path, lines, rows)
    problems.raise_any()
    return Cases(lines, _make_samples(entry, rows) if entry else Samples({}, texts=[]))


def _read_case(
    line: str, folder: Path, entry: RewardRow | None, problems: Problems
) -> dict[str, Any]:
    """Reads the values of a line by column name; adds its problems to `problems`."""
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        problems.add(f"not JSON ({error})")
        return {}
    if not isinstance(raw, dict):
        problems.add(f"found {type(raw).__name__}, expected an object")
        return {}
    if entry is None:
        return {}
    known = [*entry.columns, *entry.either, *entry.optional]
    for column in reversed(known):  # so that the first column of a kind takes the short name
        short = column.rpartition("_")[2]
        if short in SHORT and short in raw:
            if column in raw:
                problems.add(f"found both {short} and {column}; drop one")
            raw[column] = raw[short]
    # A null counts as given: only an absent key is missing.
    completion = "completion" if entry.scores == TEXTS else "image"
    needed = [completion, *entry.columns, *([LENGTH] if entry.reads_lengths else [])]
    missing = [name for name in needed if name not in raw]
    if entry.either and not set(entry.either) & raw.keys():
        missing.append(" or ".join(entry.either))
    problems.add(f"{name} is missing; found {', '.join(raw) or 'nothing'}" for name in missing)
    read = raw if entry.every_column else (completion, *known)
    problems.add(
        f"{ascii(name)[1:-1]} {LONE_SURROGATE}"
        for name in read
        if holds_surrogate({name: raw.get(name)})
    )
    row = dict(raw) if entry.every_column else {}
    if entry.reads_lengths and LENGTH in raw:
        row[LENGTH] = problems.attempt(_read_length, raw[LENGTH])
    for name in (completion, *known):
        problem, row[name] = _read_value(name, raw.get(name), folder)
        if entry.any_size and name not in (completion, "real_image"):
            # A user's reward may read these columns in any form, and training does not check them.
            problem = None
        if problem is None and name == completion and name in raw and raw[name] is None:
            problem = f"found null, expected a {'text' if name == 'completion' else 'path'}"
        if problem:
            problems.add(f"{name}: {problem}")
    return row


def _read_length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"{LENGTH}: found {value!r}, expected a number of tokens, 0 or more")
    return value


def _read_value(name: str, value: Any, folder: Path) -> tuple[str | None, Any]:
    """Reads the value of a key; returns (problem or None, value). null fits every key."""
    if value is None:
        return None, None
    if name not in ("image", "real_image"):
        return find_value_problem(name, value), value
    if not isinstance(value, str):
        return f"found {value!r}, expected a path", None
    try:
        return None, decode_image(folder / value)
    except InputError as error:
        return str(error), None


def _check_sizes(path: Path, lines: list[int], rows: list[dict[str, Any]]) -> None:
    """Checks that all images are squares of one size. Raises: InputError if not."""
    # They form one batch.
    sizes = [row["image"].size for row in rows if "image" in row]
    problems = Problems()
    for line, (width, height) in zip(lines, sizes, strict=False):
        if width != height or (width, height) != sizes[0]:
            problems.add(
                f"{path}: line {line}: image: found {width}x{height} pixels, line {lines[0]} has "
                f"{sizes[0][0]}x{sizes[0][1]}; expected squares of one size, as a model makes them"
            )
    problems.raise_any()


def _make_samples(entry: RewardRow, rows: list[dict[str, Any]]) -> Samples:
    # A dict, not a set: columns keep their order.
    names = dict.fromkeys([*entry.columns, *entry.either, *entry.optional])
    if entry.every_column:
        names |= dict.fromkeys(name for row in rows for name in row)
    columns = {
        name: [row.get(name) for row in rows]
        for name in names
        if name not in ("completion", "image")
    }
    if entry.scores == TEXTS:
        lengths = np.array([row[LENGTH] for row in rows]) if entry.reads_lengths else None
        return Samples(columns, texts=[row["completion"] for row in rows], num_tokens=lengths)
    # A reward of the program gets one array [N, S, S, 3], as in training.
    images = [np.asarray(row["image"]) for row in rows]
    return Samples(columns, images=images if entry.any_size else np.stack(images))


def _load_context(
    args: argparse.Namespace, reward: BoundReward, checked_networks: list[networks.CheckedNetwork]
) -> Context:
    model = dtype = None
    # Rewards of images may use a device even without a network. A user's reward prepares its own.
    row = reward.row
    uses_images = row.scores == IMAGES and not row.any_size
    if checked_networks or reward.scorers or uses_images:
        prepare_devices()
    loaded = {
        network.name: networks.load_frozen_network(network, None, offload=False)
        for network in checked_networks
    }
    if {"policy", "initial"} & set(reward.scorers):
        dtype = DTYPES[args.dtype]
        model = load_policy(args.model, dtype)
        # Nothing was trained here, so the model is its initial state too.
        initial = Policy(model.family, model.sizes, model.params, model.processor, dtype)
        loaded["initial"] = FrozenNetwork(initial, SingleDeviceSharding(jax.local_devices()[0]))
    elif args.model:
        print(f"note: {reward.name} asks no policy; --model is not loaded", file=sys.stderr)
    return Context(
        family=model and model.family, config=model and model.sizes,
        params=model and model.params, processor=model and model.processor, dtype=dtype,
        seed=args.seed, step=0, networks=loaded,
    )  # fmt: skip
