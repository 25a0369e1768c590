"""The README's tables are the committed CSV files."""

from pathlib import Path

from tests.experiments.tables import with_tables

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_tables_in_the_readme_are_made_from_the_csv_files():
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: uv run --frozen python -m tests.experiments.tables"
