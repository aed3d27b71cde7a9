"""The written pages say what is there: links resolve, commands exist, the report's keys and the
table of cards are the program's own."""

import importlib.util
import re
from pathlib import Path

import pytest

from scripts.report import card_table
from tests.schedules import every
from zimage_jax import ZImage

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for folder in (ROOT, ROOT / "zimage_jax", ROOT / "scripts")
    for page in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
)


def anchors(page: Path) -> set[str]:
    """The fragments GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"(?:\]\(|src=\")([^)\"]+)", page.read_text("utf-8")):
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} is not there"
        assert not fragment or fragment in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_files_exist(page):
    text = page.read_text("utf-8")
    for module in re.findall(
        r"python -m ((?:zimage_jax|scripts|checkpoints_convert)[\w.]*\w)", text
    ):
        assert importlib.util.find_spec(module), f"python -m {module}"
    for file in re.findall(r"(?<![\w/.])((?:scripts|tests|zimage_jax)/[\w/]+\.\w+)", text):
        assert (ROOT / file).exists(), file


def test_every_report_key_is_documented():
    result = ZImage.load().generate("a red circle", seed=1, width=96, height=96, steps=1)
    page = (ROOT / "zimage_jax" / "README.md").read_text("utf-8")
    table = page.split("## Report keys")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    assert {key for row in rows for key in re.findall(r"`(\w+)`", row)} == result.report.keys()


@pytest.mark.parametrize("card", every(["rtx-3060-laptop", "rtx-4090", "rtx-5090"], ["rtx-4090"]))
def test_the_tables_of_cards_are_the_planners(card):
    """A card of each compute capability in the table."""
    row = card_table.row(card)
    for name in ("README.md", "README.zh.md"):
        assert row in (ROOT / name).read_text("utf-8").splitlines(), (
            "renew it: python -m scripts.report.card_table README.md README.zh.md"
        )


def test_rows_replace_only_the_rows():
    page = "| card | x |\n|---|---|\n| RTX 4060, 8 GB | old |\n| RTX 4090, 24 GB | old |\n\nafter\n"
    assert card_table.replaced(page, ["| new |"]) == "| card | x |\n|---|---|\n| new |\n\nafter\n"
    with pytest.raises(ValueError, match="no row begins"):
        card_table.replaced("no table\n", ["| new |"])
