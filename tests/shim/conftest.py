"""Child interpreters in which the import system is under the test's control."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PURELIB = ROOT / "mtlflashattn.data" / "purelib"
PACKAGE = ROOT / "python" / "metal_flash_attn"

# What flash_attn/__init__.py imports from the package: enough to import flash_attn without torch.
STAND_IN = """\
def flash_attn_func(): ...
def flash_attn_kvpacked_func(): ...
def flash_attn_qkvpacked_func(): ...
def flash_attn_varlen_func(): ...
def flash_attn_varlen_kvpacked_func(): ...
def flash_attn_varlen_qkvpacked_func(): ...
def flash_attn_with_kvcache(): ...
"""

REPORT = """\
import sys
def report(value):
    import json
    sys.__stdout__.write(json.dumps(value))
"""

PRELUDE = """\
import sys
sys.path[:0] = {before!r}
sys.path += {after!r}
import _mtlflashattn_finder
if {install!r}:
    _mtlflashattn_finder.install()
"""

Run = Callable[..., Any]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory as an installer leaves it, but with a stand-in for the package: no torch."""
    directory = tmp_path / "site"
    package = directory / "metal_flash_attn"
    package.mkdir(parents=True)
    for file in PURELIB.iterdir():
        if file.is_file():
            shutil.copy(file, directory)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "shim").symlink_to(PACKAGE / "shim")
    return directory


@pytest.fixture
def run(site: Path) -> Run:
    """Run code in a child interpreter and return what it hands to `report`.

    The child sees the standard library, `site` and the directories in `before` and `after`, and no
    variable of ours but those in `env`. It fails where the child prints anything.
    """

    def call(
        code: str,
        *,
        before: Sequence[Path] = (),
        after: Sequence[Path] = (),
        install: bool = True,
        **env: str,
    ) -> Any:
        prelude = PRELUDE.format(
            before=[*map(str, before)], after=[str(site), *map(str, after)], install=install
        )
        return run_child(["-S", "-c", prelude + REPORT + code], env)

    return call


@pytest.fixture(scope="session")
def run_installed() -> Run:
    """As `run`, but with the package, torch and what else is installed beside them."""
    specs = [find_spec(name) for name in ("metal_flash_attn", "torch")]
    places = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]

    def call(code: str, **env: str) -> Any:
        prelude = PRELUDE.format(before=[], after=[str(PURELIB), *places], install=True)
        return run_child(["-S", "-c", prelude + REPORT + code], env)

    return call


@pytest.fixture
def start(site: Path) -> Run:
    """As `run`, but the child reads `site` as Python reads site-packages, .pth files included."""

    def call(code: str, **env: str) -> Any:
        prelude = f"import site\nsite.addsitedir({str(site)!r})\n{REPORT}"
        return run_child(["-S", "-c", prelude + code], env)

    return call


def run_child(arguments: list[str], env: dict[str, str]) -> Any:
    """Run an isolated interpreter whose output must be one JSON value and nothing else."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MTLFLASHATTN_")}
    child = subprocess.run(
        [sys.executable, "-I", "-B", *arguments],
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return json.loads(child.stdout)
