"""The train command as two processes of two devices equals one process of four, and ends as one.

`alone` and `chain` are the same run of three steps, with evaluation, image grids, checkpoints and
export. In `chain` two processes do the first step, fail in the second, and one process does the
others; or, which takes a compilation in two processes more, does it and two do the third.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas
import pytest
import yaml

from corl_jax.config import files as config_files
from corl_jax.config.schema import Distributed
from corl_jax.devices import processes
from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import ConnectionFailure, GuardError, InputError, exit_on_input_error
from corl_jax.params import leaf_paths
from corl_jax.policies.janus import network
from corl_jax.policies.janus.checkpoint import KIND
from corl_jax.policies.janus.family import FAMILY
from corl_jax.train import __main__ as command
from corl_jax.train import resolve
from corl_jax.weights.checkpoint import load_config, load_params
from tests.support import several_processes, tiny_runs
from tests.support.tiny_runs import metric_lines, write_config

ROOT = Path(__file__).resolve().parents[2]
WITNESS = ROOT / "tests" / "support" / "witness_rewards.py"
# Sums over processes are taken in another order; measured after two steps: 3e-8 in 9 of 225 arrays.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
FAILING_CALL = 4  # of the reward of answers: two batches are evaluated, and a step is done


@pytest.mark.parametrize(("index", "prefix"), [(0, ""), (1, "process 1: ")])
def test_warnings_are_printed_with_their_process(index, prefix):
    code = (
        "import logging, warnings\n"
        "from corl_jax.devices.processes import _prefix_warnings\n"
        f"_prefix_warnings({index})\n"
        "warnings.warn('of Python')\n"
        "logging.getLogger('other').warning('of a logger')\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert printed.count("of Python") == 1 and f"\n{prefix}of a logger" in printed
    assert printed.startswith(f"{prefix}<string>:4: UserWarning: of Python")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet", 20)


def run_options(model: Path, rows: Path, folder: Path, **changes) -> dict:
    """A unified run with everything on, in pieces and micro-batches."""
    seen = folder / "seen"
    seen.mkdir(parents=True)
    own = [
        {"use": f"{WITNESS}:{name}", "options": {"folder": str(seen)}, "max_failures": 1}
        for name in ("answers", "drawings")
    ]
    common = {
        "rollout": {"batch_prompts": 4},
        "rewards": own,
        "train": {"max_steps": 3, "prompts_per_step": 8, "micro_batch": 4},
        "eval": {"suite": "rewards", "rows": 6, "batch_prompts": 4},
        "log": {"images_every": 3, "samples_every": 1},
        "checkpoint": {"every": 1, "keep": 1},
    }
    return tiny_runs.options(model, rows, folder / "run", **common | changes)


def train_alone(tree: dict, *overrides: str) -> Path:
    """In this process, on four of its devices."""
    make = functools.partial(make_mesh, devices=jax.devices()[:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "make_mesh", make)
        command.main(["--config", str(written(tree)), *overrides])
    return Path(tree["output_dir"])


def written(tree: dict) -> Path:
    return write_config(Path(tree["output_dir"]).with_suffix(".yaml"), tree)


@pytest.fixture(scope="module")
def alone(model, rows, tmp_path_factory):
    return train_alone(run_options(model, rows, tmp_path_factory.mktemp("alone")))


@dataclasses.dataclass
class Chain:
    """One run by several hands."""

    run: Path
    codes: list[int]  # of the two processes that fail
    failing: list[str]  # what they printed
    pairs: list[list[str]]  # what the two printed of each start in which they were two
    starts: int


@pytest.fixture(scope="module", params=["by one", pytest.param("by two", marks=pytest.mark.slow)])
def chain(request, model, rows, tmp_path_factory):
    """A run that two processes begin and `request.param` end."""
    tree = run_options(model, rows, tmp_path_factory.mktemp("chain"))
    run = Path(tree["output_dir"])
    fail = run.parent / "seen" / "fail"
    fail.write_text(str(FAILING_CALL))
    pair = several_processes.train(written(tree))
    codes = [process.wait() for process in pair]
    assert fail.with_name("failed").exists(), pair[1].text
    failing = [process.text for process in pair]
    fail.unlink()
    assert [line["step"] for line in metric_lines(run)] == [0, 1]
    if request.param == "by one":
        train_alone(tree)
        return Chain(run, codes, failing, [failing], starts=2)
    train_alone(tree, "train.stop_after=1")
    assert [line["step"] for line in metric_lines(run)] == [0, 1, 2]
    last = several_processes.finished(several_processes.train(written(tree)))
    return Chain(run, codes, failing, [failing, last], starts=3)


LENGTHS = """
def length(texts, prompt):
    # Equal within the groups of about half of the prompts.
    odd = [sum(map(ord, name)) % 2 for name in prompt]
    return [float(len(text)) if is_odd else 0.5 for text, is_odd in zip(texts, odd)]
