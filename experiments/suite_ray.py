"""The tasks of a suite on Ray: which process they get, their end, and how they are stopped."""

from __future__ import annotations

import logging
import os
import pathlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import drama_jax
from drama_jax.config import ConfigError
from drama_jax.training.signals import stop_requested
from experiments.suite_plan import Options
from experiments.suite_progress import Progress
from experiments.suite_task import Task

_OBJECT_STORE_BYTES = 100_000_000
"""Ray's shared memory on this machine; nothing large goes through it."""
_LOOK_EVERY_S = 0.5
_TOKEN_HINT = "; if the cluster asks for a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file"
_MEMORY = 0.9
"""Share of a GPU's memory that the tasks on it take together."""


def import_ray() -> Any:
    """Ray, imported where it is needed.

    Raises:
      ConfigError: if it is not installed.
    """
    # Nothing is reported to Ray's authors, and a task without a GPU gets no advice about it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("Ray is not installed: run python -m pip install -e '.[suite]'") from error
    return ray


def run(ray: Any, suite: Options, tasks: Sequence[Task], stop: Callable[[], bool]) -> tuple[list[str], bool]:
    """Runs the tasks that are not finished; returns a line for each that failed for good, and whether to stop."""
    _connect(ray, suite)
    try:
        with stop_requested() as stop_now:  # Ray has put a handler of its own in place
            failed = _schedule(ray, suite, tasks, lambda: stop() or stop_now())
            return failed, stop() or stop_now()
    finally:
        ray.shutdown()


def _connect(ray: Any, suite: Options) -> None:
    """Starts Ray on this machine, or joins the cluster."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if suite.ray_address is None:
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        else:
            places = [*drama_jax.__path__, str(pathlib.Path(__file__).parent)]
            code = [str(pathlib.Path(place).absolute()) for place in places]
            ray.init(suite.ray_address, runtime_env={"py_modules": code}, **quiet)
    except (ConnectionError, ValueError, OSError, RuntimeError, ray.exceptions.RayError) as error:
        where = "Ray could not start" if suite.ray_address is None else f"--ray-address {suite.ray_address}"
        hint = "" if suite.ray_address is None else _TOKEN_HINT
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:200]}{hint}") from error


def _schedule(ray: Any, suite: Options, tasks: Sequence[Task], stop: Callable[[], bool]) -> list[str]:
    """Hands the tasks to Ray and shows how far they are, until all have ended; see `run`."""
    directory = tasks[0].logs
    stop_file = directory / f"stop-{uuid.uuid4().hex[:8]}"
    submit = _submitter(ray, suite, stop_file)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--logdir {directory.parent}: cannot be written to ({error.strerror})") from error
    waiting = {submit(task): task for task in tasks if not task.done}
    failures: list[str] = []
    progress = Progress(tasks)
    try:
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK_EVERY_S)
            for reference in ended:
                failures += _end(ray, reference, waiting.pop(reference), stop_file.exists())
            if stop() and not stop_file.exists():
                _stop(ray, waiting, stop_file)
            progress.show()
        progress.close()
    finally:
        stop_file.unlink(missing_ok=True)
        for task in tasks:
            task.state_file.unlink(missing_ok=True)
    return failures


def _stop(ray: Any, waiting: Mapping[Any, Task], stop_file: pathlib.Path) -> None:
    """Tells the tasks that are running to save and end, and takes back the others."""
    stop_file.touch()
    for reference, task in waiting.items():
        if not task.state_file.exists():
            ray.cancel(reference)


def _end(ray: Any, reference: Any, task: Task, stopping: bool) -> list[str]:
    """Notes how a task has ended; a line if it has failed for good."""
    try:
        task.outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        task.outcome = "stopped" if stopping else "failed"
        if not stopping:
            reason = task.last_error() or str(error).strip().splitlines()[-1]
            return [f"{task.label} failed: {reason}; see {task.log}"]
    return []


def _submitter(ray: Any, suite: Options, stop_file: pathlib.Path) -> Callable[[Task], Any]:
    """Gives a function that hands a task to Ray."""
    gpus = _gpus(ray, suite)
    environment = worker_environment(gpus, os.environ)
    root = None if suite.ray_address else str(pathlib.Path(__file__).parents[1])

    # Ray sends an inner function by value, so the worker imports nothing before its environment is set.
    def run(root: str | None, environment: dict[str, str], task: dict[str, Any]) -> str:
        import os
        import sys

        os.environ.update(environment)
        if root is not None:
            sys.path.insert(0, root)
        from experiments import suite_worker

        return suite_worker.work(**task)

    remote = ray.remote(
        num_cpus=suite.cpus_per_task,
        num_gpus=gpus,
        max_retries=suite.retries,
        retry_exceptions=True,
        max_calls=1,  # the process ends with the task, which frees the device's memory
    )(run)

    def submit(task: Task) -> Any:
        task.state_file.unlink(missing_ok=True)
        paths = {"log": str(task.log), "state": str(task.state_file), "stop": str(stop_file)}
        what = {"game": task.game, "seeds": list(task.seeds), "arguments": list(task.arguments), "files": paths}
        return remote.remote(root, environment, what)

    return submit


def _gpus(ray: Any, suite: Options) -> float:
    """GPUs of a task.

    Raises:
      ConfigError: if this machine has less than a task asks for.
    """
    resources = ray.cluster_resources()
    gpus = suite.gpus_per_task if suite.gpus_per_task is not None else float(resources.get("GPU", 0) > 0)
    if suite.ray_address is None:  # a cluster may grow
        for name, flag, wanted in (("GPU", "--gpus-per-task", gpus), ("CPU", "--cpus-per-task", suite.cpus_per_task)):
            if wanted > resources.get(name, 0):
                raise ConfigError(f"{flag} {wanted:g}: this machine has {resources.get(name, 0):g}")
    return gpus


def worker_environment(gpus: float, given: Mapping[str, str]) -> dict[str, str]:
    """What JAX must find in a worker's environment before it starts; what the user has set stays."""
    if gpus == 0:
        wanted = {"JAX_PLATFORMS": "cpu"}
    else:
        wanted = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_MEMORY * min(gpus, 1.0):.3f}"}
    return {name: value for name, value in wanted.items() if name not in given}
