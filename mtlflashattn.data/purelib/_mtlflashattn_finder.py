"""Finds `flash_attn` in mtlflashattn where no real flash_attn 2 is installed.

The .pth and .start files beside this one call `install` at every interpreter start. So this file is
short, imports nothing that has to be loaded for it, and neither raises nor prints. What an answer
takes lies in `metal_flash_attn/shim`, in files that are loaded one by one when somebody asks for
flash_attn, because importing that package would import torch.
"""
# ruff: noqa: PLC0415, PTH118 (imports cost every interpreter, so they come late, pathlib not at all)

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution, DistributionFinder
    from types import ModuleType


class ShimFinder:
    """Meta-path finder that answers for `flash_attn` when nobody else has a flash_attn 2.

    It stands first on `sys.meta_path` and asks the finders behind it. Last place would not do: a
    FlashAttention-4 install is a `flash_attn` directory without `__init__.py`, which the path
    finder turns into a namespace package, and a finder behind it is then never asked.
    """

    forced = False  # set by metal_flash_attn.shim.install(): "auto" serves on every platform

    def find_spec(
        self,
        name: str,
        path: "Sequence[str | bytes] | None" = None,  # noqa: ARG002
        target: "ModuleType | None" = None,  # noqa: ARG002
    ) -> "ModuleSpec | None":
        """The spec of our module; None where it is not asked for, or somebody else has it."""
        if name not in {"flash_attn", "flash_attn_2_cuda"}:
            return None
        try:
            spec: ModuleSpec | None = load_part("serving").find_spec(self, name)
        except Exception:
            return None
        return spec

    def find_distributions(
        self, context: "DistributionFinder.Context | None" = None
    ) -> "list[Distribution]":
        """The distribution flash-attn, for as long as `import flash_attn` finds ours."""
        name = getattr(context, "name", None)
        if isinstance(name, str) and name.lower().replace("_", "-") != "flash-attn":
            return []
        try:
            found: list[Distribution] = load_part("serving").find_distributions(self, context)
        except Exception:
            return []
        return found


def load_part(name: str) -> "ModuleType":
    """`metal_flash_attn/shim/<name>.py` as a module of its own, without importing the package."""
    full_name = "_mtlflashattn_" + name
    if full_name not in sys.modules:
        from importlib import util

        package = util.find_spec("metal_flash_attn")
        if package is None or package.origin is None:
            raise ModuleNotFoundError("metal_flash_attn")
        file = os.path.join(os.path.dirname(package.origin), "shim", name + ".py")  # noqa: PTH120
        spec = util.spec_from_file_location(full_name, file)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(full_name)
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return sys.modules.setdefault(full_name, module)
    return sys.modules[full_name]


def installed() -> "ShimFinder | None":
    """The finder on `sys.meta_path`, if there is one."""
    for finder in sys.meta_path:
        if isinstance(finder, ShimFinder):
            return finder
    return None


def install() -> None:
    """Put a finder on `sys.meta_path` unless one is there; what it serves is decided later."""
    if installed() is None:
        sys.meta_path.insert(0, ShimFinder())
