"""Finds `flash_attn` in mtlflashattn where no real flash_attn 2 is installed.

The .pth and .start files beside this one call `install` at every interpreter start. So this file
imports only what the interpreter has loaded by then, and nothing in it raises or prints. The parts
needed once somebody asks for flash_attn lie in `metal_flash_attn/shim`; they are loaded from their
files, because importing the package would import torch.
"""

# Every import here is paid for by every interpreter, so pathlib stays out and others come late.
# ruff: noqa: PLC0415, PTH118

import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution, DistributionFinder
    from types import ModuleType

SERVED_NAMES = ("flash_attn", "flash_attn_2_cuda")
_MODES = {"on": "on", "1": "on", "true": "on", "off": "off", "0": "off", "false": "off"}


def mode() -> str:
    """`MTLFLASHATTN_SHIM` as "auto", "on" or "off"; any other value counts as "auto"."""
    return _MODES.get(os.environ.get("MTLFLASHATTN_SHIM", "").strip().lower(), "auto")


def deny_list() -> str:
    """`MTLFLASHATTN_SHIM_DENY` as it stands in the environment, read anew at every call."""
    return os.environ.get("MTLFLASHATTN_SHIM_DENY", "")


class ShimFinder:
    """Meta-path finder that serves `flash_attn` when nobody else has a flash_attn 2.

    It stands first on `sys.meta_path` and asks the finders behind it. Last place would not do: a
    FlashAttention-4 install is a `flash_attn` directory without `__init__.py`, which the path
    finder turns into a namespace package, and a finder behind it is then never asked.
    """

    def __init__(self) -> None:
        self.forced = False  # metal_flash_attn.shim.install(): "auto" serves on every platform
        self._asking: set[int] = set()

    def active(self) -> bool:
        """Whether settings and platform let this finder serve at all."""
        wanted = mode()
        if wanted == "auto":
            return self.forced or (sys.platform == "darwin" and os.uname().machine == "arm64")
        return wanted == "on"

    def find_spec(
        self,
        name: str,
        path: "Sequence[str | bytes] | None" = None,  # noqa: ARG002
        target: "ModuleType | None" = None,  # noqa: ARG002
    ) -> "ModuleSpec | None":
        """The spec of our module; None where it is not asked for, or somebody else has it."""
        if name not in SERVED_NAMES:
            return None
        try:
            return self._own_spec(name) if self._may_answer() else None
        except Exception:
            return None

    def find_distributions(
        self, context: "DistributionFinder.Context | None" = None
    ) -> "list[Distribution]":
        """The distribution flash-attn, for as long as `import flash_attn` finds ours."""
        name = getattr(context, "name", None)
        try:
            asked_for = name is None or name.lower().replace("_", "-") == "flash-attn"
            return self._own_distributions(context) if asked_for and self._may_answer() else []
        except Exception:
            return []

    def find_elsewhere(self, name: str) -> "ModuleSpec | None":
        """What `import name` would find if this finder did not exist."""
        thread = _thread.get_ident()
        self._asking.add(thread)
        try:
            for finder in list(sys.meta_path):
                find_spec = getattr(finder, "find_spec", None)
                if finder is not self and find_spec is not None:
                    spec: ModuleSpec | None = find_spec(name, None, None)
                    if spec is not None:
                        return spec
            return None
        finally:
            self._asking.discard(thread)

    def _own_spec(self, name: str) -> "ModuleSpec | None":
        spec: ModuleSpec | None = load_part("resolution").find_spec(self, name)
        if spec is not None and deny_list():
            load_part("denial").guard_imports()
        return spec

    def _own_distributions(
        self, context: "DistributionFinder.Context | None"
    ) -> "list[Distribution]":
        if load_part("resolution").resolve(self).finds != "ours":
            return []
        found: list[Distribution] = load_part("distribution").find(context)
        return found

    def _may_answer(self) -> bool:
        # Another finder that asks everybody, as this one does, must not be sent round in circles.
        if _thread.get_ident() in self._asking or not self.active():
            return False
        return not (deny_list() and load_part("denial").caller_is_denied())


def load_part(name: str) -> "ModuleType":
    """`metal_flash_attn/shim/<name>.py` as a module of its own, without importing the package."""
    full_name = "_mtlflashattn_" + name
    if full_name not in sys.modules:
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location(full_name, os.path.join(shim_directory(), name + ".py"))
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(full_name)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return sys.modules.setdefault(full_name, module)
    return sys.modules[full_name]


def shim_directory() -> str:
    """`metal_flash_attn/shim`, found as an import would find it."""
    from importlib.util import find_spec

    spec = find_spec("metal_flash_attn")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("metal_flash_attn")
    return os.path.join(next(iter(spec.submodule_search_locations)), "shim")


def installed() -> "ShimFinder | None":
    """The finder on `sys.meta_path`, if there is one."""
    for finder in sys.meta_path:
        if isinstance(finder, ShimFinder):
            return finder
    return None


def install() -> None:
    """Put a finder on `sys.meta_path` unless one is there; what it serves is decided later."""
    try:
        if installed() is None:
            sys.meta_path.insert(0, ShimFinder())
    except Exception:
        return
