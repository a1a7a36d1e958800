"""What README.md and docs/ say of the code: links, files, functions, keys, numbers."""

import functools
import importlib
import re
from pathlib import Path

import pytest

from configs.cub import get_config
from cra_jax.reports import paper_results
from cra_jax.runtime.run_directory import flatten

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md"))]
LONGEST_README = 150
FILE_SUFFIXES = ("py", "safetensors", "stablehlo")
_NAMES = {"resnet50": "ResNet-50", "resnet101": "ResNet-101"}
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")

every_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


@functools.cache
def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    words = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"\s+", "-", word) for word in words}


@every_page
def test_links_lead_to_files_and_headings(page):
    text = prose_of(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        if anchor:
            assert anchor in anchors_of(target), link


@every_page
def test_files_that_a_page_names_are_there(page):
    known = {"cra_jax", "configs", "tests", "benchmarks", "notebooks", "docs"}
    for code in _CODE.findall(prose_of(page)):
        path = re.fullmatch(r"(\w+)/[\w./-]+", code)
        if path and path[1] in known:
            assert (ROOT / code).exists(), code


@every_page
def test_keys_that_a_page_names_are_those_of_the_config(page):
    keys = flatten(get_config().to_dict())
    sections = {key.split(".")[0] for key in keys if "." in key}
    text = prose_of(page)
    named = re.findall(r"--config\.([a-z_.]*[a-z_])", page.read_text())
    for code in _CODE.findall(text):
        named += re.findall(r"^([a-z]+\.[a-z_]+)(?:=[^/]*)?$", code)
    for key in named:
        section, _, name = key.partition(".")
        if (section in sections and name not in FILE_SUFFIXES) or not name:
            assert key in keys, key


def test_functions_of_the_equations_are_where_the_page_says():
    text = " ".join((ROOT / "docs" / "method.md").read_text().split())
    found = re.findall(r"((?:`\w+`(?:, | and )?)+) in `(cra_jax/\w+)\.py`", text)
    places = [
        (name, file) for names, file in found for name in re.findall(r"\w+", names)
    ]
    assert len(places) >= 12
    for name, file in places:
        if name != "and":
            module = importlib.import_module(file.replace("/", "."))
            assert hasattr(module, name), f"{name} in {file}.py"


def rows_of(page: Path) -> list[list[str]]:
    lines = [x for x in page.read_text().splitlines() if x.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_the_numbers_of_the_paper_in_the_readme():
    found = set()
    for row in rows_of(ROOT / "README.md"):
        if row[0] in ("1", "2", "3"):
            for kind, cell in (("baseline", row[4]), ("cra", row[5])):
                if cell:
                    found.add((f"Table {row[0]}", *row[1:4], kind, cell))
    assert found == {
        (
            *(x.table, paper_results.NAMES[x.data], _NAMES[x.backbone], x.protocol),
            *(x.kind, f"{100 * x.top1:.1f} %"),
        )
        for x in paper_results.ROWS
    }


def test_the_numbers_of_the_paper_on_the_page_on_reproducing():
    kinds = {"baseline": "baseline", "CRA-CNN": "cra"}
    found = {
        (f"Table {row[0]}", *row[1:3], kinds[row[3]], *row[4:6])
        for row in rows_of(ROOT / "docs" / "reproduce.md")
        if row[0] in ("1", "2", "3")
    }
    assert found == {
        (
            *(x.table, paper_results.NAMES[x.data], x.backbone, x.kind),
            *(x.protocol, f"{100 * x.top1:.1f}"),
        )
        for x in paper_results.ROWS
    }
