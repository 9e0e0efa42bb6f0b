"""Checks that a tag can be released: `python scripts/check_release.py v1.0.0 [--notes FILE]`.

The version of the workspace in Cargo.toml is the one source: the tag has to be that of its Python
form, it has to be no development version, and CHANGELOG.md needs a dated part for it, which becomes
the notes of the release.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def cargo_version(manifest: str) -> str:
    """The version of the workspace."""
    package = re.search(
        r"^\[workspace\.package\]\n(.*?)(?=^\[|\Z)", manifest, re.MULTILINE | re.DOTALL
    )
    version = package and re.search(r'^version = "([^"]+)"', package[1], re.MULTILINE)
    if not version:
        raise ValueError("Cargo.toml has no version in [workspace.package]")
    return version[1]


def python_version(cargo: str) -> str:
    """The same as maturin writes it: 1.0.0-dev.0 is 1.0.0.dev0, 1.0.0-rc.1 is 1.0.0rc1."""
    release, _, suffix = cargo.partition("-")
    if not suffix:
        return release
    kind, _, number = suffix.partition(".")
    joined = {"dev": ".dev", "alpha": "a", "beta": "b", "rc": "rc"}.get(kind)
    if joined is None:
        raise ValueError(f"version is {cargo}; allowed: no suffix, or dev, alpha, beta or rc")
    return f"{release}{joined}{number or 0}"


def notes(changelog: str, version: str) -> str:
    """The part of the changelog about a version, which must have a date."""
    pattern = (
        rf"^## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}\n(.*?)(?=^## |^\[[^]]+\]: |\Z)"
    )
    found = re.search(pattern, changelog, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"CHANGELOG.md has no part with the heading: ## [{version}] - YYYY-MM-DD")
    text = found[1].strip()
    if not re.search(r"^[*-] ", text, re.MULTILINE):
        raise ValueError(f"the part of CHANGELOG.md about {version} lists nothing")
    return text + "\n"


def check(tag: str, root: Path = ROOT) -> str:
    """The notes of a release.

    Raises:
        ValueError: if the tag cannot be released; says why.
    """
    version = python_version(cargo_version((root / "Cargo.toml").read_text(encoding="utf-8")))
    if tag != f"v{version}":
        raise ValueError(f"the tag is {tag}; Cargo.toml wants v{version}")
    if "dev" in version:
        raise ValueError(f"version is {version}; allowed: one that is not of development")
    return notes((root / "CHANGELOG.md").read_text(encoding="utf-8"), version)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--notes", type=Path, help="write the notes of the release there")
    options = parser.parse_args()
    try:
        text = check(options.tag)
    except ValueError as error:
        print(f"check_release: {error}", file=sys.stderr)
        return 1
    if options.notes is not None:
        options.notes.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
