"""The start of an interpreter: the .pth file, the .start file and what they may cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 'report([type(x).__name__ for x in sys.meta_path].count("ShimFinder"))'


def test_the_pth_file_installs_the_finder(start: Any, site: Path) -> None:
    code = "import flash_attn\nreport(flash_attn.__file__)"
    found = start(code, MTLFLASHATTN_SHIM="on")
    assert found == str(site / "metal_flash_attn" / "shim" / "flash_attn" / "__init__.py")


def test_the_pth_file_is_one_line_that_python_runs(site: Path) -> None:
    (line,) = (site / "mtlflashattn_autoload.pth").read_text().splitlines()
    assert line.startswith("import ")


def test_the_start_file_names_a_function_that_exists(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEP 829: one "module:function" a line, called without arguments.
    (line,) = (site / "mtlflashattn_autoload.start").read_text().splitlines()
    module, function = line.split(":")
    monkeypatch.syspath_prepend(site)
    assert callable(getattr(import_module(module), function))


def test_installing_twice_leaves_one_finder(start: Any) -> None:
    code = "import _mtlflashattn_finder\n_mtlflashattn_finder.install()\n" + COUNT
    assert start(code) == 1


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_the_finder_is_there_whatever_the_setting(start: Any, value: str) -> None:
    # A script may change the variable before it imports flash_attn.
    assert start(COUNT, MTLFLASHATTN_SHIM=value) == 1


@pytest.mark.parametrize(
    "text", ["raise RuntimeError", "import no_such_module", "syntax error", "install = None"]
)
def test_a_broken_finder_neither_stops_the_start_nor_prints(
    start: Any, site: Path, text: str
) -> None:
    (site / "_mtlflashattn_finder.py").write_text(text)
    assert start(COUNT) == 0


def test_a_missing_finder_neither_stops_the_start_nor_prints(start: Any, site: Path) -> None:
    (site / "_mtlflashattn_finder.py").unlink()
    assert start(COUNT) == 0


def test_a_missing_package_leaves_flash_attn_absent(start: Any, site: Path) -> None:
    (site / "metal_flash_attn").rename(site / "elsewhere")
    code = """
import importlib.metadata, importlib.util
names = [x.name for x in importlib.metadata.distributions(name="flash-attn")]
report([importlib.util.find_spec("flash_attn"), names])
"""
    assert start(code, MTLFLASHATTN_SHIM="on") == [None, []]


def test_the_start_imports_nothing_but_the_finder(start: Any) -> None:
    code = """
heavy = {"importlib.util", "importlib.metadata", "pathlib", "platform", "re", "typing"}
report([sorted(heavy & set(sys.modules)), "_mtlflashattn_finder" in sys.modules])
"""
    assert start(code) == [[], True]


def test_a_name_of_no_interest_costs_no_import(start: Any) -> None:
    code = """
before = set(sys.modules)
try:
    import no_such_module
except ImportError:
    pass
report(sorted(set(sys.modules) - before))
"""
    assert start(code, MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="x") == []