"""


@pytest.mark.slow
def test_two_processes_compare_redraw_and_alternate_as_one_does(model, rows, tmp_path):
    logs = []
    for name, train in (
        ("one", train_alone),
        ("two", lambda tree: several_processes.finished(several_processes.train(written(tree)))),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "lengths.py").write_text(LENGTHS)
        tree = tiny_runs.options(
            model, rows, folder / "run",
            algorithm={
                "name": "remax", "redraws": 2, "alternate_every": 1, "kl_coef": 0.1,
                "kl_in": "reward", "reference_every": 1, "reference_decay": 0.5,
            },
            rewards=[{"use": f"{folder / 'lengths.py'}:length"}, {"name": "t2i_pixel_mse"}],
            rollout={"batch_prompts": 4}, train={"max_steps": 2, "prompts_per_step": 4},
            log={"images_every": 0}, export={"layout": "none"}, mesh={"data": 4},
        )  # fmt: skip
        train(tree)
        logs.append([steady(line) for line in metric_lines(folder / "run")])
    assert len(logs[0]) == 2 and logs[0][1]["redraw/batches"] > 0
    for one, two in zip(*logs, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4)


def steady(line: dict) -> dict:
    """A metrics line without what a clock decides."""
    return {k: v for k, v in line.items() if "second" not in k and k != "step_time"}


def seen(run: Path, kind: str) -> set[tuple[str, str]]:
    """What a reward was given by all processes."""
    files = (run.parent / "seen").glob(f"{kind}-*.jsonl")
    return {tuple(json.loads(line)) for file in files for line in file.read_text().splitlines()}


def exported(run: Path, model: Path) -> dict[str, np.ndarray]:
    return dict(leaf_paths(load_params(run / "export", KIND, load_config(model, KIND))))


def assert_same_parameters(found: Path, wanted: Path, model: Path) -> None:
    ours, theirs = exported(found, model), exported(wanted, model)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], err_msg=path, **TOLERANCE)


def assert_same_metrics(found: Path, wanted: Path) -> None:
    ours, theirs = metric_lines(found), metric_lines(wanted)
    for line, other in zip(map(steady, ours), map(steady, theirs), strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if "sampling" not in name:  # differences of rounding
                assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# ---- the same run


@pytest.mark.parametrize("kind", ["answers", "drawings"])
def test_two_processes_sample_what_one_does(chain, alone, kind):
    """All rollouts of the steps, of the evaluations and of the grids."""
    wanted = seen(alone, kind)
    assert len(wanted) > 30
    assert seen(chain.run, kind) == wanted


def test_the_first_of_two_processes_writes_its_own_samples(chain, alone):
    ours, theirs = [
        pandas.read_parquet(run / "samples" / "step_000001.parquet") for run in (chain.run, alone)
    ]
    assert len(theirs) == 2 * len(ours) == 32
    theirs = theirs[theirs.row < 4].reset_index(drop=True)
    for name in ("task", "row", "completion", "prompt", "image", "text", "length"):
        assert list(ours[name]) == list(theirs[name]), name
    for name in ("reward", "advantage"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_two_processes_log_the_same_numbers(chain, alone):
    assert [line["step"] for line in metric_lines(chain.run)] == [0, 1, 2, 3, 3]
    assert_same_metrics(chain.run, alone)


def test_two_processes_end_with_the_same_parameters(chain, alone, model):
    """Over checkpoints that two write and one restores, and the reverse."""
    assert_same_parameters(chain.run, alone, model)
    start = dict(leaf_paths(load_params(model, KIND, load_config(model, KIND))))
    moved = exported(alone, model)["lm_head/kernel"] - start["lm_head/kernel"]
    assert np.abs(moved).max() > 100 * TOLERANCE["atol"]


def test_two_processes_draw_the_same_grids(chain, alone):
    names = ["step_000000.png", "step_000003.png"]
    assert sorted(path.name for path in (chain.run / "images").iterdir()) == names
    for name in names:
        assert (chain.run / "images" / name).read_bytes() == (alone / "images" / name).read_bytes()


def test_only_the_first_process_logs(chain):
    for pair in chain.pairs:
        logged = [re.findall(r"^step \d/3", text, re.M) for text in pair]
        assert logged[0] and not logged[1]
        noted = ["programs are compiled anew" in text for text in pair]
        assert noted == [True, False], "of the cache that both leave alone"
    assert len(list((chain.run / "tensorboard").iterdir())) == chain.starts


# ---- ending


def test_a_reward_that_fails_on_one_process_ends_all(chain):
    assert chain.codes == [1, 1]
    for text in chain.failing:
        assert "process 1: RuntimeError: the judge is out" in text
        assert "process 1: error: reward answers" in text
    assert "process 0: ends, for process 1 failed" in chain.failing[0]


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_never_starts(tmp_path, model, rows, index, figure):
    config = written(run_options(model, rows, tmp_path))
    (one,) = several_processes.train(
        config, "distributed.initialization_timeout_s=2", only=(index,)
    )
    assert one.wait() == 1
    assert f"process {index} of 2 at 127.0.0.1:" in one.text
    assert "waited 2 s, and not all processes came" in one.text
    assert not (tmp_path / "run").exists()
    figure("T4b", fault=f"only process {index} starts", tries=1, losses=0, note="limit 2 s")


def test_bad_input_ends_all_with_its_exit_code(tmp_path, model, rows):
    """Found by both; said once, by the first."""
    tree = run_options(model, tmp_path / "none.parquet", tmp_path)
    pair = several_processes.train(written(tree))
    assert [process.wait() for process in pair] == [2, 2]
    first, second = (process.text for process in pair)
    assert first.count("none.parquet") == 1, first
    assert second.count("none.parquet") <= 1, second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ({"data": 1, "fsdp": 2, "tensor": 2}, {}),
        ({"data": 2, "tensor": 2}, {"algorithm": {"kl_coef": 0.1}}),
        ({"data": 1, "fsdp": 4}, {"lora": {"rank": 3}, "algorithm": {"kl_coef": 0.1}}),
        ({"data": 1, "fsdp": 4}, {"stage": "sft", "rewards": [], "eval": {"suite": "none"}}),
    ],
)
def test_other_layouts(mesh, changes, model, rows, tmp_path):
    """With rewards that ask the policy, and the supervised stage."""
    runs = []
    for name, train in (("alone", train_alone), ("pair", train_as_two)):
        tree = run_options(model, rows, tmp_path / name, **changes)
        if "stage" not in changes:
            asked = {"greedy": False, "max_new_tokens": 4}
            tree["rewards"] += [{"name": "t2i_qa", "options": asked}, {"name": "t2i_ti_sim"}]
        else:
            tree["rollout"].pop("batch_prompts")
        runs.append(train(tree | {"mesh": mesh}, "train.max_steps=2"))
    alone, pair = runs
    assert_same_metrics(pair, alone)
    assert_same_parameters(pair, alone, model)
    for kind in () if "stage" in changes else ("answers", "drawings"):
        assert seen(pair, kind) == seen(alone, kind)


def train_as_two(tree: dict, *overrides: str) -> Path:
    several_processes.finished(several_processes.train(written(tree), *overrides))
    return Path(tree["output_dir"])


HEARTBEAT_S = 10
# The transport names the other's address, if its connection breaks; else jax's coordination
# service the process, after the heartbeat. The first process is a part of that service.
ADDRESS = r"\[127\.0\.0\.1\]:\d+"
NAMES = {
    0: f"{ADDRESS}|coordination service|CoordinationService",
    1: rf"{ADDRESS}|heartbeats\):\s+1\b",
}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_stops_ends_the_other(victim, how, model, rows, tmp_path, figure):
    tree = run_options(model, rows, tmp_path, train={"max_steps": 500, "prompts_per_step": 4})
    pair = several_processes.train(
        written(tree), f"distributed.heartbeat_timeout_s={HEARTBEAT_S}",
        "rollout.batch_prompts=null", "log.images_every=0", "checkpoint.every=500",
    )  # fmt: skip
    while "step 3/" not in pair[0].text:
        assert pair[0].popen.poll() is None, pair[0].text
        time.sleep(0.2)
    began = time.monotonic()
    pair[victim].popen.send_signal(how)
    try:
        assert pair[1 - victim].wait() != 0
        seconds = time.monotonic() - began
    finally:
        pair[victim].popen.kill()
        pair[victim].popen.wait()
    text = pair[1 - victim].text
    named = re.search(NAMES[victim], text) is not None
    row, fault = {signal.SIGKILL: ("T3", "killed"), signal.SIGSTOP: ("T4", "stopped")}[how]
    figure(
        row, fault=f"process {victim} of two {fault}", tries=1, losses=not named,
        note=f"heartbeat {HEARTBEAT_S} s, the other ends after {seconds:.1f} s",
    )  # fmt: skip
    assert named, text[-3000:]


LAUNCH = ROOT / "docs/examples/launch"


def test_the_example_of_several_processes_on_one_machine(tmp_path, model, rows):
    """Checks the config with two processes; the first one reports."""
    config = written(run_options(model, rows, tmp_path))
    environment = os.environ | {
        "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "PORT": str(several_processes.free_port()),
    }  # fmt: skip
    command = ["sh", str(LAUNCH / "loopback.sh"), "2", str(config), "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'data': 4") == 1, done.stdout
    wrong = subprocess.run(
        [*command, "seed=-1"], env=environment, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2 and "seed: found -1" in wrong.stderr


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU as a mesh needs."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


@pytest.mark.parametrize("script", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_examples_are_well_formed(script):
    text = script.read_text()
    if script.suffix == ".yaml":
        (container,) = _containers(yaml.safe_load(text))
        arguments = container["command"]
        assert arguments[:3] == ["python", "-m", "corl_jax.train"]
        file = ROOT / arguments[arguments.index("--config") + 1]
        config = config_files.load(file, [x for x in arguments if x.startswith("output_dir=")])
        assert config.output_dir == "/runs/corl"
        devices = [Chip(i, i // 4) for i in range(16)]
        sizes = network.PRESETS["janus-pro-1b"]
        resolve.outline_run(config, FAMILY, sizes, FAMILY.stand_in_tokens, devices)
    else:
        shell = text.splitlines()[0].removeprefix("#!")
        subprocess.run([shell, "-n", str(script)], check=True)


def _containers(tree) -> list:
    if isinstance(tree, dict):
        found = [one for value in tree.values() for one in _containers(value)]
        return found + tree.get("containers", [])
    return [one for value in tree for one in _containers(value)] if isinstance(tree, list) else []


# ---- whether to start, and as which


@pytest.fixture
def no_cluster(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", *SLURM):
        monkeypatch.delenv(name, raising=False)


SLURM = {
    "SLURM_JOB_ID": "4096", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
}  # fmt: skip


def settings(**options) -> dict | None:
    return processes._resolve_settings(Distributed(**options))


def test_nothing_starts_without_a_cluster(no_cluster, monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: started.append(1))
    processes.initialize(Distributed())
    assert not started


def test_a_cluster_says_who_this_is(no_cluster, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert settings() == {"address": "node03:61440", "count": 2, "index": 1, "devices": [0]}
    assert settings(coordinator_address="other:1")["address"] == "other:1"
    assert settings(initialize="never") is None
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3")
    assert settings()["devices"] == [0, 1, 2, 3], "one task for all GPUs of a node"


def test_a_cluster_that_makes_no_sense(no_cluster, monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "2(x2)"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="found slurm, whose description cannot be used"):
        settings()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(InputError, match="process_id: found 1 of 1 processes"):
        settings()


def test_the_config_says_who_this_is(no_cluster, monkeypatch):
    given = {"coordinator_address": "host:1", "num_processes": 3, "process_id": 2}
    assert settings(**given) == {"address": "host:1", "count": 3, "index": 2, "devices": None}
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:2")
    assert settings(num_processes=1, process_id=0)["address"] == "host:2"


@pytest.mark.parametrize(
    "options",
    [{"coordinator_address": "host:1"}, {"process_id": 0}, {"initialize": "always"}],
)
def test_half_of_the_settings_are_refused(no_cluster, options):
    with pytest.raises(InputError) as error:
        settings(**options)
    missing = {"coordinator_address", "num_processes", "process_id"} - options.keys()
    assert len(error.value.problems) == len(missing)
    for name in missing:
        assert f"distributed.{name}: not given" in str(error.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"coordinator_address": "host"}, "expected HOST:PORT"),
        ({"process_id": 2, "num_processes": 2}, "found 2 of 2 processes; expected 0 to 1"),
    ],
)
def test_contradictions_are_refused_with_the_config(model, rows, tmp_path, options, part):
    tree = run_options(model, rows, tmp_path) | {"distributed": options}
    with pytest.raises(InputError, match=part):
        config_files.validate(tree, "test")


def test_a_coordinator_that_cannot_be(tmp_path, model, rows):
    """A port that another program has taken."""
    config = written(run_options(model, rows, tmp_path))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (one,) = several_processes.train(
            config, "distributed.initialization_timeout_s=600", only=(0,), port=port
        )
        assert one.wait() == 2
    expected = f"error: distributed: process 0 of 2 at 127.0.0.1:{port}: port {port} cannot be "
    assert f"{expected}opened (Address already in use); give coordinator_address" in one.text


def test_something_runs_before_the_others_hear_of_a_failure(monkeypatch):
    order = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes, "_publish_failure", lambda failure: order.append("told") or failure
    )
    monkeypatch.setattr(processes, "_end_process", lambda failure: order.append(failure["code"]))
    with processes.fail_together(lambda: order.append("first")):
        raise GuardError("the loss is not finite")
    assert order == ["first", "told", 3]


def test_a_connection_that_fails_is_no_bad_input(no_cluster, monkeypatch):
    def late(*args, **options):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out")

    monkeypatch.setattr(jax.distributed, "initialize", late)
    with pytest.raises(ConnectionFailure) as error:
        processes.initialize(
            Distributed(coordinator_address="127.0.0.1:1", num_processes=2, process_id=1)
        )
    text = str(error.value)
    assert "process 1 of 2 at 127.0.0.1:1: DEADLINE_EXCEEDED" in text and "same command" in text
    assert exit_code_of(error.value) == 1


def exit_code_of(error: Exception) -> int | str | None:
    """The code with which a command ends after an error."""

    @exit_on_input_error
    def fail():
        raise error

    with pytest.raises(SystemExit) as exit_:
        fail()
    return exit_.value.code


def test_a_second_start_in_a_process_joins_nobody(no_cluster, monkeypatch):
    """The devices of this process are in use; a single process of a cluster may go on."""

    def refuse(*args, **options):
        raise RuntimeError("must be called before any JAX calls")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    assert jax.devices()
    given = {"coordinator_address": "127.0.0.1:1", "process_id": 0}
    processes.initialize(Distributed(**given, num_processes=1))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    processes.initialize(Distributed(**given, num_processes=2))


@pytest.mark.parametrize(("backend", "cached"), [("cpu", False), ("gpu", True)])
def test_programs_of_cpus_are_compiled_anew(monkeypatch, backend, cached):
    before = jax.config.jax_enable_compilation_cache
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
        processes._disable_cpu_cache(0)
        assert jax.config.jax_enable_compilation_cache, "the user says so"
        monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
        processes._disable_cpu_cache(0)
        assert jax.config.jax_enable_compilation_cache == cached
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
