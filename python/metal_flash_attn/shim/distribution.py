"""The metadata of the distribution flash-attn, as `importlib.metadata` and pip read it.

Loaded by `_mtlflashattn_finder`, so it imports the standard library only and never torch.
"""

from __future__ import annotations

import os
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from pathlib import Path

VERSION = "2.8.3"

# Not resolved: an installer may link each file to a cache, and the place that counts is the link's.
_SHIM_DIRECTORY = Path(__file__).absolute().parent
_LOCATION = _SHIM_DIRECTORY.parent.parent
_METADATA = f"""\
Metadata-Version: 2.1
Name: flash-attn
Version: {VERSION}
Summary: The flash_attn functions, served by mtlflashattn
"""


class ShimDistribution(Distribution):
    """flash-attn without a .dist-info directory: every text is made here."""

    def read_text(self, filename: str | PathLike[str]) -> str | None:
        """The text of a metadata file, None for a file that does not exist."""
        texts = {
            "METADATA": _METADATA,
            "INSTALLER": "mtlflashattn\n",
            "top_level.txt": "flash_attn\nflash_attn_2_cuda\n",
            "RECORD": "".join(f"{file},,\n" for file in _served_files()),
        }
        return texts.get(os.fspath(filename))

    def locate_file(self, path: str | PathLike[str]) -> Path:
        """The file that an entry of `files` stands for."""
        return _LOCATION / path


def find(context: DistributionFinder.Context | None) -> list[Distribution]:
    """Our distribution, unless `context` names paths and the one that holds us is not among them.

    pip asks for one entry of `sys.path` at a time and would otherwise find us in each.
    """
    asked_paths = None if context is None else vars(context).get("path")
    if asked_paths is None or any(_same(entry, _LOCATION) for entry in asked_paths):
        return [ShimDistribution()]
    return []


def _same(entry: str, location: Path) -> bool:
    return os.path.realpath(entry or os.curdir) == os.path.realpath(location)


def _served_files() -> list[str]:
    package, marker = _SHIM_DIRECTORY / "flash_attn", _SHIM_DIRECTORY / "flash_attn_2_cuda.py"
    files = [*package.rglob("*.py"), marker]
    return sorted(file.relative_to(_LOCATION).as_posix() for file in files)
