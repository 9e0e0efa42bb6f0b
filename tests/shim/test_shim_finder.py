"""Who wins when somebody imports flash_attn. Every case is a child interpreter of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FIND = """
import importlib.util
spec = importlib.util.find_spec("flash_attn")
report(None if spec is None else spec.origin)
"""


@pytest.fixture
def ours(site: Path) -> str:
    return str(site / "metal_flash_attn" / "shim" / "flash_attn" / "__init__.py")


def real(directory: Path, body: str = "__version__ = '2.8.3'\n") -> Path:
    """A directory that holds a flash_attn 2 as far as the import system can see."""
    package = directory / "flash_attn"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(body)
    (package / "flash_attn_interface.py").write_text("")
    return directory


def flash_attention_4(directory: Path) -> Path:
    """A directory as the distribution flash-attn-4 leaves it: no flash_attn/__init__.py."""
    package = directory / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("marker = 4\n")
    return directory


@pytest.mark.parametrize("value", ["on", "ON", "1", "true", "yes", " on "])
def test_on_serves_everywhere(run: Any, ours: str, value: str) -> None:
    assert run(FIND, MTLFLASHATTN_SHIM=value) == ours


@pytest.mark.parametrize("value", ["off", "Off", "0", "false"])
def test_off_serves_nowhere(run: Any, value: str) -> None:
    code = FAKE_PLATFORM.format(platform="darwin", machine="arm64") + FIND
    assert run(code, MTLFLASHATTN_SHIM=value) is None


FAKE_PLATFORM = """
import os
class uname:
    machine = {machine!r}
sys.platform = {platform!r}
os.uname = lambda: uname
"""


@pytest.mark.parametrize(
    ("platform", "machine", "served"),
    [
        ("darwin", "arm64", True),
        ("darwin", "x86_64", False),
        ("linux", "x86_64", False),
        ("linux", "aarch64", False),
    ],
)
@pytest.mark.parametrize("env", [{}, {"MTLFLASHATTN_SHIM": "auto"}, {"MTLFLASHATTN_SHIM": "?"}])
def test_auto_serves_on_apple_silicon_only(
    run: Any, ours: str, platform: str, machine: str, served: bool, env: dict[str, str]
) -> None:
    code = FAKE_PLATFORM.format(platform=platform, machine=machine) + FIND
    assert run(code, **env) == (ours if served else None)


def test_the_environment_is_read_when_flash_attn_is_looked_for(run: Any, ours: str) -> None:
    code = """
import importlib.util, os
found = []
for value in ("off", "on", "off"):
    os.environ["MTLFLASHATTN_SHIM"] = value
    spec = importlib.util.find_spec("flash_attn")
    found.append(spec and spec.origin)
report(found)
"""
    assert run(code) == [None, ours, None]


def test_an_import_gets_the_whole_package(run: Any, ours: str) -> None:
    code = """
import inspect
import flash_attn, flash_attn_2_cuda
report({
    "version": flash_attn.__version__,
    "file": flash_attn.__file__,
    "path": list(flash_attn.__path__),
    "name": flash_attn.__spec__.name,
    "source": inspect.getsource(flash_attn)[:20],
    "functions": sorted(x for x in flash_attn.__all__ if x.startswith("flash_attn_")),
    "marker": flash_attn_2_cuda.__file__,
    "torch": "torch" in sys.modules,
})
"""
    shim = Path(ours).parents[1]
    assert run(code, MTLFLASHATTN_SHIM="on") == {
        "version": "2.8.3",
        "file": ours,
        "path": [str(shim / "flash_attn")],
        "name": "flash_attn",
        "source": Path(ours).read_text()[:20],
        "functions": [
            "flash_attn_func",
            "flash_attn_kvpacked_func",
            "flash_attn_qkvpacked_func",
            "flash_attn_varlen_func",
            "flash_attn_varlen_kvpacked_func",
            "flash_attn_varlen_qkvpacked_func",
            "flash_attn_with_kvcache",
        ],
        "marker": str(shim / "flash_attn_2_cuda.py"),
        "torch": False,
    }


def test_looking_imports_nothing_of_ours_and_nothing_heavy(run: Any) -> None:
    code = """
