"""Connects the processes of a run: they start together, agree, and fail together.

jax.distributed connects them. This module adds an error with a remedy if a process never starts,
and ends all processes with the error of the one that fails.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

# jax.distributed has no public access to its client and its detection of clusters. orbax uses the
# same client. Nor is there public access to whether a device was used.
from jax._src import distributed, xla_bridge
from jax._src.clusters import ClusterEnv

from corl_jax.config.schema import Distributed
from corl_jax.errors import BAD_INPUT_EXIT_CODE, ConnectionFailure, InputError

MARGIN_S = 15  # jax ends a process that cannot connect without a message; ours must come first
POLL_S = 0.5
FAILURE = "corl_jax/failure/"
CACHE_VARIABLE = "JAX_ENABLE_COMPILATION_CACHE"
MAX_CHARACTERS = 20_000  # of a failure's text

# ---- starting


def initialize(options: Distributed) -> None:
    """Joins the other processes, if the config or the cluster names any.

    Must run before the first use of a device. Exits with code 1 if not all processes start in time.
    Does nothing in a process that has joined them before.

    Raises:
        InputError: the settings contradict each other or the cluster's description, or the
            coordinator's port cannot be opened.
        ConnectionFailure: the processes cannot be connected.
    """
    settings = _resolve_settings(options)
    if settings is None or jax.distributed.is_initialized():
        return
    address, count, index = (settings[key] for key in ("address", "count", "index"))
    # A single process that has used its devices, as for sampling, has nobody to join any more.
    if count == 1 and xla_bridge.backends_are_initialized():
        return
    place = f"process {index} of {count} at {address}"
    if index == 0:
        _require_free_port(address, place)
    waiting = threading.Timer(options.initialization_timeout_s, _exit_unconnected, (place, options))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            address, count, index, settings["devices"],
            # The settings are resolved above; jax must not detect others.
            cluster_detection_method="deactivate",
            initialization_timeout=options.initialization_timeout_s + MARGIN_S,
            heartbeat_timeout_seconds=options.heartbeat_timeout_s,
        )  # fmt: skip
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise ConnectionFailure(
            f"distributed: {place}: {line}; look for an earlier error in the others' logs, then "
            "give the same command again"
        ) from error
    finally:
        waiting.cancel()
    if count > 1:
        _prefix_warnings(index)
        _watch_for_failures()
        _disable_cpu_cache(index)


def _disable_cpu_cache(index: int) -> None:
    """Switches the compilation cache off for several processes on CPUs.

    JAX_ENABLE_COMPILATION_CACHE in the environment wins.
    """
    # gloo needs the collectives of a program in the same order everywhere. XLA's programs for CPUs
    # seem to lose it in the cache: GRPO with fsdp then ends in "collective mismatch" (jax 0.10.2).
    if CACHE_VARIABLE in os.environ or jax.default_backend() != "cpu":
        return
    jax.config.update("jax_enable_compilation_cache", False)
    if index == 0:
        print(
            "several processes on CPUs: programs are compiled anew at each start "
            "(docs/explained/reliability.md); "
            f"{CACHE_VARIABLE}=true keeps them",
            file=sys.stderr,
        )


def _resolve_settings(options: Distributed) -> dict[str, Any] | None:
    """Returns the settings for jax.distributed from config and cluster; None to stay alone.

    Raises:
        InputError: listing every setting that is missing or cannot be used.
    """
    if options.initialize == "never":
        return None
    address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    settings = {"coordinator_address": address}
    settings |= {name: getattr(options, name) for name in ("num_processes", "process_id")}
    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    cluster = next((kind for kind in kinds if kind.is_env_present()), None)
    if cluster is None:
        missing = [name for name, value in settings.items() if value is None]
        if len(missing) == len(settings) and options.initialize == "auto":
            return None
        if missing:
            raise InputError(
                f"distributed.{name}: not given, and no cluster was found that says it; give it "
                "to every process, or set distributed.initialize to never"
                for name in missing
            )
    local_devices = _read_local_devices()
    try:
        detect: Any = ClusterEnv.auto_detect_unset_distributed_params
        address, count, index, devices = detect(
            *settings.values(), local_devices, None, options.initialization_timeout_s
        )
    except (ValueError, RuntimeError, LookupError, OSError) as error:
        raise InputError(
            f"distributed: found {cluster.name or cluster.__name__}, whose description cannot be "
            f"used ({type(error).__name__}: {error}); set distributed.coordinator_address, "
            "num_processes and process_id, or distributed.initialize to never"
        ) from error
    if not 0 <= index < count:
        raise InputError(
            f"distributed.process_id: found {index} of {count} processes; expected 0 to {count - 1}"
        )
    return {"address": address, "count": count, "index": index, "devices": devices}


def _read_local_devices() -> list[int] | None:
    """Returns the device numbers of JAX_LOCAL_DEVICE_IDS; None if it is not set."""
    # jax reads the variable only if no cluster tells which devices belong to which process.
    local_devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if local_devices is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", local_devices):
        raise InputError(
            f"JAX_LOCAL_DEVICE_IDS: found {local_devices!r}, "
            "expected device numbers such as 0,1,2,3"
        )
    return [int(number) for number in local_devices.split(",")]


def _require_free_port(address: str, place: str) -> None:
    """Opens and closes the coordinator's port, as a test."""
    # jax opens the port in the same way, and crashes without a message if it cannot.
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:  # another address to listen at
        return
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = address.rpartition(":")[2]
    try:
        socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError, ValueError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else "expected HOST:PORT"
        raise InputError(
            f"distributed: {place}: port {port} cannot be opened ({why}); give "
            "coordinator_address a free port of process 0"
        ) from None


