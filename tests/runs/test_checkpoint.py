"""Checkpoints: the same bits back, on any mesh; no step that is not whole; clear refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from corl_jax.devices.mesh import make_mesh
from corl_jax.errors import GuardError, InputError, SaveError
from corl_jax.runs import checkpoints as run_checkpoints
from corl_jax.runs import fingerprints as run_fingerprints
from corl_jax.runs.checkpoints import Checkpoints, DamagedError
from corl_jax.runs.fingerprints import fingerprint_leaves
from corl_jax.runs.saving import Saver

ROOT = Path(__file__).resolve().parents[2]
STRAGGLERS = 0.05  # seconds in which the reads that were under way beside a failed one come in

# ... and find the event loop closed, about which Python complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: object


def make_state(mesh, seed=0):
    rng = np.random.default_rng(seed)
    spread = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    draw = rng.standard_normal
    params = {
        "dense": {"kernel": jax.device_put(draw((8, 12)).astype(np.float32), spread)},
        "half": jax.device_put(draw((8, 4)).astype(jnp.bfloat16), spread),
        "bias": jax.device_put(np.float32([-0.0, np.inf, np.nan, 1e-42]), everywhere),
        "tokens": jax.device_put(np.arange(5, dtype=np.int32), everywhere),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, everywhere), optimizer.init(params)
    )
    return State(jax.device_put(np.int32(seed), everywhere), params, opt_state)


def abstract(tree, mesh=None):
    def leaf(x):
        place = x.sharding if mesh is None else NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(leaf, tree)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def refusal(function, *args, **options):
    with pytest.raises(InputError) as error:
        function(*args, **options)
    return error.value.problems


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the finished step 7, to be copied, and the state that is in it."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    folder, state = tmp_path_factory.mktemp("saved"), make_state(mesh, 7)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, state, {"config": {"seed": 1}, "position": np.int64(112)})
    return folder, state


def test_the_same_bits_come_back_in_the_same_containers(saved):
    folder, state = saved
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [7]
        found, meta, changes = checkpoints.restore(7, abstract(state), config={"seed": 1})
    assert_same_bits(found, state)
    assert meta == {"config": {"seed": 1}, "position": 112} and changes == []
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (8, 1, 1), (1, 1, 1)])
def test_another_mesh_gets_the_same_bits(saved, sizes):
    folder, state = saved
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    with Checkpoints(folder) as checkpoints:
        found, *_ = checkpoints.restore(7, abstract(state, mesh))
    assert_same_bits(found, state)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(found))


def test_arrays_may_be_donated_while_they_are_being_saved(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def update(tree):
        return jax.tree.map(lambda x: x + 1, tree)

    tree = update({"w": jnp.zeros((1500, 1500)), "step": jnp.int32(0)})
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, tree, {})
            for _ in range(3):
                tree = update(tree)
        for step in range(1, 4):
            found, *_ = checkpoints.restore(step, tree)
            assert np.unique(found["w"]).tolist() == [3 * step - 2] == [int(found["step"])]


def test_the_newest_stay_and_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path / "not" / "there" / "yet", keep=2) as checkpoints:
        assert checkpoints.steps() == []
        for step in (3, 10, 200):
            assert checkpoints.save(step, {"x": jnp.float32(step)}, {})
        assert checkpoints.steps() == [10, 200]
        assert not checkpoints.save(200, {"x": jnp.float32(0)}, {})
        tree, *_ = checkpoints.restore(200, {"x": jnp.float32(0)})
        assert float(tree["x"]) == 200
    with Checkpoints(checkpoints.directory, keep=2) as checkpoints:
        checkpoints.save(201, {"x": jnp.float32(1)}, {})
        assert checkpoints.steps() == [200, 201]


def test_everything_that_does_not_fit_is_listed(saved):
    folder, state = saved
    wrong = abstract(state)
    place = wrong.step.sharding
    params = dict(wrong.params)
    del params["bias"]
    params["more"] = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=place)
    params["tokens"] = jax.ShapeDtypeStruct((6,), jnp.int32, sharding=place)
    params["half"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=place)
    wrong = dataclasses.replace(wrong, params=params)
    with Checkpoints(folder) as checkpoints:
        found = refusal(checkpoints.restore, 7, wrong)
    text = "\n".join(found)
    assert len(found) == 4 and all(str(folder / "7") in line for line in found)
    for part in (
        "params/more: missing",
        "params/bias: unknown",
        "params/tokens: found (5,) int32, expected (6,) int32",
        "params/half: found (8, 4) bfloat16, expected (8, 4) float32",
    ):
        assert part in text


def test_a_changed_option_is_named_before_any_shape(saved):
    folder, _ = saved
    with Checkpoints(folder) as checkpoints:
        (line,) = refusal(checkpoints.restore, 7, {"x": jnp.zeros(3)}, config={"seed": 2})
        assert "seed: found 2, the run has 1" in line
        (line,) = refusal(checkpoints.restore, 8, {})
        assert "no checkpoint of step 8; present: 7" in line


@pytest.mark.parametrize(
    "name",
    ["meta/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/d", "state", "meta"],
)
@pytest.mark.parametrize("damage", ["removed", "emptied"])
def test_a_damaged_step_is_unreadable_not_wrong(saved, tmp_path, name, damage):
    folder, state = saved
    shutil.copytree(folder, tmp_path / "c")
    target = tmp_path / "c" / "7" / name
    if damage == "removed":
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    else:
        for path in [target] if target.is_file() else target.rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    with Checkpoints(tmp_path / "c") as checkpoints:
        try:
            found, *_ = checkpoints.restore(7, abstract(state))
        except DamagedError as error:
            (line,) = error.problems
            assert str(tmp_path / "c" / "7") in line and "unreadable checkpoint" in line
        else:  # orbax can do without it
            assert name == "state/_METADATA"
            assert_same_bits(found, state)
    time.sleep(STRAGGLERS)


@pytest.mark.parametrize("version", [1, 99])
def test_a_checkpoint_of_another_version(saved, tmp_path, version):
    folder, state = saved
    shutil.copytree(folder, tmp_path / "c")
    path = tmp_path / "c" / "7" / "meta" / "metadata"
    record = json.loads(path.read_text())
    del record["sha256"]
    record["schema_version"] = version
    if version > 1:
        record["sha256"] = run_fingerprints._hash_record(record)
    path.write_text(json.dumps(record))
    with Checkpoints(tmp_path / "c") as checkpoints:
        (line,) = refusal(checkpoints.restore, 7, abstract(state))
    assert f"found schema version {version}, expected 2" in line


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refusal(Checkpoints, tmp_path / "file")[0]


def test_leaves_need_a_place(saved):
    folder, _ = saved
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="without sharding"):
        checkpoints.restore(7, {"x": jax.ShapeDtypeStruct((), jnp.float32)})


SAVE = """
import resource, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from corl_jax.runs.checkpoints import Checkpoints

