"""Images whose classes a table names: `metadata.csv` and its kin of `imagefolder`, CSV files, labels that are names."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from understudy.data import memory
from understudy.data.images import Splits, load_images
from understudy.data.noise_sets import load_source
from understudy.errors import InputError

CLASSES = ("cat", "dog")


def images(folder: Path, number: int) -> list[str]:
    folder.mkdir(parents=True)
    for i in range(number):  # the pixel says which image it is
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(number)]


def told(part: object) -> dict[int, int]:
    """By image its label."""
    return dict(zip(part.pixels[:, 0, 0, 0].tolist(), part.labels.tolist(), strict=True))  # type: ignore[attr-defined]


def right(found: Splits, *splits: str) -> None:
    for split in splits:
        assert all(label == image % 2 for image, label in told(getattr(found, split)).items()), split


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_flat_folder_with_a_metadata_table(tmp_path: Path, kind: str) -> None:
    """The imagefolder convention of `datasets`: `file_name` beside a label, in one folder."""
    names = images(tmp_path / "x", 20)
    rows = [{"file_name": name, "label": CLASSES[i % 2]} for i, name in enumerate(names)]
    file = tmp_path / "x" / f"metadata.{kind}"
    table = datasets.Dataset.from_list(rows)
    {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](file)
    found = load_images({"name": str(tmp_path / "x")})
    assert found.classes == ["cat", "dog"] and len(found.train) + len(found.validation) + len(found.test) == 20
    right(found, "train", "validation", "test")


def test_splits_of_a_metadata_table(tmp_path: Path) -> None:
    """A table in each split's folder, or one of the whole folder whose files lie in the folders of splits."""
    for split in ("train", "val", "test"):
        images(tmp_path / "x" / split, 8)
        rows = [{"file_name": f"{i}.png", "animal": CLASSES[i % 2], "site": f"s{i % 3}"} for i in range(6)]
        (tmp_path / "x" / split / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    spec = {"name": str(tmp_path / "x"), "label_column": "animal", "domain_column": "site"}
    inside = load_images(spec)
    for split in ("train", "val", "test"):
        (tmp_path / "x" / split / "metadata.jsonl").unlink()
    lines = [f"{split}/{i}.png,{CLASSES[i % 2]},s{i % 3}\n" for split in ("train", "val", "test") for i in range(6)]
    (tmp_path / "x" / "metadata.csv").write_text("file_name,animal,site\n" + "".join(lines))
    for found in (inside, load_images(spec)):
        assert [len(part) for part in (found.train, found.validation, found.test)] == [6, 6, 6]
        assert found.domains == ("s0", "s1", "s2")
        assert any("6 images that no row of a table names were left out" in note for note in found.notes)
        right(found, "train", "validation", "test")


def test_csv_files_that_name_images(tmp_path: Path) -> None:
    """`train.csv` and `test.csv` beside a folder of images, which is then no class; or one such file."""
    images(tmp_path / "x" / "images", 20)
    for split, part in (("train", range(14)), ("test", range(14, 20))):
        lines = [f"images/{i}.png,{CLASSES[i % 2]}\n" for i in part]
        (tmp_path / "x" / f"{split}.csv").write_text("image,label\n" + "".join(lines))
    found = load_images({"name": str(tmp_path / "x")})
    assert len(found.test) == 6 and found.classes == ["cat", "dog"]
    right(found, "train", "test")
    right(load_images({"name": str(tmp_path / "x" / "train.csv")}), "train", "test")


def test_images_are_generated_by_the_classes_of_a_table(tmp_path: Path) -> None:
    """The same folder for image_generation: with classes by the table, without any by captions alone."""
    images(tmp_path / "x", 20)
    table = tmp_path / "x" / "metadata.csv"
    for column, classes in (("label", 2), ("text", 0)):
        table.write_text(f"file_name,{column}\n" + "".join(f"{i}.png,{CLASSES[i % 2]}\n" for i in range(20)))
        assert load_source({"name": str(tmp_path / "x")}).classes == classes


@pytest.mark.parametrize("kind", ["list", "dataset", "parquet", "npz"])
def test_labels_that_are_names(tmp_path: Path, kind: str) -> None:
    """A column of text is a column of classes, sorted as folders of classes are."""
    pixels = [np.full((4, 4), i, np.uint8) for i in range(20)]
    labels = [CLASSES[1 - i % 2] if i < 2 else CLASSES[i % 2] for i in range(20)]
    labels[:2] = ["cat", "dog"]
    rows = [{"image": p, "label": c} for p, c in zip(pixels, labels, strict=True)]
    held = datasets.Dataset.from_list([{**r, "image": Image.fromarray(r["image"])} for r in rows])
    name = str(tmp_path / f"train.{kind}")
    if kind == "npz":
        np.savez(name, image=np.stack(pixels), label=np.array(labels))
    elif kind == "parquet":
        held.to_parquet(name)
    else:
        name = memory.keep(rows if kind == "list" else held)
    found = load_images({"name": name})
    assert found.classes == ["cat", "dog"]
    right(found, "train", "validation", "test")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0.png,cat\n9.png,dog\n", "line 3) names '9.png' in its column file_name, and"),
        ("0.png,cat\n1.png,\n", "image 1 has no label, and the classes of train are cat"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: str, said: str) -> None:
    images(tmp_path / "x", 3)
    (tmp_path / "x" / "metadata.csv").write_text("file_name,label\n" + rows)
    with pytest.raises(InputError) as caught:
        load_images({"name": str(tmp_path / "x")})
    assert said in str(caught.value)


def test_a_metadata_table_without_labels_is_named(tmp_path: Path) -> None:
    """Which columns it has, and the option that names the labels."""
    images(tmp_path / "x", 3)
    (tmp_path / "x" / "metadata.csv").write_text("file_name,animal\n0.png,cat\n")
    with pytest.raises(InputError, match=r"metadata.csv has columns animal, file_name; expected .*data.label_column"):
        load_images({"name": str(tmp_path / "x")})


def test_a_class_of_another_split_is_named(tmp_path: Path) -> None:
    images(tmp_path / "x", 6)
    for split, column in (("train", "cat dog cat dog"), ("test", "cat bird")):
        lines = [f"{i}.png,{c}\n" for i, c in enumerate(column.split())]
        (tmp_path / "x" / f"{split}.csv").write_text("file_name,label\n" + "".join(lines))
    with pytest.raises(InputError, match="test: image 1 has the label 'bird', and the classes of train are cat, dog"):
        load_images({"name": str(tmp_path / "x")})
