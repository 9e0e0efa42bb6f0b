"""What all tests share: examples without deadlines, child interpreters, a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

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


def _is_setting(name: str) -> bool:
    return name.startswith("MTLFLASHATTN_") and name not in TOOLS


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of ours, one generator state, and the same number of threads afterwards."""
    for name in list(os.environ):
        if _is_setting(name):
            monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


Child = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def child() -> Child:
    """Runs code in an interpreter of its own, which must end well, and returns what it printed."""

    def run(code: str, *, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not _is_setting(k)}
        process = subprocess.run(
            [sys.executable, "-c", code],
            env={**inherited, **env},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert process.returncode == status, process.stderr
        return process

    return run
