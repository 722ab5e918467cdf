"""README.md, docs/ and CHANGELOG.md: links, paths, citations of docs/model.md, and the version."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import blip3o_jax

ROOT = Path(__file__).resolve().parent.parent
README, CHANGELOG, MODEL = ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "docs/model.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, CHANGELOG]
FOLDERS = ("blip3o_jax", "configs", "docs", "findings", "launch", "tests")
SOURCES = [
    path
    for folder in ("blip3o_jax", "configs", "launch", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__).resolve()
]
MAX_README = 8192  # bytes

FENCE = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
# "docs/model.md §1.1, §6.6 no. 1 and 2"
CITATION = re.compile(r"docs/model\.md((?:(?:,| and)? §[\d.]*\d(?: no\. \d+(?: and \d+)?)?)*)")


def prose(page: str) -> str:
    """The text without its fenced blocks."""
    return FENCE.sub("", page)


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links whose file or anchor does not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists():
            broken.append(target)
            continue
        if anchor and anchor not in anchors(path.read_text() if name else text):
            broken.append(target)
    return broken


def missing_paths(text: str) -> list[str]:
    """Code spans that look like a path of the repository and are none."""
    pattern = rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*"
    paths = [span for span in SPAN.findall(prose(text)) if re.fullmatch(pattern, span)]
    return [path for path in paths if not any(ROOT.glob(path.rstrip("/")))]


def bad_citations(source: str) -> list[str]:
    """Citations in a source that name no section, or no row of the numbered departures."""
    page = MODEL.read_text()
    numbers = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\b", prose(page), re.MULTILINE))
    table = page.partition("### 6.6 ")[2].partition("\n## ")[0]
    departures = set(re.findall(r"^\| (\d+) \|", table, re.MULTILINE))
    bad = []
    for citation in CITATION.findall(re.sub(r"\s+(?:#\s+)?", " ", source)):
        bad += [f"§{n}" for n in re.findall(r"§([\d.]*\d)", citation) if n not in numbers]
        bad += [
            f"no. {n}" for n in re.findall(r"(?:no\.|and) (\d+)", citation) if n not in departures
        ]
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_resolve(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_seen():
    links = ["#a-b", "#a-c", "docs/nothing.md", "docs/model.md#21-qwen3", "docs/model.md#no-such"]
    text = "# A b\n" + " ".join(f"[x]({link})" for link in links)
    assert broken_links(README, text) == ["#a-c", "docs/nothing.md", "docs/model.md#no-such"]


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda path: path.name)
def test_paths_exist(page):
    assert missing_paths(page.read_text()) == []


def test_a_missing_path_is_seen():
    text = "`tests/test_docs.py` `launch/env/*.env` `tests/nothing.py` `docs/*.rst` `a/b.py`"
    assert missing_paths(text) == ["tests/nothing.py", "docs/*.rst"]


def test_the_map_of_the_code_names_what_exists():
    table, _, beside = README.read_text().partition("## Map of the code")[2].partition("\n\nBeside")
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows[1:] for name in SPAN.findall(row)]
    assert len(names) > 10
    assert [name for name in names if not (ROOT / "blip3o_jax" / name).exists()] == []
    folders = SPAN.findall(beside.partition("\n\n")[0])
    assert [name for name in folders if not (ROOT / name).exists()] == []


def test_readme_is_short_and_leads_everywhere():
    links = re.findall(r"\]\((docs/[\w.-]+)", README.read_text())
    assert README.stat().st_size <= MAX_README
    assert set(links) == {f"docs/{path.name}" for path in DOCS}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_cite_nothing_outside_the_repository(page):
    assert re.findall(r"spec,? S\d|MODEL_SPEC", page.read_text()) == []


def test_citations_of_the_model_resolve():
    bad = {str(path.relative_to(ROOT)): bad_citations(path.read_text()) for path in SOURCES}
    assert {path: citations for path, citations in bad.items() if citations} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("(docs/model.md §2.1, §4.3)", []),
        ("docs/model.md §6.6 no. 1 and 2", []),
        ("# docs/model.md\n    # §2.9", ["§2.9"]),
        ("docs/model.md §1.1 and §8", ["§8"]),
        ("docs/model.md §6.6 no. 17", ["no. 17"]),
        ("docs/model.md, in general", []),
    ],
)
def test_a_bad_citation_is_seen(source, expected):
    assert bad_citations(source) == expected


def test_one_version():
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## \[([\d.]+)\]", CHANGELOG.read_text(), re.MULTILINE)
    assert blip3o_jax.__version__ == package == citation["version"] == released[0]


def test_the_citation_file_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    (paper,) = citation["references"]
    for entry in (citation, paper):
        assert entry["title"]
        assert entry["authors"]
        assert entry["type"] in ("software", "article")
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2510.15857"}]
