"""Several processes of one run: they start together, agree, and fail together.

jax.distributed connects them. What it leaves out is here: an error that says what to do when one
of them never starts, and an end for all when one of them fails, with its error.
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

# What jax.distributed.initialize finds out and makes is not public; orbax uses the same client.
from jax._src import distributed
from jax._src.clusters import ClusterEnv

from corl_jax.config.schema import Distributed
from corl_jax.errors import BAD_INPUT_EXIT_CODE, FAILED_EXIT_CODE, InputError

MARGIN_S = 15  # jax ends a process that cannot connect without a word to the user; we come first
POLL_S = 0.5
FAILURE = "corl_jax/failure/"
CACHE_VARIABLE = "JAX_ENABLE_COMPILATION_CACHE"
MAX_CHARACTERS = 20_000  # of a failure's text

# ---- starting


def initialize(options: Distributed) -> None:
    """Joins the other processes, where the config or the cluster says that there are others.

    Before the first use of a device. Exits with code 1 if not all processes come in time, or if
    they cannot be connected.

    Raises:
        InputError: the settings contradict each other, or the cluster's description, or the
            coordinator's port cannot be opened.
    """
    settings = _resolve_settings(options)
    if settings is None:
        return
    address, count, index = (settings[key] for key in ("address", "count", "index"))
    place = f"process {index} of {count} at {address}"
    if index == 0:
        _require_free_port(address, place)
    waiting = threading.Timer(options.initialization_timeout_s, _exit_unconnected, (place, options))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            address, count, index, settings["devices"],
            cluster_detection_method="deactivate",
            initialization_timeout=options.initialization_timeout_s + MARGIN_S,
            heartbeat_timeout_seconds=options.heartbeat_timeout_s,
        )  # fmt: skip
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        print(
            f"error: distributed: {place}: {line}; look for an earlier error in the others' logs, "
            "then give the same command again",
            file=sys.stderr,
        )
        sys.exit(FAILED_EXIT_CODE)
    finally:
        waiting.cancel()
    if count > 1:
        _prefix_warnings(index)
        _watch_for_failures()
        _disable_cpu_cache(index)


def _disable_cpu_cache(index: int) -> None:
    """Keeps programs of several processes on CPUs out of the compilation cache.

    gloo wants the collectives of a program in the same order everywhere, which XLA's programs for
    CPUs seem to lose in the cache: with it GRPO with fsdp ends in "collective mismatch".
    JAX_ENABLE_COMPILATION_CACHE in the environment is left as it is.
    """
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
    """What jax.distributed wants, from the config and the cluster; None to stay alone.

    Raises:
        InputError: listing what is missing or cannot be.
    """
    if options.initialize == "never":
        return None
    address = options.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = {"coordinator_address": address}
    given |= {name: getattr(options, name) for name in ("num_processes", "process_id")}
    kinds = (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)
    cluster = next((kind for kind in kinds if kind.is_env_present()), None)
    if cluster is None:
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given) and options.initialize == "auto":
            return None
        if missing:
            raise InputError(
                f"distributed.{name}: not given, and no cluster was found that says it; give it "
                "to every process, or set distributed.initialize to never"
                for name in missing
            )
    listed = _read_local_devices()
    try:
        detect: Any = ClusterEnv.auto_detect_unset_distributed_params
        address, count, index, devices = detect(
            *given.values(), listed, None, options.initialization_timeout_s
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
    """JAX_LOCAL_DEVICE_IDS, which jax itself reads only where no cluster says which are whose."""
    listed = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if listed is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", listed):
        raise InputError(
            f"JAX_LOCAL_DEVICE_IDS: found {listed!r}, expected numbers of devices such as 0,1,2,3"
        )
    return [int(number) for number in listed.split(",")]


def _require_free_port(address: str, place: str) -> None:
    """Opens the coordinator's port as jax will: where that fails, jax crashes without a word."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:  # which names the place to listen at
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
    print(
        f"error: distributed: {place} waited {options.initialization_timeout_s} s, and not all "
        "processes came; look for an earlier error in the others' logs, check that all can reach "
        "this address and have the same num_processes, or raise "
        "distributed.initialization_timeout_s",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)  # connecting cannot be interrupted


