"""The documents against the code: examples run, tables are complete, links and names exist."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from metal_flash_attn import plan
from tool_variables import TOOLS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
# Those that describe the inside, and so name functions, types and constants.
INTERNAL = [
    ROOT / "docs" / f"{x}.md"
    for x in ("architecture", "cpu-engine", "planner", "proof", "development")
]
SETTINGS_SOURCE = ROOT / "crates" / "core" / "src" / "settings.rs"


def for_each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("document", paths, ids=lambda path: path.name)


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")

# Runs the examples of one document in one namespace; tracebacks show the document's own lines.
EXAMPLES = """
import re
import sys
from pathlib import Path

path = Path({path!r})
text = path.read_text(encoding="utf-8")
namespace = {{"__name__": "__main__"}}
for block in re.finditer({fenced!r}, text, re.MULTILINE | re.DOTALL):
    if block[1] == "python":
        lines_before = text[: block.start(2)].count("\\n")
        exec(compile("\\n" * lines_before + block[2], path, "exec"), namespace)
"""


def run_examples(child: Any, document: Path, status: int = 0) -> str:
    """Runs a document's examples with the shim on; what they wrote to standard error."""
    code = EXAMPLES.format(path=str(document), fenced=FENCED.pattern)
    stderr: str = child(code, status=status, MTLFLASHATTN_SHIM="on").stderr
    return stderr


def examples(document: Path) -> list[str]:
    blocks = FENCED.findall(document.read_text(encoding="utf-8"))
    return [body for language, body in blocks if language == "python"]


def prose(document: Path) -> str:
    """A document without its fenced and indented blocks."""
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def table(document: Path, heading: str) -> list[list[str]]:
    """The cells of the body of the table whose head begins like this."""
    text = document.read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(heading)}.*\n\|[ |-]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None, heading
    rows = found[1].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@for_each([document for document in DOCUMENTS if examples(document)])
def test_examples_run(child: Any, document: Path) -> None:
    run_examples(child, document)


def test_the_documents_for_users_have_examples_that_check_something() -> None:
    for name in ("README.md", "docs/api.md"):
        assert "assert " in "".join(examples(ROOT / name)), name


def test_a_wrong_example_fails_with_its_line(child: Any, tmp_path: Path) -> None:
    document = tmp_path / "wrong.md"
    document.write_text("text\n```python\nx = 1\n```\ntext\n```python\n\nassert x == 2\n```\n")
    assert f'{document}", line 8' in run_examples(child, document, status=1)


def variables() -> dict[str, tuple[str, str]]:
    """Name -> (default, allowed) of every variable in the code."""
    source = re.sub(r"\\\n\s*", "", SETTINGS_SOURCE.read_text(encoding="utf-8"))
    declared = re.findall(
        r'const (\w+): Variable = Variable \{\s*name: "(\w+)",\s*default: "(.*?)",\s*'
        r'allowed: "(.*?)"',
        source,
    )
    listed = re.search(r"VARIABLES: &\[Variable\] = &\[(.*?)\];", source, re.DOTALL)
    assert listed is not None
    constants = {
        constant: (name, default, allowed) for constant, name, default, allowed in declared
    }
    rows = [constants[constant] for constant in re.findall(r"\w+", listed[1])]
    return {name: (default, allowed) for name, default, allowed in rows}


def test_settings_table_is_that_of_the_code() -> None:
    rows = table(ROOT / "docs" / "settings.md", "| variable |")
    found = {
        name.strip("`"): ("" if default == "none" else default.strip("`"), allowed)
        for name, default, allowed, *_ in rows
    }
    expected = variables()
    assert len(expected) >= 12
    assert list(found) == list(expected)
    assert found == expected


def test_no_document_names_a_setting_that_does_not_exist() -> None:
    for document in DOCUMENTS:
        named = set(re.findall(r"MTLFLASHATTN_[A-Z0-9_]*[A-Z0-9]", document.read_text("utf-8")))
        assert named <= set(variables()) | TOOLS, document.name


def test_variables_of_tools_are_read_and_documented() -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "crates/simulator/src").rglob("*.rs")]
    described = (ROOT / "docs" / "settings.md").read_text("utf-8")
    assert TOOLS.isdisjoint(variables())
    for name in TOOLS:
        assert any(f'var_os("{name}")' in source for source in sources), name
        assert f"`{name}`" in described, name


def test_tier_table_is_that_of_the_code() -> None:
    q = torch.zeros(1, 1, 1, 8)
    here = plan(q, q, q)
    rows = table(ROOT / "docs" / "architecture.md", "| tier | names")
    tiers = {row[0].strip("`") for row in rows}
    assert tiers == {here.tier, *dict(here.reasons)}
    names = {name for row in rows for name in CODE.findall(row[1]) if name.islower()}
    allowed = set(re.findall(r"[\w-]+", variables()["MTLFLASHATTN_KERNEL"][1]))
    assert names == allowed - {"auto", "or"}


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@for_each(DOCUMENTS)
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(prose(document)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        goal = (document.parent / path).resolve() if path else document
        assert goal.exists(), target
        if anchor:
            assert anchor in anchors(goal), target


FOLDERS = ("crates", "python", "tests", "docs", "bench", "demo", "scripts", "mtlflashattn.data")


@for_each(DOCUMENTS)
def test_files_that_are_named_exist(document: Path) -> None:
    for code in CODE.findall(prose(document)):
        if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)+/?", code) and code.startswith(FOLDERS):
            assert (ROOT / code).exists(), code


@cache
def words_of_the_code() -> frozenset[str]:
    words: set[str] = set()
    for folder in FOLDERS:
        for file in filter(Path.is_file, (ROOT / folder).rglob("*")):
            is_code = (
                file.suffix in {".rs", ".py", ".pyi", ".toml"} or file.parent.name == "scripts"
            )
            # This file itself would vouch for the names it looks for.
            if is_code and file != Path(__file__):
                words.update(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    for name in ("Makefile", "Cargo.toml", "pyproject.toml"):
        words.update(re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8")))
    return frozenset(words | set(sys.stdlib_module_names))


@for_each(INTERNAL)
def test_names_in_the_code_exist(document: Path) -> None:
    """Functions, types, constants: identifiers that no ordinary word looks like."""
    unknown = set()
    for code in CODE.findall(prose(document)):
        name = code.removesuffix("()").rpartition("::")[2].rpartition(".")[2]
        telling = "_" in name or "::" in code or code.endswith("()") or name[:1].isupper()
        if telling and re.fullmatch(r"[A-Za-z_]\w+", name) and name not in words_of_the_code():
            unknown.add(code)
    assert not unknown
