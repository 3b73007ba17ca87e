"""Links between the pages of the repository lead to files, and to headings, that exist."""

import re
from pathlib import Path

import pytest

from tests.support.mesh import ROOT

FOLDERS = [
    *("", "docs", "docs/decisions", "docs/operations"),
    *("deploy/compose", "deploy/docker", "deploy/envoy", "deploy/k8s", "deploy/systemd", "examples/native"),
]
PAGES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Each link to a file of the repository names one that exists, and a heading that it has."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_indexes_list_every_page() -> None:
    """docs/README.md links every page of docs, and docs/decisions/README.md every decision."""
    docs = ROOT / "docs"
    linked = {(docs / link).resolve() for link in LINK.findall((docs / "README.md").read_text())}
    assert {page for page in PAGES if page.parent in {docs, docs / "operations"}} - {docs / "README.md"} <= linked
    index = (docs / "decisions" / "README.md").read_text()
    decisions = [page for page in PAGES if page.parent == docs / "decisions" and page.name != "README.md"]
    assert LINK.findall(index)[1:] == [page.name for page in decisions]


def test_decisions_name_their_goals() -> None:
    """Each decision says which of the goals in docs/goals.md it serves."""
    goals = re.findall(r"^(\d+)\. \*\*", (ROOT / "docs" / "goals.md").read_text(), re.MULTILINE)
    for page in sorted((ROOT / "docs" / "decisions").glob("0*.md")):
        named = re.search(r"^Goals: ([\d, ]+) \(\[goals\]\(\.\./goals\.md\)\)\.$", page.read_text(), re.MULTILINE)
        assert named is not None, page.name
        assert {*named[1].split(", ")} <= {*goals}, page.name