def _prefix_warnings(index: int) -> None:
    """Warnings of all but the first process, whose log is the run's, say where they come from."""
    logging.captureWarnings(True)
    if index and logging.lastResort is not None:
        logging.lastResort.setFormatter(logging.Formatter(f"process {index}: %(message)s"))


# ---- failing


@contextlib.contextmanager
def fail_together(first: Callable[[], None] = lambda: None) -> Iterator[None]:
    """An exception in the block ends all processes with its text and exit code.

    Without this the others wait in their next collective for a process that will not come. With
    one process it does nothing. `first` runs before the others hear of the exception; it has to
    end by itself.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        first()
        _end_process(_publish_failure(_describe_failure(error)))


def _describe_failure(error: BaseException) -> dict[str, Any]:
    problems = getattr(error, "problems", None)  # of those that a user can act on
    if problems is None:
        text = "".join(traceback.format_exception(error)).rstrip()
    else:
        text = "\n".join(f"error: {problem}" for problem in problems)
    code = BAD_INPUT_EXIT_CODE if isinstance(error, InputError) else getattr(error, "exit_code", 1)
    return {"process": jax.process_index(), "code": code, "text": text[-MAX_CHARACTERS:]}


def _publish_failure(failure: dict[str, Any]) -> dict[str, Any]:
    """The first failure of the run: this one, or the one that it follows from."""
    client = distributed.global_state.client
    try:
        client.key_value_set(f"{FAILURE}first", json.dumps(failure))
    except RuntimeError:  # there is one, or the coordinator has died
        with contextlib.suppress(RuntimeError):
            return _read_published() or failure
    return failure


def _read_published() -> dict[str, Any] | None:
    found = distributed.global_state.client.key_value_dir_get(FAILURE)
    return json.loads(found[0][1]) if found else None


_ending = threading.Lock()


def _end_process(failure: dict[str, Any]) -> None:
    """Says why and exits at once: any other way out waits for the other processes."""
    with _ending:
        own = jax.process_index()
        prefix = f"process {failure['process']}: "
        if own in (0, failure["process"]):  # the others would only repeat it
            lines = failure["text"].splitlines()
            print("\n".join(prefix + line for line in lines), file=sys.stderr)
        # An error of its own may still come from another one that is gone.
        cause = "" if own == failure["process"] else f", for process {failure['process']} failed"
        print(f"process {own}: ends{cause}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if own == 0:  # it holds what the others have yet to read
            time.sleep(4 * POLL_S)
        os._exit(failure["code"])


def _watch_for_failures() -> None:
    """Ends this process soon after another one has failed, wherever it waits."""
    stopped = threading.Event()

    def look() -> None:
        while not stopped.wait(POLL_S):
            try:
                failure = _read_published()
            except RuntimeError:  # the coordinator has died, of which jax tells us
                continue
            if failure is not None and not stopped.is_set():
                _end_process(failure)

    thread = threading.Thread(target=look, name="failures of other processes", daemon=True)

    def stop() -> None:
        stopped.set()
        thread.join()

    atexit.register(stop)  # runs before jax lets go of the client
    thread.start()


# ---- agreeing


def broadcast_first(number: int | None) -> int | None:
    """The first process's number (above -1) or None, for a decision that all must share.

    Files that one process sees another may not yet see.
    """
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    found = multihost_utils.broadcast_one_to_all(np.int32(-1 if number is None else number))
    return None if found < 0 else int(found)


def barrier(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def all_gather(values: np.ndarray) -> np.ndarray:
    """[processes, ...]: an array of each process, of the same shape in all."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values)).reshape(-1, *values.shape)


def all_max(value: int) -> int:
    """Over all processes."""
    return int(all_gather(np.array([value], np.int32)).max())


def all_union(numbers: set[int]) -> set[int]:
    """The numbers (from 0 on) of all processes."""
    if jax.process_count() == 1:
        return numbers
    padded = np.full(all_max(len(numbers)), -1, np.int32)
    if not padded.size:
        return set()
    padded[: len(numbers)] = sorted(numbers)
    return set(all_gather(padded).ravel().tolist()) - {-1}
