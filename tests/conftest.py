"""Settings and fixtures shared by every test.

Strict dtype promotion is on for the whole session: library code has to cast explicitly.
"""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers find it in the environment
        directory = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": directory, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | COMPILED
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *compiler_flags()]).strip()
    compile_fast(True)
    # What tracing makes is mostly there to stay; looking through it again and again takes a tenth of the time.
    gc.set_threshold(50_000, 20, 20)
    keep_to_one_core(getattr(config, "workerinput", None))
    for name, kind in (("dir", str), ("max_size", int)):
        jax.config.update(f"jax_compilation_cache_{name}", kind(os.environ[f"JAX_COMPILATION_CACHE_{name.upper()}"]))
    least = "persistent_cache_min_compile_time_secs"
    jax.config.update(f"jax_{least}", float(os.environ[f"JAX_{least.upper()}"]))


def compile_fast(fast: bool) -> None:
    """Whether programs are compiled in a third of the time and take twice as long to run (by hand, preset tiny).

    Most of the time goes into compilation, of programs that a test runs a few times.
    """
    jax.config.update("jax_disable_most_optimizations", fast)


@pytest.fixture(scope="module")
def compiled_well() -> Iterator[None]:
    """For files that run one program some hundred times or more."""
    compile_fast(False)
    yield
    compile_fast(True)


def compiler_flags() -> list[str]:
    """For XLA: to compile for a CPU in half the time (by hand, with JAX 0.10). What comes out of it is as fast."""
    # Not divided among threads: a worker has one core, or shares two.
    flags = ["--xla_backend_optimization_level=1", "--xla_cpu_parallel_codegen_split_count=1"]
    if jax.__version_info__ < (0, 11):  # later versions do not know the flag, and stop at it
        # XLA's newer way to compile fused loops for a CPU takes three times as long.
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return flags


def keep_to_one_core(worker: dict[str, str] | None) -> None:
    """Gives one of pytest-xdist's workers, and the processes that it starts, a core of their own.

    XLA's threads gain little at these sizes and get in each other's way: on two cores, two processes that each compile
    and run a very small agent take 23 s like this, and 30 s if each uses both. Not where kernels by Mosaic are
    interpreted: their warpgroups wait for each other in threads of which there are as many as cores.
    """
    if worker is not None and jax.__version_info__ < (0, 11) and hasattr(os, "sched_setaffinity"):  # there on Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker["workerid"].removeprefix("gw")) % len(cores)]})


# Programs that took long to compile are kept for the session, for the other worker, the processes that tests start, and
# after `bounded_memory`. JAX locks the directory if its size is limited.
COMPILED = {"JAX_COMPILATION_CACHE_MAX_SIZE": str(10**11), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}

# The longest files, longest first: begun early, they do not leave one of two processes waiting at the end.
LONG = ("training/test_prediction.py", "learning/", "faults/")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(pathlib.Path(__file__).parent).as_posix()
        return next((i for i, start in enumerate(LONG) if path.startswith(start)), len(LONG))

    items.sort(key=rank)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


jax.config.update("jax_numpy_dtype_promotion", "strict")
# A shell starts background jobs with SIGINT ignored, which the program under test respects.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


MOST_BYTES = 2.5e9


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Forgets compiled programs after a file that leaves the process with more than `MOST_BYTES`.

    It keeps its memory, and so forgets after every file from then on; that costs no time that could be measured.
    """
    yield
    statm = pathlib.Path("/proc/self/statm")  # there on Linux
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        jax.clear_caches()


@functools.cache
def _load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """`golden(name)`: the arrays of tests/golden/<name>.npz, read once per session and not writeable."""
    return _load


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
