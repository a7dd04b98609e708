"""Write the generated pages: one per method, and the catalogue. `make docs` runs this; a test keeps them current."""

from __future__ import annotations

from pathlib import Path

from understudy.catalogue import catalogue
from understudy.pages import page, table


def build(folder: Path) -> None:
    """Write `catalogue.md` and `methods/NAME.md` below `folder`."""
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    (folder / "catalogue.md").write_text(f"# Catalogue\n\n{table()}\n", encoding="utf-8")
    for entry in catalogue():
        if entry.status == "works":
            (folder / "methods" / f"{entry.name}.md").write_text(page(entry) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(__file__).parent)
