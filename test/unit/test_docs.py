"""The documents hold together: links resolve, code blocks parse, the list of decisions is complete."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(page.read_text()) if name == language]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_blocks_parse(page: Path) -> None:
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{block}"
    for block in blocks(page, "python"):
        ast.parse(block)


def test_every_page_is_reachable_from_the_readme() -> None:
    seen, todo = set[Path](), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(page.read_text())]
        todo += [(page.parent / link).resolve() for link in links if link.endswith(".md") and ":" not in link]
    assert [page_id(p) for p in PAGES if p not in seen] == []


def test_decisions_are_listed_and_complete() -> None:
    folder = ROOT / "docs" / "adr"
    files = sorted(folder.glob("[0-9]*.md"))
    listed = LINK.findall((folder / "README.md").read_text())
    assert [file.name for file in files] == listed
    assert len({file.name[:4] for file in files}) == len(files)
    for file in files:
        text = file.read_text()
        assert text.startswith(f"# {int(file.name[:4])}. ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
        assert len(text.splitlines()) <= 50, "a decision fits on a page"


def test_flags_in_commands_are_served() -> None:
    from moonlang.config import table

    flags = table.load()
    known = {name for name, row in {**flags.spellings, **flags.exact}.items() if row.status == "supported"}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for command in re.sub(r"\\\n", " ", block).splitlines():
                server = re.search(r"(scripts/serve|launch_server|moonlang serve)(.*)", command)
                for flag in re.findall(r"(?<=\s)--[a-z][\w-]*", server[2]) if server else []:
                    assert flag in known | {"--help", "--config"}, f"{page_id(page)}: {flag} in {command!r}"