import importlib.util, importlib.metadata
assert importlib.util.find_spec("flash_attn") is not None
assert importlib.metadata.version("flash_attn") == "2.8.3"
heavy = ("torch", "numpy", "metal_flash_attn", "flash_attn")
report([x for x in sys.modules if x.partition(".")[0] in heavy])
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == []


@pytest.mark.parametrize("name", ["flash_attn_interface", "flash_attn_3", "flash_attn.cute"])
def test_other_generations_stay_absent(run: Any, name: str) -> None:
    code = f"""
import importlib.util
report(importlib.util.find_spec({name!r}) is None)
"""
    assert run(code, MTLFLASHATTN_SHIM="on") is True


@pytest.mark.parametrize("side", ["before", "after"])
def test_a_real_one_wins_wherever_it_stands_on_the_path(
    run: Any, tmp_path: Path, side: str
) -> None:
    directory = real(tmp_path / "real")
    found = run(FIND, **{side: [directory]}, MTLFLASHATTN_SHIM="on")
    assert found == str(directory / "flash_attn" / "__init__.py")


def test_a_real_one_keeps_its_marker_to_itself(run: Any, tmp_path: Path) -> None:
    code = """
import importlib.util
report(importlib.util.find_spec("flash_attn_2_cuda") is None)
"""
    directory = real(tmp_path / "real")
    assert run(code, after=[directory], MTLFLASHATTN_SHIM="on") is True


def test_an_installed_marker_wins(run: Any, tmp_path: Path) -> None:
    (tmp_path / "marker").mkdir()
    (tmp_path / "marker" / "flash_attn_2_cuda.py").write_text("")
    code = "import flash_attn_2_cuda\nreport(flash_attn_2_cuda.__file__)"
    found = run(code, after=[tmp_path / "marker"], MTLFLASHATTN_SHIM="on")
    assert found == str(tmp_path / "marker" / "flash_attn_2_cuda.py")


def test_a_real_one_of_an_editable_install_wins(run: Any, tmp_path: Path) -> None:
    # Such an install appends a finder of its own to sys.meta_path.
    directory = real(tmp_path / "checkout")
    code = f"""
from importlib.machinery import PathFinder
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(directory)!r}]) if path is None else None
sys.meta_path.append(Editable)
import flash_attn
report(flash_attn.__file__)
"""
    found = run(code, MTLFLASHATTN_SHIM="on")
    assert found == str(directory / "flash_attn" / "__init__.py")


def test_the_error_of_a_broken_real_one_is_shown(run: Any, tmp_path: Path) -> None:
    directory = real(tmp_path / "real", "import flash_attn_2_cuda\n")
    code = """
try:
    import flash_attn
except ImportError as error:
    report(str(error))
"""
    found = run(code, after=[directory], MTLFLASHATTN_SHIM="on")
    assert found == "No module named 'flash_attn_2_cuda'"


def test_a_module_that_somebody_put_there_wins(run: Any, tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "flash_attn.py").write_text("")
    found = run(FIND, after=[stub], MTLFLASHATTN_SHIM="on")
    assert found == str(stub / "flash_attn.py")


@pytest.mark.parametrize("side", ["before", "after"])
def test_flash_attention_4_alone_is_not_mistaken_for_the_real_one(
    run: Any, tmp_path: Path, ours: str, side: str
) -> None:
    directory = flash_attention_4(tmp_path / "four")
    code = """
import flash_attn, flash_attn.cute
report([flash_attn.__file__, flash_attn.__version__, flash_attn.cute.__file__])
"""
    found = run(code, **{side: [directory]}, MTLFLASHATTN_SHIM="on")
    assert found == [ours, "2.8.3", str(directory / "flash_attn" / "cute" / "__init__.py")]


def test_flash_attention_4_with_an_init_file_is_not_mistaken_either(
    run: Any, tmp_path: Path, ours: str
) -> None:
    directory = flash_attention_4(tmp_path / "four")
    (directory / "flash_attn" / "__init__.py").write_text("")
    assert run(FIND, before=[directory], MTLFLASHATTN_SHIM="on") == ours


