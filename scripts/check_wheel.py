"""Checks what wheels hold."""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "mtlflashattn.data" / "purelib"
PACKAGE = ROOT / "python" / "metal_flash_attn"
NAME = re.compile(r"mtlflashattn-([\w.]+)-cp\d+-(\w+)-([\w.]+)\.whl")


def expected() -> set[str]:
    """Names that end those of files in every wheel: the package, and what lies beside it."""
    inside = {
        path.relative_to(PACKAGE.parent).as_posix()
        for pattern in ("*.py", "*.pyi", "py.typed")
        for path in PACKAGE.rglob(pattern)
    }
    beside = {path.name for path in DATA.iterdir() if path.is_file()}
    return inside | {f"purelib/{name}" for name in beside}


def faults(wheel: Path, platform: str | None, abi: str | None) -> list[str]:
    """What is wrong with a wheel."""
    name = NAME.fullmatch(wheel.name)
    if name is None:
        return ["its name is not that of a wheel of mtlflashattn for one platform"]
    found = []
    if platform is not None and not re.search(platform, name[3]):
        found.append(f"its platform is {name[3]}; allowed: {platform}")
    if abi is not None and name[2] != abi:
        found.append(f"its abi is {name[2]}; allowed: {abi}")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        broken = archive.testzip()
    if broken is not None:
        found.append(f"{broken} is damaged")
    found += [
        f"{wanted} is missing"
        for wanted in sorted(expected())
        if not any(file == wanted or file.endswith(f"/{wanted}") for file in files)
    ]
    modules = [file for file in files if re.fullmatch(r"metal_flash_attn/_native\.[\w.-]*so", file)]
    if len(modules) != 1:
        found.append(f"it has {len(modules)} extension modules; allowed: 1")
    strays = [file for file in files if "__pycache__" in file or file.endswith((".dSYM", ".new"))]
    return found + [f"{stray} does not belong there" for stray in strays]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", help="a pattern that the platform tag must have")
    parser.add_argument("--abi", help="the abi tag, such as abi3 or cp314t")
    parser.add_argument("wheels", nargs="+", type=Path)
    options = parser.parse_args()
    status = 0
    for wheel in options.wheels:
        found = faults(wheel, options.platform, options.abi)
        print(f"{wheel.name}: {'; '.join(found) or 'complete'}")
        status |= bool(found)
    return status


if __name__ == "__main__":
    sys.exit(main())