mode, directory = sys.argv[1:]
checkpoints = Checkpoints(directory, keep=1)
noise = np.random.default_rng(0).random((3000, 3000), np.float32)
small, large = jnp.arange(4.0), jnp.asarray(noise)
checkpoints.save(1, {"x": small, "large": large}, {"position": 1})
checkpoints.wait()
if mode == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1))
print("ready", flush=True)
checkpoints.save(2, {"x": small + 1, "large": large + 1}, {"position": 2})
if mode == "full":
    try:
        checkpoints.close()
    except RuntimeError as error:
        sys.exit(str(error))
time.sleep(60)
"""


@pytest.mark.parametrize("attempt", range(6))
def test_flipped_bits_are_refused(saved, tmp_path, attempt):
    folder, state = saved
    shutil.copytree(folder, tmp_path / "c")
    rng = np.random.default_rng(attempt)
    files = [path for path in sorted((tmp_path / "c").rglob("d/*")) if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)
    with Checkpoints(tmp_path / "c") as checkpoints:
        try:
            found, *_ = checkpoints.restore(7, abstract(state))
        except InputError as error:
            assert isinstance(error, DamagedError)
        else:  # a byte that carries no value
            assert_same_bits(found, state)
    time.sleep(STRAGGLERS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_fingerprints_see_every_bit_and_every_place(dtype):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (3, 4, 5)).astype(dtype)
    before = fingerprint_leaves({"x": values})
    flipped = values.copy()
    flipped[1, 2, 3] = not flipped[1, 2, 3]
    swapped = values.copy()
    swapped[0], swapped[1] = values[1], values[0]
    assert fingerprint_leaves({"x": flipped}) != before != fingerprint_leaves({"x": swapped})
    if dtype == "float32":  # an even number of signs is what plain sums do not see
        negative = -values
        assert fingerprint_leaves({"x": negative}) != before
    signs = (
        fingerprint_leaves({"x": np.float32([0.0])}),
        fingerprint_leaves({"x": np.float32([-0.0])}),
    )
    assert signs[0] != signs[1]


def start(mode, directory):
    command = [sys.executable, "-c", SAVE, mode, str(directory)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_a_save_that_was_killed_is_never_the_latest_step(tmp_path, delay):
    process = start("kill", tmp_path)
    try:
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 600
        while not list(tmp_path.glob("2*tmp*")) and not (tmp_path / "2").exists():
            assert time.monotonic() < deadline
        time.sleep(delay)
    finally:
        process.kill()
        process.communicate()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        latest = max(checkpoints.steps())
        wanted = {"x": jnp.zeros(4), "large": jnp.zeros((3000, 3000))}
        tree, meta, _ = checkpoints.restore(latest, wanted)
        assert meta["position"] == latest and latest in (1, 2)
        assert np.asarray(tree["x"]).tolist() == [latest - 1 + i for i in range(4)]
        original = np.random.default_rng(0).random((3000, 3000), np.float32)
        np.testing.assert_array_equal(tree["large"], original + np.float32(latest - 1))
        checkpoints.save(3, tree, {})
        assert checkpoints.steps() == [3]
    assert not list(tmp_path.glob("*tmp*"))


def test_a_full_disk_is_an_error_and_the_step_before_stays(tmp_path):
    process = start("full", tmp_path)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "the checkpoint of step 2 could not be written" in errors
    assert "File too large" in errors and len(errors.splitlines()) == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        tree, *_ = checkpoints.restore(1, {"x": jnp.zeros(4), "large": jnp.zeros((3000, 3000))})
        assert np.asarray(tree["x"]).tolist() == [0, 1, 2, 3]
        assert checkpoints.save(2, tree, {})
        assert checkpoints.steps() == [1, 2]


def test_what_comes_after_a_failed_save_is_removed_by_the_next(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        # The first save waits until orbax's thread has removed what it found on opening. That
        # thread would remove the folder below at the same time.
        checkpoints.save(0, {"x": jnp.arange(4)}, {})
        checkpoints.wait()
        full = shutil.disk_usage(tmp_path)._replace(free=0)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: full)
            with pytest.raises(SaveError, match="step 1"):
                checkpoints.save(1, {"x": jnp.arange(4)}, {})
        part = tmp_path / "1.orbax-checkpoint-tmp"
        for then in (
            lambda: checkpoints.save(2, {"x": jnp.arange(4)}, {}),
            checkpoints.wait,
            checkpoints.close,
        ):
            (part / "state").mkdir(parents=True)
            (part / "state" / "late").write_bytes(b"x")
            then()
            assert not part.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]


# ---- failures on the way out


def broken(*args):
    raise SaveError("no room")


def test_a_thread_of_a_reported_failure_that_ends_late_is_no_second_failure(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        errors = [FileNotFoundError("removed meanwhile")]
        wait = checkpoints._manager.wait_until_finished

        def wait_or_fail() -> None:
            wait()
            if errors:
                raise errors.pop()

        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", wait_or_fail)
        assert checkpoints.wait() is None and not errors
        checkpoints.save(1, {"x": jnp.zeros(2)}, {})
        assert checkpoints.wait() == 1
        checkpoints.save(2, {"x": jnp.zeros(2)}, {})
        errors.append(OSError("disk full"))
        with pytest.raises(SaveError, match="the checkpoint of step 2 could not be written"):
            checkpoints.wait()


def test_a_save_that_fails_at_the_end_hides_no_other_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoints, "wait", broken)
    with pytest.raises(GuardError), Checkpoints(tmp_path):
        raise GuardError("the loss is not finite")
    assert "warning: no room" in capsys.readouterr().err
    with pytest.raises(SaveError), Checkpoints(tmp_path):
        pass


def test_a_save_under_way_is_given_time_but_not_for_ever(tmp_path, monkeypatch):
    states = [True, True, False]
    with Checkpoints(tmp_path) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "saving", property(lambda self: states.pop(0)))
        checkpoints.await_running_save()
        assert not states
        patch.setattr(run_checkpoints, "RUNNING_SAVE_WAIT_S", 0.3)
        under_way = [True]
        patch.setattr(Checkpoints, "saving", property(lambda self: bool(under_way)))
        checkpoints.await_running_save()
        assert under_way, "it was given up"
        under_way.clear()  # so that its thread ends
        for thread in threading.enumerate():
            if thread.name == "the save under way":
                thread.join()


class Outcomes:
    """Saves that end as listed: by a step or an error."""

    def __init__(self, *listed):
        self.listed = [*listed]

    def wait(self):
        result = self.listed.pop(0)
        if isinstance(result, SaveError):
            raise result
        return result

    poll = wait


def test_the_last_save_counts_not_the_one_before():
    said, noted = [], []
    saver = Saver(Outcomes(SaveError("full"), 4), said.append, 3, noted.append)
    saver.poll()
    saver.finish()
    assert noted == [4] and said[-1] == "checkpoint of step 4 saved"
    for later in (SaveError("full again"), None):
        saver = Saver(Outcomes(SaveError("full"), later), said.append, 3)
        saver.poll()
        with pytest.raises(SaveError, match="full"):
            saver.finish()


def test_a_step_that_cannot_be_noted_is_saved_all_the_same():
    def full(step):
        raise OSError("no space left")

    said = []
    Saver(Outcomes(4), said.append, 1, full).poll()
    assert "warning: step 4 cannot be noted" in said[0] and said[1] == "checkpoint of step 4 saved"