def test_flash_attention_4_beside_a_real_one_changes_nothing(run: Any, tmp_path: Path) -> None:
    four, directory = flash_attention_4(tmp_path / "four"), real(tmp_path / "real")
    found = run(FIND, before=[four], after=[directory], MTLFLASHATTN_SHIM="on")
    assert found == str(directory / "flash_attn" / "__init__.py")


def test_a_real_one_that_shares_its_directory_with_flash_attention_4_wins(
    run: Any, tmp_path: Path
) -> None:
    directory = real(flash_attention_4(tmp_path / "both"))
    found = run(FIND, before=[directory], MTLFLASHATTN_SHIM="on")
    assert found == str(directory / "flash_attn" / "__init__.py")


def test_flash_attention_4_alone_is_left_alone_when_off(run: Any, tmp_path: Path) -> None:
    directory = flash_attention_4(tmp_path / "four")
    code = """
import flash_attn, flash_attn.cute
report([getattr(flash_attn, "__file__", None), flash_attn.cute.marker])
"""
    assert run(code, before=[directory], MTLFLASHATTN_SHIM="off") == [None, 4]


def test_leftovers_of_an_uninstalled_package_are_ignored(
    run: Any, tmp_path: Path, ours: str
) -> None:
    (tmp_path / "left" / "flash_attn" / "__pycache__").mkdir(parents=True)
    code = "import flash_attn\nreport([flash_attn.__file__, len(flash_attn.__path__)])"
    assert run(code, before=[tmp_path / "left"], MTLFLASHATTN_SHIM="on") == [ours, 1]


def test_a_finder_that_asks_everybody_does_not_loop(run: Any, ours: str) -> None:
    code = """
import importlib.util
calls = []
class AsksEverybody:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "flash_attn":
            return None
        calls.append(name)
        for finder in sys.meta_path:
            if finder is not AsksEverybody:
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
sys.meta_path.append(AsksEverybody)
report([importlib.util.find_spec("flash_attn").origin, len(calls)])
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == [ours, 1]


def test_an_error_in_another_finder_is_left_to_it(run: Any) -> None:
    code = """
class Broken:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "flash_attn":
            raise RuntimeError("broken finder")
sys.meta_path.append(Broken)
try:
    import flash_attn
except RuntimeError as error:
    report(str(error))
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == "broken finder"


def test_a_blocked_name_stays_blocked(run: Any) -> None:
    code = """
sys.modules["flash_attn"] = None
import importlib.metadata
try:
    import flash_attn
except ImportError:
    blocked = True
names = [x.name for x in importlib.metadata.distributions(name="flash-attn")]
report([blocked, names])
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == [True, []]


def test_a_reload_finds_ours_again(run: Any, ours: str) -> None:
    code = """
import importlib
import flash_attn
flash_attn.__version__ = "0"
importlib.reload(flash_attn)
report([flash_attn.__file__, flash_attn.__version__])
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == [ours, "2.8.3"]


def test_many_threads_find_the_same(run: Any) -> None:
    # Import statements wait for each other; questions about metadata do not.
    code = """
import importlib.metadata, threading, time
class Slow:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "flash_attn":
            time.sleep(0.02)
sys.meta_path.append(Slow)
barrier, found = threading.Barrier(16), []
def look():
    barrier.wait()
    found.append(importlib.metadata.version("flash_attn"))
threads = [threading.Thread(target=look) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
report(found)
"""
    assert run(code, MTLFLASHATTN_SHIM="on") == ["2.8.3"] * 16


def test_the_marker_says_what_is_missing(run: Any) -> None:
    code = """
import flash_attn_2_cuda
try:
    flash_attn_2_cuda.fwd
except AttributeError as error:
    report([str(error), hasattr(flash_attn_2_cuda, "varlen_fwd")])
"""
    message, has_kernel = run(code, MTLFLASHATTN_SHIM="on")
    assert message.startswith("flash_attn_2_cuda.fwd is a CUDA kernel that mtlflashattn does not")
    assert not has_kernel
