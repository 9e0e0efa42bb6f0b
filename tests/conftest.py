"""What all tests share: examples without deadlines, child interpreters, a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence

# Threads of torch's operations that wait for each other shall sleep: where tests run side by side
# they outnumber the cores, and one that spins keeps a core from the one it waits for. To be set
# before torch loads its OpenMP runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch
from tool_variables import TOOLS

# Machines that run tests are shared: a slow example is no failure.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    max_examples=60,
    print_blob=True,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


LINUX_ONLY = "the simulator runs on Linux only"
"""What crates/simulator/src/compile.rs says elsewhere."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skips what turns out to need the simulator where there is none."""
    try:
        yield
    except Exception as error:
        if sys.platform != "linux" and LINUX_ONLY in str(error):
            pytest.skip(LINUX_ONLY)
        raise


def _is_setting(name: str) -> bool:
    return name.startswith("MTLFLASHATTN_") and name not in TOOLS


@pytest.fixture(autouse=True)
def clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Settings, generator state and number of threads are those of a new process.

    No variable of ours is set but the folder for verdicts on kernels: never the user's own.
    """
    for name in list(os.environ):
        if _is_setting(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MTLFLASHATTN_CACHE", str(tmp_path_factory.mktemp("cache")))
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


Child = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def child() -> Child:
    """Runs code in an interpreter of its own, which must end well, and returns what it printed."""

    def run(
        code: str, *, status: int = 0, under: Sequence[str] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        cache = "MTLFLASHATTN_CACHE"
        inherited = {k: v for k, v in os.environ.items() if k == cache or not _is_setting(k)}
        if "PYTHONPATH" in env and "PYTHONPATH" in inherited:
            env["PYTHONPATH"] += os.pathsep + inherited["PYTHONPATH"]
        process = subprocess.run(
            [*under, sys.executable, "-c", code],
            env={**inherited, **env},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert process.returncode == status, process.stderr
        return process

    return run
