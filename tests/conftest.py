"""What every test runs on: eight virtual CPU devices, one torch thread, a compilation cache.

The devices belong to this process only. A command that a test starts in a subprocess sees one
CPU device, as a user's would. It shares the compilation cache, and what makes compilation cheap,
through the environment.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it when it is first imported
# XLA reads it when the first device is used: how many threads it may use. A thread waits in each
# collective for the other devices, so with one per device two that a program may run in either
# order can wait for each other for ever, and XLA ends the process.
os.environ.setdefault("NPROC", "32")
# Most of a test's time is compilation, and tiny arrays gain nothing from XLA's slower passes.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
# XLA's emitters of fused loops that are built on MLIR take three times as long to compile as those
# before them. An extra option that another release of XLA does not know is ignored there.
if "xla_backend_extra_options" not in os.environ.get("XLA_FLAGS", ""):
    cheap = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {cheap}".strip()

import jax
import numpy as np
import pytest

from tests.support.fault_table import figure, pytest_terminal_summary  # noqa: F401 (pytest finds them here)

DEVICES = 8

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", DEVICES)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in pytest's own cache folder, which git ignores by itself."""
    # A folder per worker: two processes must not read what the other is half through writing.
    name = "jax-" + os.environ.get("PYTEST_XDIST_WORKER", "main")
    cache = getattr(config, "cache", None)
    folder = str(cache.mkdir(name)) if cache else os.path.join(tempfile.gettempdir(), name)
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # to read a program is always quicker
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for key, value in settings.items():
        jax.config.update(key, value)
        os.environ[key.upper()] = str(value)


LONGEST = (
    "test_bench", "test_several_processes", "test_train_command", "test_quickstart",
    "test_paper_rewards", "test_sampling", "test_plan", "test_train_step", "test_layouts",
    "test_step", "test_lora_run", "test_kills", "test_generate", "test_evaluation",
)  # fmt: skip
"""Files that take longest, in the order in which workers begin them."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts long files first where workers share them: one that comes last keeps one worker busy."""
    if config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Drops a module's compiled programs: each holds memory maps, and a process may have 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@contextlib.contextmanager
def _one_device():
    """Commands in this process see one device; `mesh` of the config is read all the same."""
    from corl_jax.devices.mesh import make_mesh
    from corl_jax.train import resolve

    make = functools.partial(make_mesh, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "make_mesh", make)
        yield


@pytest.fixture
def one_device():
    with _one_device():
        yield


@pytest.fixture(scope="module")
def module_on_one_device():
    with _one_device():
        yield


# The small model and data of tests that run from files to files. What they are is said in
# `tiny_runs.model_dir` and `tiny_runs.rows_file` alone.


@pytest.fixture(scope="session")
def model(tmp_path_factory, tiny_config):
    """A tiny Janus on disk."""
    from tests.support import tiny_runs

    return tiny_runs.model_dir(tmp_path_factory.mktemp("models") / "tiny", tiny_config)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Sixteen rows with all columns."""
    from tests.support import tiny_runs

    return tiny_runs.rows_file(tmp_path_factory.mktemp("data") / "rows.parquet", 16)


@pytest.fixture(scope="session")
def tiny_config():
    """A Janus of a few hundred thousand parameters: every kind of layer, nothing square."""
    from corl_jax.models.llama import LlamaConfig
    from corl_jax.models.siglip import SiglipConfig
    from corl_jax.models.vq import VQConfig
    from corl_jax.policies.janus.network import JanusConfig

    return JanusConfig(
        llama=LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=56, num_layers=3, num_heads=4,
            num_kv_heads=2, head_dim=8, max_position_embeddings=256,
        ),
        siglip=SiglipConfig(
            image_size=16, patch_size=4, hidden_size=24, intermediate_size=40, num_layers=2,
            num_heads=2,
        ),
        vq=VQConfig(
            num_embeddings=48, embed_dim=8, z_channels=16, base_channels=32,
            channel_multiplier=(1, 1, 2), num_res_blocks=1,
        ),
        image_token_embed=40,
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_params(tiny_config):
    """Random float32 parameters of `tiny_config`, large enough for logits to differ.

    Drawn by NumPy: compiling `janus.init` takes longer than the tests that need parameters.
    """
    from corl_jax.params import map_with_path
    from corl_jax.policies.janus import network

    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.15 * rng.standard_normal(leaf.shape).astype(np.float32)
        return jax.numpy.asarray(noise + 1 if path.endswith("/scale") else noise)

    return map_with_path(draw, network.abstract(tiny_config))


@pytest.fixture(scope="module")
def exact_products():
    """Float32 products without shortcuts; a module asks for it by `usefixtures`."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def mesh():
    """Two ways of each kind of parallelism over the eight virtual devices."""
    from corl_jax.devices.mesh import make_mesh

    return make_mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture
def compiled_anew(tmp_path):
    """Compiles what is compiled in the test, which a kept program would not: XLA then warns."""
    from jax.experimental.compilation_cache import compilation_cache

    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", kept)
    compilation_cache.reset_cache()
