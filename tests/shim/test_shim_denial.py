"""Packages that MTLFLASHATTN_SHIM_DENY names see no flash_attn, before and after it is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# A module that looks for flash_attn in every way there is.
PROBE = """
import importlib, importlib.metadata, importlib.util

def probe():
    seen = []
    try:
        import flash_attn
        seen.append("import")
    except ModuleNotFoundError as error:
        assert error.name == "flash_attn"
    try:
        from flash_attn.layers import __doc__
        seen.append("from")
    except ModuleNotFoundError:
        pass
    try:
        importlib.import_module("flash_attn")
        seen.append("import_module")
    except ModuleNotFoundError:
        pass
    try:
        import flash_attn_2_cuda
        seen.append("marker")
    except ModuleNotFoundError:
        pass
    if importlib.util.find_spec("flash_attn") is not None:
        seen.append("find_spec")
    if [*importlib.metadata.distributions(name="flash-attn")]:
        seen.append("metadata")
    return seen
"""
ALL = ["import", "from", "import_module", "marker", "find_spec", "metadata"]
NONE: list[str] = []


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Packages `asserting`, `asserting_too` and `innocent`; each has a submodule `inner`."""
    directory = tmp_path / "packages"
    for name in ("asserting", "asserting_too", "innocent"):
        (directory / name).mkdir(parents=True)
        (directory / name / "__init__.py").write_text(PROBE)
        (directory / name / "inner.py").write_text(PROBE)
    (directory / "asserting" / "__main__.py").write_text(
        "from json import dumps\n" + PROBE + "\nprint(dumps(probe()))"
    )
    return directory


def test_a_denied_package_sees_nothing_before_and_after_others_import_it(
    run: Any, packages: Path
) -> None:
    code = """
import asserting, asserting.inner, asserting_too, innocent, innocent.inner
report([
    asserting.probe(), asserting.inner.probe(),
    innocent.probe(), innocent.inner.probe(), asserting_too.probe(),
    asserting.probe(), asserting.inner.probe(),
])
"""
    found = run(
        code, after=[packages], MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="x, asserting ,"
    )
    assert found == [NONE, NONE, ALL, ALL, ALL, NONE, NONE]


def test_an_entry_may_name_a_submodule(run: Any, packages: Path) -> None:
    code = """
import asserting, asserting.inner
report([asserting.inner.probe(), asserting.probe(), asserting.inner.probe()])
"""
    found = run(
        code, after=[packages], MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting.inner"
    )
    assert found == [NONE, ALL, NONE]


def test_the_variable_may_be_set_by_the_script(run: Any, packages: Path) -> None:
    code = """
import os
os.environ["MTLFLASHATTN_SHIM_DENY"] = "asserting"
import flash_attn, asserting
report(asserting.probe())
"""
    assert run(code, after=[packages], MTLFLASHATTN_SHIM="on") == NONE


def test_only_the_nearest_importer_counts(run: Any, packages: Path) -> None:
    (packages / "asserting" / "caller.py").write_text("import innocent\nseen = innocent.probe()\n")
    code = "import asserting.caller\nreport(asserting.caller.seen)"
    found = run(code, after=[packages], MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting")
    assert found == ALL


def test_a_custom_node_named_after_its_path_is_known_by_its_folder(
    run: Any, packages: Path
) -> None:
    code = f"""
import importlib.util
path = {str(packages / "asserting")!r}
spec = importlib.util.spec_from_file_location(
    path.replace(".", "_x_"), path + "/__init__.py", submodule_search_locations=[path])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
report(module.probe())
"""
    assert run(code, MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting") == NONE


def test_a_list_with_anything_but_names_denies_nobody(run: Any, packages: Path) -> None:
    code = "import asserting\nreport(asserting.probe())"
    denied = run(code, after=[packages], MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting")
    served = run(
        code, after=[packages], MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting; 1st"
    )
    assert denied == NONE
    assert served != NONE


def test_a_package_run_as_a_program_is_known_by_its_name(run: Any, packages: Path) -> None:
    code = """
import contextlib, io, json, runpy
captured = io.StringIO()
with contextlib.redirect_stdout(captured):
    runpy.run_module("asserting", run_name="__main__", alter_sys=True)
report(json.loads(captured.getvalue()))
"""
    found = run(code, after=[packages], MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting")
    assert found == NONE


def test_a_module_of_the_denied_package_may_have_the_name(run: Any, packages: Path) -> None:
    (packages / "asserting" / "flash_attn.py").write_text("name = 'its own'\n")
    (packages / "asserting" / "user.py").write_text("from .flash_attn import name\n")
    code = "import flash_attn, asserting.user\nreport(asserting.user.name)"
    found = run(code, after=[packages], MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting")
    assert found == "its own"


def test_a_real_flash_attn_is_never_hidden(run: Any, packages: Path, tmp_path: Path) -> None:
    package = tmp_path / "real" / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "flash_attn_interface.py").write_text("")
    (package / "layers.py").write_text("")
    code = "import asserting\nreport([asserting.probe(), asserting.probe()])"
    found = run(
        code,
        after=[packages, tmp_path / "real"],
        MTLFLASHATTN_SHIM="on",
        MTLFLASHATTN_SHIM_DENY="asserting",
    )
    seen = ["import", "from", "import_module", "find_spec"]
    assert found == [seen, seen]


def test_without_a_deny_list_nothing_of_python_is_replaced(run: Any) -> None:
    code = """
import builtins, importlib, importlib.util
def functions():
    return builtins.__import__, importlib.import_module, importlib.util.find_spec
before = functions()
import flash_attn
report(before == functions())
"""
    assert run(code, MTLFLASHATTN_SHIM="on") is True


def test_uninstall_puts_back_what_was_replaced(run: Any) -> None:
    code = """
import builtins, importlib, importlib.util
def functions():
    return builtins.__import__, importlib.import_module, importlib.util.find_spec
before = functions()
import flash_attn, metal_flash_attn.shim
replaced = functions()
metal_flash_attn.shim.uninstall()
report([before != replaced, before == functions(), "flash_attn" in sys.modules])
"""
    found = run(code, MTLFLASHATTN_SHIM="on", MTLFLASHATTN_SHIM_DENY="asserting")
    assert found == [True, True, False]
