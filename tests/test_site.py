"""The documents as a site, and what they tell a reader to type."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from drawings.__main__ import write
from drawings.forward import _lane
from metal_flash_attn._cli import _parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
PAGES = {path.name for path in ROOT.glob("docs/*.md")}


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """The site of a folder that has zensical.toml and docs/."""
    builder = Path(sys.executable).with_name("zensical")
    if not builder.exists():
        pytest.skip("zensical is not installed")
    return subprocess.run(
        [builder, "build", "--strict"], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def test_the_site_builds_and_loads_nothing_from_elsewhere(site: Path) -> None:
    process = build(site)
    assert process.returncode == 0, process.stderr
    built = site / "target" / "site"
    assert {path.stem for path in built.glob("*.html")} == {
        "404",
        *(Path(page).stem for page in PAGES),
    }
    for page in built.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="?([^" >]+)', text(page))
        loaded += re.findall(r'<link[^>]*rel="?stylesheet[^>]*href="?([^" >]+)', text(page))
        assert not [source for source in loaded if "://" in source], page.name


def test_a_broken_link_fails(site: Path) -> None:
    with (site / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write("\n[a page](nowhere.md), [a heading](api.md#nowhere)\n")
    process = build(site)
    assert process.returncode != 0
    assert "page does not exist" in process.stderr
    assert "anchor does not exist" in process.stderr


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r'"([\w-]+\.md)"', text(ROOT / "zensical.toml"))
    assert len(listed) == len(set(listed))
    assert set(listed) == PAGES


def test_the_home_page_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", text(ROOT / "docs" / "index.md")))
    assert linked == PAGES - {"index.md"}


def test_links_to_other_sites_are_encrypted_and_whole() -> None:
    found = 0
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((\w+://[^)]*)\)?", text(document)):
            found += 1
            assert re.fullmatch(r"https://[\w.-]+/[^\s()]*", link), f"{document.name}: {link}"
    assert found > 10


LANGUAGES = {"python", "rust", "sh", "toml", "yaml", "text"}
NOT_RUN = re.compile(r"<!-- not run: [^>]{10,} -->\n$")


def test_python_is_in_blocks_that_run_or_say_why_not() -> None:
    """`test_docs.py` runs the blocks called python; code must not hide in other ones."""
    for document in DOCUMENTS:
        content = text(document)
        for block in re.finditer(r"^```(\w*)\n(.*?)^```$", content, re.MULTILINE | re.DOTALL):
            assert block[1] in LANGUAGES, f"{document.name}: a block called {block[1]!r}"
        outside = re.sub(r"^```.*?^```$", "", content, flags=re.MULTILINE | re.DOTALL)
        for block in re.finditer(r"(?:^ {4}.*\n|^\n)+", outside, re.MULTILINE):
            is_python = re.search(
                r"^ {4}(import \w|from \S+ import|def \w+\(|print\()", block[0], re.MULTILINE
            )
            if is_python:
                before = outside[: block.start() + len(block[0]) - len(block[0].lstrip("\n"))]
                assert NOT_RUN.search(before.rstrip("\n") + "\n"), f"{document.name}: {block[0]}"


def commands(pattern: str) -> list[str]:
    """What the documents tell to type, in code and in indented blocks."""
    found = []
    for document in DOCUMENTS:
        for line in text(document).splitlines():
            spans = [line] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
            if re.match(r"python |make ", line):
                spans.append(line)
            found += [match[1] for span in spans if (match := re.search(pattern, span))]
    return found


def test_command_lines_are_those_of_the_parser() -> None:
    found = commands(r"(?:^|\s|`)python -m metal_flash_attn ([^`]*)")
    assert len(found) > 20
    for command in found:
        words = shlex.split(re.split(r"\s{3,}|\s+#", command)[0].rstrip(".,;:"))
        if words and words[0].isalpha() and not words[-1].endswith("..."):
            _parser().parse_args(words)


def test_targets_of_make_exist_and_are_described() -> None:
    makefile = text(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(commands(r"^\s*make ([a-z-]+)")) <= targets
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)) - {"help"}
    development = text(ROOT / "docs" / "development.md")
    rows = set(re.findall(r"^\| `make ([a-z-]+)", development, re.MULTILINE))
    assert described <= rows, described - rows


def test_drawings_are_those_of_the_script(tmp_path: Path) -> None:
    write(tmp_path)
    folder = ROOT / "docs" / "drawings"
    drawn = {path.name: text(path) for path in tmp_path.iterdir()}
    assert {path.name: text(path) for path in folder.iterdir()} == drawn
    shown = {
        name
        for page in ROOT.glob("docs/*.md")
        for name in re.findall(r"!\[[^\]]{20,}\]\(drawings/([\w-]+\.svg)\)", text(page))
    }
    assert shown == set(drawn), "each is shown, with words for those who cannot see it"


def test_the_drawn_lane_map_is_that_of_the_kernels() -> None:
    source = text(ROOT / "crates" / "metal" / "kernels" / "fragments.metal")
    found = re.search(r"quad = (.+);\s+lane\.row = (.+);\s+lane\.column = (.+);", source)
    assert found is not None
    as_python = [part.replace("lane.index", "index").replace("/", "//") for part in found.groups()]
    for index in range(32):
        quad = eval(as_python[0], {"index": index})  # noqa: S307
        row, column = (
            eval(part, {"index": index, "quad": quad})  # noqa: S307
            for part in as_python[1:]
        )
        assert _lane(row, column) == _lane(row, column + 1) == index
