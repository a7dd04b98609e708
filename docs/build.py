"""Write the generated pages: one per method, the catalogue, and its table in the README. A test keeps them current."""

from __future__ import annotations

import json
import re
from pathlib import Path

from understudy.catalogue import catalogue
from understudy.claims import claims
from understudy.keys import page as keys_page
from understudy.pages import comparison, drawing, findings, notebook_page, page, searches, table
from understudy.reporting.plots import curves, ranked, standalone
from understudy.reporting.ranks import compared_ranks, over_seeds
from understudy.scoreboard import PILLARS, branch, choice, render_scoreboard, rows, summary


def build(folder: Path) -> None:
    """Write `catalogue.md` and `methods/NAME.md` below `folder`."""
    (folder / "methods").mkdir(parents=True, exist_ok=True)
    (folder / "catalogue.md").write_text(f"# Catalogue\n\n{table()}\n", encoding="utf-8")
    (folder / "keys.md").write_text(keys_page() + "\n", encoding="utf-8")
    trained = json.loads((folder / "curves.json").read_text(encoding="utf-8"))
    for entry in catalogue():
        if entry.status == "works":
            curve = trained.get(entry.name)
            (folder / "methods" / f"{entry.name}.md").write_text(page(entry, curve) + "\n", encoding="utf-8")
            if curve and len(curve["steps"]) > 1:
                drawn = curves({entry.name: (curve["steps"], curve["values"])}, f"validation {curve['metric']}")
                (folder / "methods" / f"{entry.name}.svg").write_text(standalone(drawn), encoding="utf-8")
    (folder / "notebooks").mkdir(exist_ok=True)
    for path in (folder.parent / "examples" / "notebooks").glob("*.ipynb"):
        (folder / "notebooks" / f"{path.stem}.md").write_text(notebook_page(path) + "\n", encoding="utf-8")
    readme = folder.parent / "README.md"
    head = readme.read_text(encoding="utf-8").split("## Catalogue\n")[0]
    head = re.sub(r"\d+ of \d+ claims decided: [^.]*\.", summary(rows(folder / "claims")), head)
    readme.write_text(f"{head}## Catalogue\n\n{table()}\n", encoding="utf-8")
    found = "# What was found\n\nEach claim of a paper as an experiment: every arm with the same budget and as many candidates to tune over, chosen\n"
    found += "on validation, evaluated on test. `understudy reproduce NAME` tries it again. Small models on small data: they say how the\n"
    found += "methods behave here, not what they do at scale. Where a check names fewer seeds than its claim,\n"
    found += "an arm of it stopped earlier. Full results lie beside this page.\n\n"
    care = "\n\n## To be read with care\n\n" + "".join(
        f"- `{n}`{where}: {told.caveat}\n"
        for n, claim in claims().items()
        for where, told in (("", claim), *((f" {s}", setting) for s, setting in claim.settings.items()))
        if told.caveat
    )
    table_of_searches = searches(folder / "claims")
    searched = "\n\n## Searched where it was not supported\n\nThe main check on validation data with other options of the method's own, all else as it was judged. Three seeds that\n"
    searched += "are not judged; intervals are of one setting, and not corrected for how many were tried. No verdict is changed by it.\n\n"
    searched = searched + table_of_searches if table_of_searches else ""
    whole = found + findings(folder / "claims") + searched + care
    (folder / "claims" / "README.md").write_text(whole, encoding="utf-8")
    compared = [
        "# Methods side by side\n\nEvery method that works on a task, with the same student, data, steps and learning rate; no arm is tuned. Seeds are the\n"
        "blocks of the ranks: a bar joins methods that the critical difference does not tell apart. As it came out.\n"
    ]
    (folder / "comparisons").mkdir(exist_ok=True)
    for file in sorted((folder / "comparisons").glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        ranks = compared_ranks(over_seeds(result))
        assert not isinstance(ranks, str), ranks
        picture = ranked(ranks.names, ranks.ranks, ranks.difference, ranks.groups)
        file.with_suffix(".svg").write_text(standalone(picture), encoding="utf-8")
        recipe = folder.parent / "benchmarks" / "comparisons" / f"{file.stem}.yaml"
        about = recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        compared.append(comparison(file.stem, about, result) + "\n")
    (folder / "comparisons" / "README.md").write_text("\n".join(compared), encoding="utf-8")
    render_scoreboard(folder / "claims", folder / "scoreboard")
    board = rows(folder / "claims")
    (folder / "choose.md").write_text(choice(board) + "\n", encoding="utf-8")
    (folder / "survey").mkdir(exist_ok=True)
    for pillar, values in PILLARS.items():
        for value in values:
            (folder / "survey" / f"{pillar}-{value}.md").write_text(
                branch(pillar, value, board) + "\n", encoding="utf-8"
            )
    architecture = folder / "architecture.md"
    before, _, rest = architecture.read_text(encoding="utf-8").partition("```mermaid")
    architecture.write_text(before + drawing() + rest.partition("```")[2], encoding="utf-8")


if __name__ == "__main__":
    build(Path(__file__).parent)
