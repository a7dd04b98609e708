"""The scoreboard and the branches of the taxonomy: counts from result files, order, selection, committed pages."""

import json
import re
import shutil
from pathlib import Path

import pytest

from understudy.catalogue import catalogue, find, select
from understudy.cli import main
from understudy.errors import InputError
from understudy.scoreboard import PILLARS, branch, counted, render_scoreboard, rows, summary

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def results(tmp_path):
    """Three results: one supported, one not supported, and one whose embedded setting is open and whose real one is not."""
    found = json.loads((DOCS / "claims" / "pld.json").read_text())
    for name, verdict in {
        "pld": "not supported",
        "kd3": "supported",
        "taid": "inconclusive",
        "taid.real": "supported",
    }.items():
        checks = [found["checks"][0] | {"verdict": verdict}, found["checks"][1] | {"verdict": "inconclusive"}]
        (tmp_path / f"{name}.json").write_text(json.dumps(found | {"checks": checks}))
    return tmp_path


def test_a_paper_counts_once(results):
    board = rows(results)
    assert [r.entry.number for r in board] == sorted([*range(1, 42), 19])
    assert counted(board) == {"supported": 2, "not supported": 1, "inconclusive": 0, "not run": 38}
    assert summary(board).startswith("3 of 41 claims decided")
    (row,) = [r for r in board if r.entry.name == "pld"]
    assert row.seeds == 4 and row.tally == "0 of 1 decided, 2 in all"
    assert row.cost == pytest.approx(19.4 / 14.7)


def test_settings_that_disagree_do_not_count_as_support(results):
    found = json.loads((results / "pld.json").read_text())
    found["checks"][0]["verdict"] = "supported"
    (results / "pld.real.json").write_text(json.dumps(found))
    assert counted(rows(results))["not supported"] == 1 and counted(rows(results))["supported"] == 2


def test_the_page_holds_every_row(results, tmp_path):
    text = render_scoreboard(results, tmp_path / "board").read_text()
    assert len(re.findall(r"<tr data-verdict=", text)) == 42
    assert "3 of 41 claims decided" in text and "understudy reproduce pld --max-seeds 20" in text
    assert "http" not in text.replace("http://www.w3.org", "")  # nothing is loaded from elsewhere


def test_methods_of_a_family_stand_side_by_side(results, tmp_path):
    shutil.copytree(DOCS / "comparisons", tmp_path / "comparisons")
    (tmp_path / "claims").mkdir()
    for file in results.glob("*.json"):
        file.rename(tmp_path / "claims" / file.name)
    text = render_scoreboard(tmp_path / "claims", tmp_path / "site" / "board").read_text()
    compared = json.loads((DOCS / "comparisons" / "sst2.json").read_text())
    section = text.split("<h3>sst2</h3>")[1].split("</section>")[0]
    assert 'src="../../comparisons/sst2.svg"' in section
    best = max(compared["table"], key=lambda row: row["mean"])
    methods = re.findall(r"<tr><td><code>([\w-]+)</code></td><td>([\d.]+)", section)
    assert methods[0] == (best["method"], f"{best['mean']:.3f}") and len(methods) == len(compared["table"])


def test_a_comparison_that_is_none_is_refused(results, tmp_path):
    (tmp_path / "comparisons").mkdir()
    (tmp_path / "comparisons" / "mine.json").write_text('{"title": "mine"}')
    (tmp_path / "claims").mkdir()
    with pytest.raises(InputError, match=r"mine\.json is no result of `understudy compare`"):
        render_scoreboard(tmp_path / "claims", tmp_path / "board")


def test_a_branch_tries_first_what_was_supported(results):
    text = branch("elicitation", "feature", rows(results))
    names = re.findall(r"^\| \[?`([\w-]+)`", text, re.MULTILINE)
    assert set(names[:2]) == {"kd3", "taid"} and names[-1] == "pld"
    assert set(names) == {e.name for e in select(elicitation="feature") if e.kind != "survey"}


def test_the_command_counts(results, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["scoreboard", str(results), "--json"])
    assert ended.value.code == 0 and json.loads(capsys.readouterr().out)["decided"] == 3


def test_what_is_no_result_is_refused(results):
    (results / "dpo.json").write_text('{"verdict": "supported"}')
    with pytest.raises(InputError, match=r"dpo\.json is no result"):
        rows(results)
    with pytest.raises(InputError, match="There is no folder"):
        rows(results / "missing")


def test_a_selection_of_nothing_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["methods", "--access", "black", "--algorithm", "divergence_similarity"])
    assert ended.value.code == 0 and "No paper and no baseline has all of these" in capsys.readouterr().out


def test_selection_is_by_every_value_asked_for():
    numbers = {e.number for e in select(access="black", elicitation="labeling")}
    assert numbers == {1, 11, 16, 21, 24, 28, 36}  # all of black access but 34, which only corrects and expands
    assert {e.number for e in select(algorithm="none_prompting")} == {
        7,
        34,
        37,
    }  # and the surveys, which have every value
    assert len(select()) == len(catalogue())
    with pytest.raises(InputError, match=r"No method has access 'blak'\. Did you mean 'black'"):
        select(access="blak")
    with pytest.raises(InputError, match=r"Known: .*divergence_similarity"):
        select(access="black", algorithm="gan")


def test_a_paper_is_found_by_its_own_name_too():
    assert find("dpo-variants") is not None and find("dpo-variants") == find("dpo") == find("39")


def test_committed_branches_and_scoreboard_are_current(tmp_path):
    board = rows(DOCS / "claims")
    assert summary(board) in (DOCS.parent / "README.md").read_text(), "run `make docs`"
    for pillar, values in PILLARS.items():
        for value in values:
            assert (DOCS / "survey" / f"{pillar}-{value}.md").read_text() == branch(pillar, value, board) + "\n", (
                "make docs"
            )
    for name in ("claims", "comparisons"):
        shutil.copytree(DOCS / name, tmp_path / name)
    page = render_scoreboard(tmp_path / "claims", tmp_path / "board")
    assert page.read_text() == (DOCS / "scoreboard" / "index.html").read_text(), "run `make docs`"


def test_a_page_that_is_not_ours_is_left_alone(results, tmp_path):
    page = tmp_path / "site" / "index.html"
    render_scoreboard(results, page.parent)
    render_scoreboard(results, page.parent)  # ours is drawn anew
    page.write_text("<title>My site</title>")
    with pytest.raises(InputError, match=r"index\.html is no scoreboard of ours"):
        render_scoreboard(results, page.parent)
    assert page.read_text() == "<title>My site</title>"
