"""What releases depend on: workflows, and the scripts that they call."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import check_release
import check_wheel
import compile_kernels
import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_workflows_have_no_findings() -> None:
    linter = Path(sys.executable).with_name("zizmor")
    if not linter.exists():
        pytest.skip("zizmor is not installed")
    command: list[str | Path] = [linter, "--offline", "--no-progress", ROOT / ".github"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout


def test_workflows_call_what_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert len(WORKFLOWS) == 2
    for path in WORKFLOWS:
        text = read(path)
        called = re.findall(r"(?:^|\s)((?:scripts|\.ci)/[\w.-]+)", text)
        assert called
        assert [name for name in called if not (ROOT / name).exists()] == []
        assert set(re.findall(r"run: make ([a-z-]+)", text)) <= targets


def test_the_reason_to_skip_on_a_mac_is_what_the_simulator_says() -> None:
    reason = re.search(r'^LINUX_ONLY = "(.+)"$', read(ROOT / "tests" / "conftest.py"), re.MULTILINE)
    assert reason is not None
    assert f'"{reason[1]}"' in read(ROOT / "crates" / "simulator" / "src" / "compile.rs")


def test_actions_are_taken_at_a_major_version_and_only_one() -> None:
    versions: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for action, version in re.findall(r"uses: ([\w./-]+)@(\S+)", read(path)):
            versions.setdefault(action, set()).add(version)
    assert len(versions) >= 6
    for action, found in versions.items():
        (version,) = found
        assert re.fullmatch(r"(release/)?v\d+", version), action


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A checkout that is ready to be released."""
    (tmp_path / "Cargo.toml").write_text(
        "[workspace]\nmembers = []\n\n"
        '[workspace.package]\nedition = "2024"\nversion = "1.2.0-rc.1"\n'
        '\n[workspace.dependencies]\nother = { version = "9" }\n'
    )
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [1.2.0rc1] - 2027-01-31\n\n### Added\n* A thing.\n\n"
        "## [1.1.0] - 2026-12-24\n\n### Fixed\n* Another.\n"
    )
    return tmp_path


def test_a_release_has_the_notes_of_its_version(release: Path) -> None:
    assert check_release.check("v1.2.0rc1", release) == "### Added\n* A thing.\n"


@pytest.mark.parametrize(
    ("file", "old", "new", "tag", "message"),
    [
        ("Cargo.toml", "", "", "v1.2.0", "Cargo.toml wants v1.2.0rc1"),
        ("Cargo.toml", "-rc.1", "-dev.3", "v1.2.0.dev3", "not of development"),
        ("Cargo.toml", "-rc.1", "-next", "v1.2.0", "allowed: no suffix, or dev"),
        ("Cargo.toml", "[workspace.package]", "[package]", "v1.2.0rc1", "has no version"),
        ("CHANGELOG.md", "1.2.0rc1", "1.2.0", "v1.2.0rc1", "has no part"),
        ("CHANGELOG.md", " - 2027-01-31", "", "v1.2.0rc1", "has no part"),
        ("CHANGELOG.md", "* A thing.\n", "", "v1.2.0rc1", "lists nothing"),
    ],
)
def test_what_is_not_ready_is_not_released(
    release: Path, file: str, old: str, new: str, tag: str, message: str
) -> None:
    path = release / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_release.check(tag, release)


def test_the_changelog_has_a_part_for_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert re.fullmatch(r"\[Unreleased\]|\[\d[\w.]*\] - \d{4}-\d\d-\d\d", headings[0])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= kinds


def test_the_version_of_the_package_is_that_of_cargo() -> None:
    from importlib.metadata import PackageNotFoundError, version

    manifest = (ROOT / "Cargo.toml").read_text(encoding="utf-8")
    try:
        installed = version("mtlflashattn")
    except PackageNotFoundError:
        pytest.skip("mtlflashattn is used where it lies, not installed")
    assert installed == check_release.python_version(check_release.cargo_version(manifest))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with empty files in all the right places."""
    path = tmp_path / "mtlflashattn-1.0.0-cp310-abi3-macosx_14_0_arm64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in check_wheel.expected():
            beside = name.startswith("purelib/")
            archive.writestr(f"mtlflashattn-1.0.0.data/{name}" if beside else name, "")
        archive.writestr("metal_flash_attn/_native.abi3.so", "")
    return path


def test_a_complete_wheel_passes(wheel: Path) -> None:
    assert check_wheel.faults(wheel, "macosx_14_0_arm64", "abi3") == []
    assert {
        "metal_flash_attn/py.typed",
        "purelib/mtlflashattn_autoload.pth",
    } <= check_wheel.expected()


@pytest.mark.parametrize(
    "name",
    [
        "mtlflashattn-1.0.0.data/purelib/mtlflashattn_autoload.pth",
        "mtlflashattn-1.0.0.data/purelib/mtlflashattn_autoload.start",
        "mtlflashattn-1.0.0.data/purelib/_mtlflashattn_finder.py",
        "metal_flash_attn/shim/flash_attn/__init__.py",
        "metal_flash_attn/_native.abi3.so",
    ],
)
def test_a_wheel_that_lacks_a_file_fails(wheel: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "lacking"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(folder / wheel.name, "w") as lacking:
        assert name in whole.namelist()
        for other in set(whole.namelist()) - {name}:
            lacking.writestr(other, whole.read(other))
    assert len(check_wheel.faults(folder / wheel.name, None, None)) == 1


def test_a_wheel_for_something_else_fails(wheel: Path) -> None:
    assert "its platform is" in check_wheel.faults(wheel, "manylinux_2_28_x86_64", None)[0]
    assert "its abi is" in check_wheel.faults(wheel, None, "cp314t")[0]
    other = shutil.copy(wheel, wheel.with_name("mtlflashattn-1.0.0-py3-none-any.whl"))
    assert check_wheel.faults(Path(other), None, None)


def test_the_kernels_of_every_tier_are_written_for_the_compiler(tmp_path: Path) -> None:
    compile_kernels.write(tmp_path)
    texts = list(tmp_path.glob("*.metal"))
    assert {path.name.rpartition("-")[0] for path in texts} == set(compile_kernels.MACHINES)
    assert len(texts) > 200
    # These come from the example kernel_texts of crates/metal.
    others = ["append", "backward_delta", "backward_keys", "backward_query", "merge"]
    assert compile_kernels.missing(tmp_path) == [f"attention_{name}" for name in others]
    for path in texts:
        needs_metal_4 = compile_kernels.TENSOR_HEADER in path.read_text(encoding="ascii")
        assert needs_metal_4 == path.name.startswith("tensorops")
