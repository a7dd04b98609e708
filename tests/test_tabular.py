"""Records in memory in the forms that people hold them: data frames, columns, tuples, data sets of torch, of ranking too."""

from __future__ import annotations

import itertools
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from understudy.data import load_images
from understudy.data.memory import held, keep
from understudy.data.retrieval_sources import load_rankings
from understudy.data.tabular import is_data
from understudy.errors import InputError
from understudy.runs.objects import named
from understudy.tasks.data_keys import KEYS

RECORDS = [{"text": f"text {i}", "label": f"class {i % 2}"} for i in range(12)]
COLUMNS = {column: [r[column] for r in RECORDS] for column in ("text", "label")}
FORMS = {
    "frame": pd.DataFrame(RECORDS),
    "arrow": pa.Table.from_pylist(RECORDS),
    "tuple": tuple(RECORDS),
    "columns": COLUMNS,
    "arrays": {column: np.array(values) for column, values in COLUMNS.items()},
    "dataset": datasets.Dataset.from_list(RECORDS),
    "splits": {"train": pd.DataFrame(RECORDS)},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_set_has_one_name_in_every_form(form: str) -> None:
    values, _ = named({"task": "text_classification", "data": FORMS[form]})
    assert values["data"] == {"name": keep(RECORDS)}
    inside, _ = named({"task": "text_classification", "data": {"name": FORMS[form], "limit": 5}})
    assert inside["data"] == {"name": keep(RECORDS), "limit": 5}


def test_splits_have_any_of_their_names() -> None:
    frame = pd.DataFrame(RECORDS)
    assert list(held(keep({"train": frame, "dev": frame, "testing": RECORDS}))) == ["train", "validation", "test"]


@pytest.mark.parametrize(
    "keys", [{"name": "sums", "digits": [4, 6]}, {"digits": [4, 6], "systematic_error": [7, 8]}, {"limit": 3}, {}]
)
def test_keys_of_data_are_no_columns(keys: dict[str, Any]) -> None:
    assert not is_data(keys, KEYS["reasoning"].model_fields)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"text": ["a", "b"], "label": [1]}, r"its columns have different lengths \(text 2, label 1\)"),
        ((r for r in RECORDS), r"a generator, which has no length: .*islice"),
        (datasets.Dataset.from_list(RECORDS).to_iterable_dataset(), "an IterableDataset, which has no length"),
    ],
)
def test_what_no_set_is_made_of(data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        named({"task": "text_classification", "data": data})


class Torchvision(Dataset[Any]):
    """As the sets of torchvision: pairs of an image and the number of its class, whose names are beside."""

    classes = ("cat", "dog")

    def __init__(self, images: list[Any]) -> None:
        self.images, self.classes = images, list(Torchvision.classes)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.images[i], i % 2


@pytest.mark.parametrize("scaled", [True, False])
def test_sets_of_torch_are_images_with_classes(scaled: bool) -> None:
    """Of `ToTensor` too, whose fractions become the pixels that they were."""
    pixels = [torch.full((3, 4, 4), 10 * i, dtype=torch.uint8) for i in range(20)]
    images = [p.float() / 255 if scaled else p for p in pixels]
    found = load_images({"name": keep(Torchvision(images))})
    assert found.classes == ["cat", "dog"] and found.train.pixels.dtype == torch.uint8
    for part in (found.train, found.test):
        assert torch.equal(part.pixels[:, 0, 0, 0] // 10 % 2, part.labels) and part.pixels.shape[1:] == (3, 4, 4)
    plain = TensorDataset(torch.stack(images), torch.arange(20) % 2)
    assert torch.equal(load_images({"name": keep(plain)}).train.pixels, found.train.pixels)


TRIPLES = [{"query": f"q{i % 12}", "positive": f"p{i}", "negative": f"n{i}"} for i in range(24)]


@pytest.mark.parametrize("form", ["records", "anchors", "csv", "json", "saved"])
def test_triples_of_every_form_are_the_same_rows(form: str, tmp_path: Any) -> None:
    """In memory, of a file of any kind of records, as `datasets` saves them, and with sentence-transformers' names."""
    rows = [{**t, "query": t["query"]} for t in TRIPLES]
    if form == "anchors":
        rows = [{"anchor": t["query"], "positive": t["positive"], "negative": t["negative"]} for t in TRIPLES]
    name = str(tmp_path / f"triples.{form}")
    if form == "csv":
        pd.DataFrame(rows).to_csv(name, index=False)
    elif form == "json":
        pd.DataFrame(rows).to_json(name, orient="records")
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(name)
    else:
        name = keep(rows)
    reference = tmp_path / "reference.jsonl"
    pd.DataFrame(TRIPLES).to_json(reference, orient="records", lines=True)
    found, wanted = load_rankings({"name": name}), load_rankings({"name": str(reference)})
    assert found.hash == wanted.hash and len(found.train.records) == 18


def test_each_of_several_negatives_is_a_triple() -> None:
    flat = [{"query": f"q{i}", "positive": "p", "negative": f"n{j}"} for i in range(12) for j in range(2)]
    numbered = [{"anchor": f"q{i}", "positive": "p", "negative_1": "n0", "negative_2": "n1"} for i in range(12)]
    listed = [{"query": f"q{i}", "positive": "p", "negatives": ["n0", "n1"]} for i in range(12)]
    hashes = {load_rankings({"name": keep(rows)}).hash for rows in (flat, numbered, listed)}
    assert len(hashes) == 1
    scored = [{**r, "pos_score": 2.0, "neg_score": [1.0, 0.5]} for r in listed]
    rows = load_rankings({"name": keep(scored)}).train.records
    assert [row["members"][0] for row in itertools.islice(rows, 2)] == [[2.0, 1.0], [2.0, 0.5]]
    with pytest.raises(InputError, match=r"2 negatives and neg_score 1\.0: give a list of one for each"):
        load_rankings({"name": keep([{**r, "pos_score": 2.0, "neg_score": 1.0} for r in listed])})


@pytest.mark.parametrize("qrels", ["q{0}\t0\td{0}\t1\n", "q{0}\td{0}\t1\n"])
def test_tables_of_ms_marco_have_no_headers(qrels: str, tmp_path: Any) -> None:
    """`collection.tsv`, `queries.tsv` and qrels as TREC writes them; the first line is no header."""
    (tmp_path / "collection.tsv").write_text("".join(f"d{i}\tpassage about thing {i}\n" for i in range(30)))
    (tmp_path / "queries.train.tsv").write_text("".join(f"q{i}\tthing {i}\n" for i in range(20)))
    (tmp_path / "qrels.train.tsv").write_text("".join(qrels.format(i) for i in range(20)))
    found = load_rankings({"name": str(tmp_path)})
    asked = {row["query"] for part in (found.train, found.validation, found.test) for row in part.records}
    assert asked == {f"thing {i}" for i in range(20)}
    assert all(row["documents"][0] == f"passage about {row['query']}" for row in found.train.records)


@pytest.mark.parametrize("name", ["qrels.txt", "qrels.robust04.txt", "helpdesk.qrels", "qrels.tsv", "qrels/test.trec"])
def test_grades_as_trec_has_them_are_separated_by_spaces(name: str, tmp_path: Any) -> None:
    (tmp_path / "collection.tsv").write_text("".join(f"d{i}\tpassage about thing {i}\n" for i in range(30)))
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\tthing {i}\n" for i in range(20)))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("".join(f"q{i} 0 d{i}  {1 + i % 2}\n\n" for i in range(20)))
    if name == "qrels/test.trec":
        (tmp_path / "qrels/train.trec").write_text("".join(f"q{i} 0 d{i} 1\n" for i in range(10, 20)))
        (tmp_path / name).write_text("".join(f"q{i} 0 d{i} {1 + i % 2}\n" for i in range(10)))
    test = load_rankings({"name": str(tmp_path)}).test.records
    assert test and all(max(row["labels"]) == 1 + int(row["query"].split()[1]) % 2 for row in test)
    (tmp_path / name).write_text("q1 0 d1\nq1 d1\n")
    with pytest.raises(InputError, match=r"row 1, has 2 columns; expected query_id, iteration, doc_id, grade"):
        load_rankings({"name": str(tmp_path)})


def test_a_text_beside_a_table_of_grades_is_no_second_one(tmp_path: Any) -> None:
    (tmp_path / "collection.tsv").write_text("".join(f"d{i}\tpassage about thing {i}\n" for i in range(30)))
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\tthing {i}\n" for i in range(20)))
    (tmp_path / "qrels.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(20)))
    alone = load_rankings({"name": str(tmp_path)}).hash
    (tmp_path / "about-qrels.txt").write_text("Who graded these, and when.\n")
    assert load_rankings({"name": str(tmp_path)}).hash == alone
