"""The distribution flash-attn, as importlib.metadata, its backport and pip see it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

VERSIONS = """
import importlib.metadata
report([x.version for x in importlib.metadata.distributions(name="flash-attn")])
"""


@pytest.mark.parametrize("name", ["flash_attn", "flash-attn", "Flash-Attn"])
def test_version(run: Any, name: str) -> None:
    code = f"import importlib.metadata\nreport(importlib.metadata.version({name!r}))"
    assert run(code, MTLFLASHATTN_SHIM="on") == "2.8.3"


@pytest.mark.parametrize("name", ["flash", "flash-attn-4", "flash_attn_2_cuda", "torch"])
def test_no_other_name_is_answered(run: Any, name: str) -> None:
    code = f"""
import importlib.metadata
report([x.name for x in importlib.metadata.distributions(name={name!r})])
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == []


def test_the_packages_of_the_distribution(run: Any) -> None:
    code = """
import importlib.metadata
mapping = importlib.metadata.packages_distributions()
report([mapping["flash_attn"], mapping["flash_attn_2_cuda"]])
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == [["flash-attn"], ["flash-attn"]]


def test_its_texts_and_files(run: Any, site: Path) -> None:
    code = """
import importlib.metadata
distribution = importlib.metadata.distribution("flash-attn")
report({
    "name": distribution.metadata["Name"],
    "requires": distribution.requires,
    "entry points": len(distribution.entry_points),
    "files": [str(x) for x in distribution.files],
    "located": [str(x.locate()) for x in distribution.files],
    "installer": distribution.read_text("INSTALLER"),
    "missing": distribution.read_text("direct_url.json"),
})
"""
    found = run(code, MTLFLASHATTN_SHIM="on")
    files, located = found.pop("files"), found.pop("located")
    assert found == {
        "name": "flash-attn",
        "requires": None,
        "entry points": 0,
        "installer": "mtlflashattn\n",
        "missing": None,
    }
    assert "metal_flash_attn/shim/flash_attn/bert_padding.py" in files
    assert "metal_flash_attn/shim/flash_attn_2_cuda.py" in files
    assert located == [str(site / file) for file in files]
    assert all(Path(file).is_file() for file in located)


def test_queries_over_everything_include_it_once(run: Any) -> None:
    code = """
import importlib.metadata
importlib.metadata.entry_points()
report([x.name for x in importlib.metadata.distributions()].count("flash-attn"))
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == 1


@pytest.mark.parametrize("value", ["off", "auto"])
def test_it_is_absent_where_the_shim_does_not_serve(run: Any, value: str) -> None:
    code = 'sys.platform = "linux"\n' + VERSIONS
    assert run(code, MTLFLASHATTN_SHIM=value) == []


def test_it_is_absent_beside_a_real_flash_attn(run: Any, tmp_path: Path) -> None:
    package = tmp_path / "real" / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "flash_attn_interface.py").write_text("")
    info = tmp_path / "real" / "flash_attn-2.7.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.7.4\n")
    assert run(VERSIONS, after=[tmp_path / "real"], MTLFLASHATTN_SHIM="on") == ["2.7.4"]


def test_it_goes_when_somebody_else_takes_the_name(run: Any) -> None:
    code = 'import types\nsys.modules["flash_attn"] = types.ModuleType("flash_attn")\n' + VERSIONS
    assert run(code, MTLFLASHATTN_SHIM="on") == []


def test_it_lies_on_one_path_only(run: Any, site: Path, tmp_path: Path) -> None:
    code = f"""
from importlib.metadata import distributions
def count(path):
    return [x.name for x in distributions(name="flash-attn", path=path)].count("flash-attn")
site, other = {str(site)!r}, {str(tmp_path)!r}
report([count([site]), count([other]), count([other, site]), count([])])
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == [1, 0, 1, 0]


def test_the_backport_of_importlib_metadata_sees_it(run: Any) -> None:
    backport = find_spec("importlib_metadata")
    if backport is None or backport.origin is None:
        pytest.skip("importlib_metadata is not installed")
    code = """
import importlib_metadata
report([
    importlib_metadata.version("flash_attn"),
    importlib_metadata.packages_distributions()["flash_attn"],
    "flash-attn" in [x.name for x in importlib_metadata.distributions()],
])
"""
    libraries = Path(backport.origin).parents[1]
    found = run(code, after=[libraries], MTLFLASHATTN_SHIM="on")
    assert found == ["2.8.3", ["flash-attn"], True]


@pytest.mark.parametrize("requirement", ["flash-attn>=2.5", "flash_attn==2.8.3"])
def test_pip_takes_it_for_installed(run: Any, requirement: str) -> None:
    # Not find_spec: setuptools switches its distutils off for good in a process that looks for pip.
    try:
        libraries = Path(str(distribution("pip").locate_file("")))
    except PackageNotFoundError:
        pytest.skip("pip is not installed")
    code = f"""
import contextlib, io
from pip._internal.cli.main import main
captured = io.StringIO()
with contextlib.redirect_stdout(captured):
    code = main(["install", "--no-index", "--no-input", {requirement!r}])
report([code, captured.getvalue()])
"""
    pip_env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_ROOT_USER_ACTION": "ignore"}
    code, output = run(code, after=[libraries], MTLFLASHATTN_SHIM="on", **pip_env)
    assert code == 0
    assert f"Requirement already satisfied: {requirement}" in output