def _exit_unconnected(place: str, options: Distributed) -> None:
    """Prints that not all processes started in time, and exits."""
    print(
        f"error: distributed: {place} waited {options.initialization_timeout_s} s, and not all "
        "processes came; look for an earlier error in the others' logs, check that all can reach "
        "this address and have the same num_processes, or raise "
        "distributed.initialization_timeout_s",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)  # connecting cannot be interrupted


def _prefix_warnings(index: int) -> None:
    """Adds the process number to the warnings of all processes but the first."""
    logging.captureWarnings(True)
    formatter = logging.Formatter(f"process {index}: %(message)s" if index else None)
    # Python gives the logger of captured warnings a handler that prints nothing, unless it has one.
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logger = logging.getLogger("py.warnings")
    logger.addHandler(handler)
    logger.propagate = False
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(formatter)  # prints for loggers without a handler


# ---- failing


@contextlib.contextmanager
def fail_together(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Ends all processes with the text and exit code of an exception in the block.

    With one process it does nothing. `first` is called before the failure is published. It must
    return, because it has no time limit.
    """
    # Without this the others wait in their next collective for a process that has ended.
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        first()
        _end_process(_publish_failure(_describe_failure(error)))


def _describe_failure(error: BaseException) -> dict[str, Any]:
    """Returns number, exit code and text of this process's failure, as JSON values."""
    problems = getattr(error, "problems", None)  # of an InputError
    if problems is None:
        text = "".join(traceback.format_exception(error)).rstrip()
    else:
        text = "\n".join(f"error: {problem}" for problem in problems)
    code = BAD_INPUT_EXIT_CODE if isinstance(error, InputError) else getattr(error, "exit_code", 1)
    return {"process": jax.process_index(), "code": code, "text": text[-MAX_CHARACTERS:]}


def _publish_failure(failure: dict[str, Any]) -> dict[str, Any]:
    """Publishes a failure to all processes. Returns the first failure of the run."""
    client = distributed.global_state.client
    try:
        # The store refuses a key that exists, so the first failure of the run stays.
        client.key_value_set(f"{FAILURE}first", json.dumps(failure))
    except RuntimeError:  # another failure is published, or the coordinator has died
        with contextlib.suppress(RuntimeError):
            return _read_published() or failure
    return failure


def _read_published() -> dict[str, Any] | None:
    """Returns the published failure, if there is one."""
    values = distributed.global_state.client.key_value_dir_get(FAILURE)
    return json.loads(values[0][1]) if values else None


_ending = threading.Lock()


def _end_process(failure: dict[str, Any]) -> None:
    """Prints the failure and exits at once."""
    # Any other way to exit waits for the other processes.
    # Two threads may come here: the one that failed and the one that watches.
    with _ending:
        index = jax.process_index()
        prefix = f"process {failure['process']}: "
        if index in (0, failure["process"]):  # once for the run, and where it failed
            lines = failure["text"].splitlines()
            print("\n".join(prefix + line for line in lines), file=sys.stderr)
        # The error of this process may be a consequence of the one that failed first.
        cause = "" if index == failure["process"] else f", for process {failure['process']} failed"
        print(f"process {index}: ends{cause}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if index == 0:  # the coordinator: the others still have to read the failure
            time.sleep(4 * POLL_S)
        os._exit(failure["code"])


def _watch_for_failures() -> None:
    """Starts a thread that ends this process soon after another one has failed."""
    stopped = threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_S):
            try:
                failure = _read_published()
            except RuntimeError:  # the coordinator has died; jax reports that
                continue
            if failure is not None and not stopped.is_set():
                _end_process(failure)

    thread = threading.Thread(target=poll, name="failures of other processes", daemon=True)

    def stop() -> None:
        stopped.set()
        thread.join()

    atexit.register(stop)  # runs before jax closes the client
    thread.start()


# ---- agreeing


def broadcast_first(number: int | None) -> int | None:
    """Returns the number of the first process (from 0 on, or None) on all processes."""
    # For decisions that depend on files: one process may not yet see files that another one sees.
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    first = multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number))
    return None if first < 0 else int(first)


def barrier(name: str) -> None:
    """Returns when all processes have reached this call."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def all_gather(values: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, [processes, ...]; all have the same shape."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values)).reshape(-1, *values.shape)


def all_max(value: int) -> int:
    """Returns the largest value of all processes."""
    return int(all_gather(np.array([value], np.int32)).max())


def all_union(numbers: set[int]) -> set[int]:
    """Returns the numbers (from 0 on) of all processes."""
    if jax.process_count() == 1:
        return numbers
    # Gathered arrays have the same shape everywhere, so short sets are filled up with -1.
    padded = np.full(all_max(len(numbers)), -1, np.int32)
    if not padded.size:
        return set()
    padded[: len(numbers)] = sorted(numbers)
    return set(all_gather(padded).ravel().tolist()) - {-1}
