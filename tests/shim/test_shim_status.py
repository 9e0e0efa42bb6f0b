"""install, uninstall and status of metal_flash_attn.shim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

STATUS = """
import dataclasses
import metal_flash_attn.shim as shim
def show(status):
    return [status.mode, status.active, status.finds, status.location, status.reason]
"""


def shim_file(site: Path) -> str:
    return str(site / "metal_flash_attn" / "shim" / "flash_attn" / "__init__.py")


def test_status_where_ours_serves(run: Any, site: Path) -> None:
    found = run(STATUS + "report(show(shim.status()))", MTLFLASHATTN_SHIM="on")
    reason = "no other flash_attn is installed"
    assert found == ["on", True, "ours", shim_file(site), reason]


def test_status_once_ours_is_imported(run: Any, site: Path) -> None:
    code = STATUS + "import flash_attn\nreport(show(shim.status()))"
    found = run(code, MTLFLASHATTN_SHIM="on")
    assert found == ["on", True, "ours", shim_file(site), "flash_attn is imported already"]


def test_status_beside_flash_attention_4(run: Any, site: Path, tmp_path: Path) -> None:
    cute = tmp_path / "four" / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").write_text("")
    code = STATUS + "report(show(shim.status()))"
    found = run(code, after=[tmp_path / "four"], MTLFLASHATTN_SHIM="on")
    reason = "only FlashAttention-4 (flash_attn.cute) is installed"
    assert found == ["on", True, "ours", shim_file(site), reason]


def test_status_with_a_real_one(run: Any, tmp_path: Path) -> None:
    package = tmp_path / "real" / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    code = STATUS + "report(show(shim.status()))"
    found = run(code, after=[tmp_path / "real"], MTLFLASHATTN_SHIM="off")
    origin = str(package / "__init__.py")
    assert found == ["off", False, "real", origin, "a flash_attn is installed"]


def test_status_where_nothing_serves_says_why(run: Any) -> None:
    code = STATUS + 'sys.platform = "linux"\nreport(show(shim.status()))'
    off = run(code, MTLFLASHATTN_SHIM="off")
    assert off == ["off", False, "none", None, "MTLFLASHATTN_SHIM is off"]
    auto = run(code)
    assert auto[:4] == ["auto", False, "none", None]
    assert auto[4].startswith("MTLFLASHATTN_SHIM is auto, which serves on macOS arm64 only")
    absent = run(code, install=False, MTLFLASHATTN_SHIM="on")
    assert absent[:4] == ["on", False, "none", None]
    assert "metal_flash_attn.shim.install()" in absent[4]


def test_install_serves_on_any_platform(run: Any, site: Path) -> None:
    code = (
        STATUS
        + """
sys.platform = "linux"
status = shim.install()
import flash_attn
report([show(status), flash_attn.__file__])
"""
    )
    status, file = run(code, install=False)
    assert status == ["auto", True, "ours", shim_file(site), "no other flash_attn is installed"]
    assert file == shim_file(site)


def test_install_obeys_off(run: Any) -> None:
    found = run(STATUS + "report(show(shim.install()))", install=False, MTLFLASHATTN_SHIM="off")
    assert found == ["off", False, "none", None, "MTLFLASHATTN_SHIM is off"]


def test_uninstall_forgets_ours_and_only_ours(run: Any) -> None:
    code = (
        STATUS
        + """
import types
sys.modules["flash_attn_interface"] = types.ModuleType("flash_attn_interface")
import flash_attn.layers, flash_attn_2_cuda
shim.uninstall()
shim.uninstall()
try:
    import flash_attn
    imported = True
except ModuleNotFoundError:
    imported = False
report([imported, [x for x in sys.modules if x.startswith("flash_attn")], show(shim.status())[:3]])
"""
    )
    found = run(code, MTLFLASHATTN_SHIM="on")
    assert found == [False, ["flash_attn_interface"], ["on", False, "none"]]


def test_uninstall_leaves_a_real_one_alone(run: Any, tmp_path: Path) -> None:
    package = tmp_path / "real" / "flash_attn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    code = "import flash_attn\n" + STATUS + 'shim.uninstall()\nreport("flash_attn" in sys.modules)'
    assert run(code, after=[tmp_path / "real"], MTLFLASHATTN_SHIM="on") is True
