"""Settings of every test: the CPU, explicit rank promotion, and fake devices on request."""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch workers share the cores with JAX
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # an environment variable reaches subprocesses too

# Many tests compile the same tiny model: one process of the session does, the others reuse it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="alphagrpo_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Compiling is most of the tests' time: without optimization and with the former emitters of fused
# loops it takes half as long. Other flags win.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false",
)

import pytest

# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """run_python(*arguments, devices=1, timeout=600): a Python process with so many fake devices.

    Fake devices are asked for here and not for the whole suite, since they slow every test down.
    """

    def run(*arguments: str, devices: int = 1, timeout: float = 600, **variables: str):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags, **variables}
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
