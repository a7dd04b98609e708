"""Images, graphs and rankings as people have them: splits by name, photographs, archives of any layout, triples."""

import json
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as Picture
from PIL import Image

from understudy import InputError, distill
from understudy.data import load_graph, load_images, load_preferences, load_text
from understudy.data.folders import split_of
from understudy.data.memory import keep
from understudy.data.retrieval_sources import load_rankings
from understudy.data.scored_triples import Triple, read_texts, read_triples, write_triples

RNG = np.random.default_rng(0)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def prompts(letter, number):
    return [{"prompt": f"{letter} {i}", "completion": "c"} for i in range(number)]


def image(folder, name, values=None, mode=None, **options):
    """A saved image; of random pixels if none are given."""
    folder.mkdir(parents=True, exist_ok=True)
    values = RNG.integers(0, 255, (8, 8, 3), dtype=np.uint8) if values is None else np.asarray(values)
    Image.fromarray(values, mode).save(folder / name, **options)


def classes(folder, values=None, each=12, name="{}.png", mode=None, **options):
    for kind in ("cat", "dog"):
        for i in range(each):
            image(folder / kind, name.format(i), values, mode, **options)
    return str(folder)


def archive(path, images, labels=None, **columns):
    np.savez(path, images=images, labels=np.arange(len(images)) % 2 if labels is None else labels, **columns)
    return {"name": str(path)}


# Splits by name


@pytest.mark.parametrize(
    "name,split",
    [
        ("train-00000-of-00002", "train"),
        ("my_validation", "validation"),
        ("val", "validation"),
        ("x.dev", "validation"),
        ("EVAL 3", "validation"),
        ("test1", "test"),
        ("trainer", None),
        ("contest", None),
    ],
)
def test_a_name_says_its_split_in_words_of_its_own(name, split):
    assert split_of(name) == split


def test_a_name_of_two_splits_is_refused():
    with pytest.raises(InputError, match="names two splits, train and test"):
        split_of("train_and_test")


@pytest.mark.parametrize("place", ["{}-0000{}-of-00002.jsonl", "data/{}-0000{}-of-00002.jsonl", "{}/part{}.jsonl"])
def test_shards_of_texts_are_joined_and_stay_in_their_split(tmp_path, place):
    for split, letter in (("train", "t"), ("valid", "v"), ("test", "e")):
        for shard in range(2):
            lines(tmp_path / place.format(split, shard), prompts(f"{letter}{shard}", 10))
    found = load_text({"name": str(tmp_path)})
    for records, letter in ((found.train, "t"), (found.validation, "v"), (found.test, "e")):
        assert sorted({r["prompt"][:2] for r in records}) == [f"{letter}0", f"{letter}1"] and len(records) == 20
    assert not found.notes


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev", "eval"])
def test_preferences_and_texts_use_the_validation_file_by_any_name(tmp_path, word):
    for split, letter in (("train", "t"), (word, "v"), ("test", "e")):
        lines(
            tmp_path / f"{split}.jsonl", [{"prompt": f"{letter}{i}", "chosen": "a", "rejected": "b"} for i in range(12)]
        )
        lines(tmp_path / "text" / f"{split}.jsonl", prompts(letter, 12))
    for found in (load_preferences({"name": str(tmp_path)}), load_text({"name": str(tmp_path / "text")})):
        assert [{r["prompt"][0] for r in part} for part in (found.train, found.validation, found.test)] == [
            {"t"},
            {"v"},
            {"e"},
        ]


def test_files_that_cannot_all_be_one_split_are_refused_by_name(tmp_path):
    lines(tmp_path / "train.jsonl", prompts("t", 20))
    for other, says in (
        ("train.json", "train.json and train.jsonl, both the train split"),
        ("train-00000-of-00001.jsonl", "train-00000-of-00001.jsonl and train.jsonl, both the train split"),
        ("training.jsonl", "train.jsonl and training.jsonl"),
    ):
        lines(tmp_path / other, prompts("t", 20))
        with pytest.raises(InputError, match=says):
            load_text({"name": str(tmp_path)})
        (tmp_path / other).unlink()
    lines(tmp_path / "test-00001-of-00003.jsonl", prompts("e", 20))
    with pytest.raises(InputError, match="shard 0 of the 3 shards of the test split is not there"):
        load_text({"name": str(tmp_path)})


def test_what_no_split_is_named_after_is_noted_and_hidden_files_are_not_read(tmp_path):
    lines(tmp_path / "train.jsonl", prompts("t", 30))
    lines(tmp_path / "train_harder.jsonl", prompts("h", 30))
    lines(tmp_path / "more.jsonl", prompts("m", 30))
    lines(tmp_path / ".train.jsonl", prompts("x", 30))
    lines(tmp_path / ".ipynb_checkpoints" / "test.jsonl", prompts("x", 30))
    found = load_text({"name": str(tmp_path)})
    assert {r["prompt"][0] for part in (found.train, found.validation, found.test) for r in part} == {"t"}
    assert "2 files that no split is named after were left out: more.jsonl, train_harder.jsonl" in found.notes[0]


def test_image_files_and_folders_use_every_split(tmp_path):
    for split, number, value in (("train", 20, 1), ("val", 6, 2), ("test", 4, 3), ("test_night", 5, 4)):
        values = np.full((number, 3, 8, 8), value, np.uint8)
        archive(tmp_path / f"{split}-00000-of-00002.npz", values[:2])
        archive(tmp_path / f"{split}-00001-of-00002.npz", values[2:])
        classes(tmp_path / "folders" / split, np.full((8, 8, 3), value, np.uint8), number // 2)
    for name, night in ((tmp_path, 5), (tmp_path / "folders", 4)):
        found = load_images({"name": str(name)})
        parts = (found.train, found.validation, found.test, *found.more_tests.values())
        assert [len(p) for p in parts] == [20, 6, 4, night] and [set(p.pixels.flatten().tolist()) for p in parts] == [
            {1},
            {2},
            {3},
            {4},
        ]
        assert len(set(found.train.ids.tolist())) == 20 and not found.notes


def test_folders_of_images_in_the_wrong_places_are_refused(tmp_path):
    classes(tmp_path / "two" / "train")
    classes(tmp_path / "two" / "val")
    classes(tmp_path / "two" / "dev")
    with pytest.raises(InputError, match="has dev and val, both the validation split"):
        load_images({"name": str(tmp_path / "two")})
    for split in ("train", "val"):
        image(tmp_path / "bare" / split, "1.png")
    with pytest.raises(InputError, match=r"bare/train holds no images. Expected .*/CLASS/IMAGE"):
        load_images({"name": str(tmp_path / "bare")})
    classes(tmp_path / "other" / "train")
    classes(tmp_path / "other" / "test")
    image(tmp_path / "other" / "test" / "cow", "1.png")
    with pytest.raises(InputError, match=r"has a class 'cow' that .*train lacks; its classes are cat, dog"):
        load_images({"name": str(tmp_path / "other")})
    classes(tmp_path / "bus" / "x")  # `train` is a class where it holds images
    (tmp_path / "bus" / "x" / "dog").rename(tmp_path / "bus" / "x" / "train")
    assert load_images({"name": str(tmp_path / "bus" / "x")}).classes == ["cat", "train"]


def test_triples_use_the_splits_of_their_files(tmp_path):
    for split, letter in (("train", "t"), ("dev", "v"), ("test", "e")):
        write_triples(
            tmp_path / f"triples.{split}.tsv", [Triple(2.0, 1.0, f"{letter} {i}", "good", "bad") for i in range(20)]
        )
    found = load_rankings({"name": str(tmp_path)})
    assert [{r["query"][0] for r in s.records} for s in (found.train, found.validation, found.test)] == [
        {"t"},
        {"v"},
        {"e"},
    ]
    assert len(found.train) == 20 and "split as their files are named" in found.notes[-1]
    write_triples(tmp_path / "triples.test.tsv", [Triple(2.0, 1.0, "t 3", "good", "bad")])
    with pytest.raises(InputError, match="the query 't 3' is in the test and the train split"):
        load_rankings({"name": str(tmp_path)})


def judgements(folder, files, **changes):
    folder.mkdir(exist_ok=True)
    tables = {
        "docs": {"doc_id": [str(i) for i in range(30)], "text": [f"word{i} thing" for i in range(30)]},
        "queries": {"query_id": [str(i) for i in range(30)], "text": [f"word{i}" for i in range(30)]},
    }
    for name, numbers in files.items():
        ids = [str(i) for i in numbers]
        tables[name] = {"query_id": ids, "doc_id": ids, "grade": [1.0] * len(ids)}
    for name, columns in tables.items():
        pq.write_table(pa.table(columns | changes.get(name, {})), folder / f"{name}.parquet")
    return {"name": str(folder)}


def test_judgements_use_the_splits_of_their_files(tmp_path):
    spec = judgements(tmp_path, {"train_qrels": range(20), "dev_qrels": range(20, 25), "test_qrels": range(25, 30)})
    found = load_rankings(spec)
    asked = [{int(r["query"][4:]) for r in s.records} for s in (found.train, found.validation, found.test)]
    assert asked == [set(range(20)), set(range(20, 25)), set(range(25, 30))]


@pytest.mark.parametrize(
    "changes,says",
    [
        ({"qrels": {"grade": [float("nan")] * 30}}, "qrels.parquet, row 0: grade is nan"),
        ({"qrels": {"grade": ["one"] * 30}}, "grade is 'one' and must be a number"),
        ({"qrels": {"query_id": [None, *map(str, range(1, 30))]}}, "qrels.parquet, row 0: query_id is None"),
        ({"qrels": {"doc_id": [float("nan")] * 30}}, "qrels.parquet, row 0: doc_id is nan"),
        ({"queries": {"query_id": [float("nan"), *map(float, range(29))]}}, "row 0: query_id is nan. Give every row"),
        (
            {
                "qrels": {
                    "doc_id": ["0", "0", *map(str, range(28))],
                    "query_id": ["0"] * 30,
                    "grade": [2.0, 1.0, *[0.0] * 28],
                }
            },
            "row 1: document '0' has the grade 1 for query '0', and 2 in an earlier row",
        ),
        ({"docs": {"doc_id": ["1"] * 30}}, "row 1: doc_id '1' is there twice"),
        ({"docs": {"text": [["a"]] * 30}}, "row 0: doc_id is 0 and text"),
        ({"queries": {"text": [""] * 30}}, "query '0' is empty"),
        ({"docs": {"text": ["…"] * 30}}, "No document holds a word"),
    ],
)
def test_bad_judgements_are_named(tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        load_rankings(judgements(tmp_path, {"qrels": range(30)}, **changes))


def test_judgements_of_queries_that_are_not_there_are_counted(tmp_path):
    spec = judgements(tmp_path, {"qrels": range(30)}, queries={"query_id": [str(i) for i in range(2, 32)]})
    assert "2 judgements of queries that are not there were skipped" in " ".join(load_rankings(spec).notes)


# Images


def test_photographs_are_turned_upright(tmp_path):
    white_above = np.zeros((8, 6, 3), np.uint8)
    white_above[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer shows the top at the right
    for end in ("png", "tif", "webp"):
        name = classes(
            tmp_path / end, white_above, name="{}." + end, exif=exif, **({"lossless": True} if end == "webp" else {})
        )
        found = load_images({"name": name})
        assert found.shape == (3, 6, 8) and (found.train.pixels[..., 4:] == 255).all()
        assert not found.train.pixels[..., :4].any() and "24 photographs were turned upright" in found.notes[0]


@pytest.mark.parametrize("end", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, end):
    ramp = (np.arange(8, dtype=np.uint16) * 8192)[None].repeat(8, 0)
    found = load_images({"name": classes(tmp_path, ramp, name="{}." + end)})
    assert found.train.pixels[0, 0, 0].tolist() == [0, 32, 64, 96, 128, 160, 192, 224]
    assert "24 images of 16 bits were scaled to 8" in found.notes[0]
    with pytest.raises(InputError, match="holds fractions"):
        load_images({"name": classes(tmp_path / "f", np.zeros((8, 8), np.float32), name="{}.tif")})


def test_transparent_pixels_are_laid_on_white(tmp_path):
    hidden_red = np.zeros((8, 8, 4), np.uint8)
    hidden_red[..., 0], hidden_red[4:, :, 3] = 255, 255
    red, gray = [255, 0, 0], np.zeros((8, 8, 2), np.uint8)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    classes(tmp_path / "rgba", hidden_red)
    classes(tmp_path / "la", gray, mode="LA")
    classes(tmp_path / "p")
    for file in (tmp_path / "p").glob("*/*.png"):
        palette.save(file, transparency=1)
    rgba, la, p = (load_images({"name": str(tmp_path / n)}) for n in ("rgba", "la", "p"))
    assert rgba.train.pixels[0, :, 0, 0].tolist() == [255] * 3 and rgba.train.pixels[0, :, 7, 0].tolist() == red
    assert la.shape == (1, 8, 8) and (la.train.pixels == 255).all() and (p.train.pixels == 255).all()
    assert all("24 images have transparent pixels, which were laid on white" in x.notes[0] for x in (rgba, la, p))


def test_hidden_folders_are_no_classes_and_every_format_is_read(tmp_path):
    for place in (".ipynb_checkpoints", "__MACOSX"):
        image(tmp_path / place, "1.png")
    for number, end in enumerate(
        ("png", "tif", "gif", "jpg", "webp", "bmp", "ppm", "tga", "jp2", "JPEG", "png", "ico")
    ):
        image(tmp_path / "cat", f"{number}.{end}")
    for number in range(12):
        image(tmp_path / "dog", f"{number}.gif")
    (tmp_path / "dog" / "notes.txt").write_text("mine")
    (tmp_path / "dog" / "._1.gif").write_text("a tool's")
    (tmp_path / "readme.md").write_text("mine")
    found = load_images({"name": str(tmp_path), "size": 8})
    assert found.classes == ["cat", "dog"] and sum(map(len, (found.train, found.validation, found.test))) == 24
    assert any("1 entries of the classes' folders are no images" in n for n in found.notes)
    assert any("1 files beside the classes' folders" in n for n in found.notes)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no images: give the class some"):
        load_images({"name": str(tmp_path), "size": 8})


def test_gray_and_colour_and_sizes_are_mixed_only_as_asked(tmp_path):
    classes(tmp_path)
    image(tmp_path / "cat", "gray.png", np.full((8, 8), 7, np.uint8))
    found = load_images({"name": str(tmp_path)})
    assert found.shape == (3, 8, 8) and "1 gray images beside coloured ones" in found.notes[0]
    image(tmp_path / "dog", "wide.png", np.full((16, 32, 3), 9, np.uint8))
    with pytest.raises(InputError, match=r"wide.png is 16 × 32 pixels .* is 8 × 8: set data.size, say data.size=8"):
        load_images({"name": str(tmp_path)})
    found = load_images({"name": str(tmp_path), "size": 8})
    assert found.shape == (3, 8, 8) and any("1 images were resized to 8 × 8" in n for n in found.notes)
    every = torch.cat([p.pixels for p in (found.train, found.validation, found.test)]).flatten(1)
    assert [int((every == value).all(1).sum()) for value in (7, 9)] == [1, 1]
    assert load_images({"name": str(tmp_path), "size": [4, 6]}).shape == (3, 4, 6)
    assert load_images({"name": "digits", "size": 16}).shape == (1, 16, 16)
    for size in (0, "8", [8], 2**40, [8, 8.0], True):
        with pytest.raises(InputError, match=r"data.size is"):
            load_images({"name": str(tmp_path), "size": size})
    gray = np.full((8, 8), 7, np.uint8)
    split = classes(tmp_path / "splits" / "train", gray), classes(tmp_path / "splits" / "test")
    assert load_images({"name": str(tmp_path / "splits")}).shape == (3, 8, 8) and len(split) == 2
    classes(tmp_path / "splits" / "val", np.zeros((4, 4), np.uint8))
    with pytest.raises(InputError, match=r"the validation split has images of .*\(3, 4, 4\) and the train split"):
        load_images({"name": str(tmp_path / "splits")})


@pytest.mark.parametrize(
    "shape,is_read_as",
    [
        ((40, 8, 8, 3), (3, 8, 8)),
        ((40, 3, 8, 8), (3, 8, 8)),
        ((40, 28, 28, 1), (1, 28, 28)),
        ((40, 6, 9, 4), (4, 6, 9)),
        ((40, 10, 8, 8), (10, 8, 8)),
        ((40, 1, 4, 4), (1, 4, 4)),
        ((40, 1, 1, 20), (1, 1, 20)),
        ((40, 8, 9), (1, 8, 9)),
        ((40, 20), (1, 1, 20)),
    ],
)
def test_the_layout_of_arrays_is_recognised(tmp_path, shape, is_read_as):
    values = RNG.integers(0, 255, shape, dtype=np.uint8)
    spec = archive(tmp_path / "x.npz", values, place=np.arange(40).astype(str))
    found = load_images(spec)
    assert found.shape == is_read_as
    number, parts = (
        int(found.train.ids[0]),
        values.transpose(0, 3, 1, 2) if is_read_as[1:] == shape[1:3] and len(shape) == 4 else values,
    )
    assert found.train.pixels[0].tolist() == parts[number].reshape(is_read_as).tolist()


def test_a_layout_that_nothing_tells_is_asked_for(tmp_path):
    values = RNG.integers(0, 255, (40, 3, 5, 3), dtype=np.uint8)
    spec = archive(tmp_path / "x.npz", values)
    with pytest.raises(InputError, match=r"set data.input_data_format to channels_first or channels_last"):
        load_images(spec)
    for said, shape in (("channels_first", (3, 5, 3)), ("channels_last", (3, 3, 5))):
        assert load_images({**spec, "input_data_format": said}).shape == shape
    with pytest.raises(InputError, match=r"data.input_data_format is 'last'"):
        load_images({**spec, "input_data_format": "last"})


def test_whole_numbers_of_other_types_are_the_same_pixels(tmp_path):
    values = RNG.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    plain = load_images(archive(tmp_path / "a.npz", values)).train.pixels
    for name, other in (
        ("b", values.astype(np.int64)),
        ("c", values.astype(">u2") * 256),
        ("d", values.astype("i4") * 257),
    ):
        found = load_images(archive(tmp_path / f"{name}.npz", other))
        assert (
            found.train.pixels.dtype == torch.uint8
            and torch.equal(found.train.pixels, plain)
            and "40 images" in found.notes[0]
        )
    ones = load_images(archive(tmp_path / "e.npz", values > 127)).train.pixels
    assert set(ones.flatten().tolist()) == {0, 255}


def huge_header(path):
    """An archive whose array says that it has a trillion numbers."""
    head = str({"descr": "<f8", "fortran_order": False, "shape": (10**12,)}).encode()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
        file.writestr("labels.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
    return {"name": str(path)}


def bomb(path):
    """A PNG of a few bytes that says it has ten billion pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    path.parent.mkdir(parents=True)
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )
    return {"name": str(path.parent.parent)}


PIXELS = np.zeros((40, 3, 8, 8), np.uint8)
BAD_IMAGES = {
    "fewer labels than images": (
        lambda t: archive(t / "x.npz", PIXELS, np.zeros(39, int)),
        "has 40 images and 39 labels",
    ),
    "more labels than images": (
        lambda t: archive(t / "x.npz", PIXELS, np.zeros(41, int)),
        "has 40 images and 41 labels",
    ),
    "labels in two dimensions": (lambda t: archive(t / "x.npz", PIXELS, np.eye(40)), r"labels are float64 \(40, 40\)"),
    "complex numbers": (lambda t: archive(t / "x.npz", PIXELS.astype(complex)), "images is complex128"),
    "five dimensions": (lambda t: archive(t / "x.npz", PIXELS[..., None]), r"images is uint8 \(40, 3, 8, 8, 1\)"),
    "objects": (lambda t: archive(t / "x.npz", PIXELS.astype(object)), "images holds Python objects"),
    "text": (lambda t: archive(t / "x.npz", PIXELS.astype(str)), "images is <U3"),
    "no images": (lambda t: archive(t / "x.npz", PIXELS[:0]), r"images is empty: uint8 \(0, 3, 8, 8\)"),
    "no columns": (
        lambda t: np.savez(t / "x.npz") or {"name": str(t / "x.npz")},
        "has columns none; expected image, label",
    ),
    "values that are not finite": (
        lambda t: archive(t / "x.npz", np.where(np.arange(40)[:, None, None, None] == 7, np.nan, PIXELS)),
        "image 7 that are not finite",
    ),
    "values beyond single precision": (
        lambda t: archive(t / "x.npz", np.where(np.arange(40)[:, None, None, None] == 7, 1e300, PIXELS)),
        "image 7 that are not finite",
    ),
    "negative values": (lambda t: archive(t / "x.npz", PIXELS.astype(int) - 1), "int64 from -1 to -1"),
    "a label of 2^62": (
        lambda t: archive(t / "x.npz", PIXELS, np.arange(40) + 2**62),
        "the label of image 39 is 46116860",
    ),
    "an enormous header": (lambda t: huge_header(t / "x.npz"), "(images|labels) is float64 .* GiB of memory"),
    "a file that is cut off": (
        lambda t: (t / "x.npz").write_bytes(b"PK\x03\x04 and no more") and {"name": str(t / "x.npz")},
        "is not a readable .npz file",
    ),
    "a picture of ten billion pixels": (
        lambda t: bomb(t / "set" / "[b]cat" / "[i]1.png"),
        r"\[b\]cat/\[i\]1.png says that it has more",
    ),
    "classes that are no list": (
        lambda t: archive(t / "train.npz", PIXELS) and (t / "classes.json").write_text("{") and {"name": str(t)},
        "classes.json cannot be read",
    ),
    "a seed that is none": (lambda t: {"name": "clusters", "seed": "x"}, "data.seed is 'x'"),
    "a user that does not exist": (lambda t: {"name": "~nobody_of_this_name/x"}, "there is no user of this name"),
    "a name with NUL": (lambda t: {"name": "a\0b"}, "nor a path"),
    "a name that is too long": (lambda t: {"name": "x" * 5000}, "is not a path that can be read"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_one_line(case, tmp_path):
    make, says = BAD_IMAGES[case]
    with pytest.raises(InputError, match=says) as refused:
        load_images(make(tmp_path))
    assert "\n" not in str(refused.value)


def test_images_of_a_table_may_be_files_beside_it(tmp_path):
    for i in range(20):
        image(tmp_path / "files", f"{i}.png", np.full((8, 8, 3), i, np.uint8))
    cells = [{"bytes": None, "path": f"files/{i}.png"} for i in range(20)]
    pq.write_table(pa.table({"image": cells, "label": [i % 2 for i in range(20)]}), tmp_path / "x.parquet")
    found = load_images({"name": str(tmp_path / "x.parquet")})
    assert [int(p[0, 0, 0]) for p in found.train.pixels] == found.train.ids.tolist()


@pytest.mark.parametrize("kind", ["memory", "parquet"])
def test_splits_that_number_their_classes_otherwise_are_matched_by_name(tmp_path, kind):
    colours = {"apple": 10, "bear": 20, "cat": 30}

    def split(names, number=12):
        cells = [Image.new("L", (4, 4), colours[names[i % len(names)]]) for i in range(number)]
        features = Features({"image": Picture(), "label": ClassLabel(names=names), "of": ClassLabel(names=names)})
        numbers = [i % len(names) for i in range(number)]
        return Dataset.from_dict({"image": cells, "label": numbers, "of": numbers}, features=features)

    def read(**names):
        splits = DatasetDict({s: split(n) for s, n in names.items()})
        if kind == "memory":
            return load_images({"name": keep(splits), "domain_column": "of"})
        for name, rows in splits.items():
            rows.to_parquet(tmp_path / f"{name}.parquet")
        return load_images({"name": str(tmp_path), "domain_column": "of"})

    found = read(train=["cat", "apple", "bear"], val=["apple", "bear", "cat"], test=["bear", "cat"])
    assert found.classes == ["cat", "apple", "bear"]
    for part in (found.train, found.validation, found.test):
        named = [found.classes[i] for i in part.labels]
        assert [colours[n] for n in named] == part.pixels[:, 0, 0, 0].tolist() and named == part.domains.tolist()
    with pytest.raises(InputError, match="the class 'cat' of bear, cat, and the classes of train are apple, bear"):
        read(train=["apple", "bear"], val=["apple", "bear"], test=["bear", "cat"])


# Graphs

NODES = {"x": np.eye(9, 4, dtype=np.float32), "y": np.arange(9) % 2}
EDGES = np.array([[i, i + 1] for i in range(7)])
PARTS = {"train": np.arange(2), "val": np.arange(2, 4), "test": np.arange(4, 9)}
SPLIT = {f"{s}_idx": nodes for s, nodes in PARTS.items()}


def graph(path, **columns):
    np.savez(path, **NODES | {"edges": EDGES} | SPLIT | columns)
    return {"name": str(path)}


def same(a, b):
    keys = ("nodes", "labels", "edges", "chosen")
    return all(
        torch.equal(getattr(a, s)[0][k], getattr(b, s)[0][k]) for s in ("train", "validation", "test") for k in keys
    )


def test_graphs_are_read_as_torch_geometric_has_them(tmp_path):
    plain = load_graph(graph(tmp_path / "plain.npz"))
    np.savez(tmp_path / "index.npz", **NODES, edge_index=EDGES.T, **SPLIT)
    assert same(plain, load_graph({"name": str(tmp_path / "index.npz")}))
    masks = {f"{s}_mask": torch.isin(torch.arange(9), torch.from_numpy(n)) for s, n in PARTS.items()}
    tensors = (
        {k: torch.from_numpy(v) for k, v in NODES.items()} | {"edge_index": torch.from_numpy(EDGES.T.copy())} | masks
    )
    saved = {
        "dict": tensors,
        "pair": (tensors, None),
        "folds": tensors | {k: torch.stack([~v, v], 1) for k, v in masks.items()},
    }
    geometric = pytest.importorskip("torch_geometric.data")
    saved["data"] = geometric.Data(**tensors)
    for name, value in saved.items():
        torch.save(value, tmp_path / f"{name}.pt")
        assert same(plain, load_graph({"name": str(tmp_path / f"{name}.pt"), "fold": int(name == "folds")})), name
    (tmp_path / "one").mkdir()
    graph(tmp_path / "one" / "mine.npz")
    assert same(plain, load_graph({"name": str(tmp_path / "one")}))


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev"])
def test_the_splits_of_a_graph_have_their_usual_names(tmp_path, word):
    columns = {
        **NODES,
        "edges": EDGES,
        "train_idx": PARTS["train"],
        f"{word}_idx": PARTS["val"],
        "test_idx": PARTS["test"],
    }
    np.savez(tmp_path / "g.npz", **columns)
    found = load_graph({"name": str(tmp_path / "g.npz")})
    assert found.validation[0]["chosen"].nonzero()[:, 0].tolist() == [2, 3]
    np.savez(tmp_path / "g.npz", **columns, eval_mask=np.arange(9) == 3)
    with pytest.raises(InputError, match="both the validation split"):
        load_graph({"name": str(tmp_path / "g.npz")})


@pytest.mark.parametrize("turned", [False, True])
def test_one_mask_serves_all_folds(tmp_path, turned):
    train, val, test = (np.isin(np.arange(9), nodes) for nodes in PARTS.values())
    masks = {"train_mask": np.stack([train, val]), "val_mask": np.stack([val, train])}
    columns = {**dict.fromkeys(SPLIT), **{k: v.T if turned else v for k, v in masks.items()}, "test_mask": test}
    np.savez(tmp_path / "g.npz", **NODES, edges=EDGES, **{k: v for k, v in columns.items() if v is not None})
    for fold, (first, second) in enumerate([("train", "val"), ("val", "train")]):
        found = load_graph({"name": str(tmp_path / "g.npz"), "fold": fold})
        labelled = [(s[0]["labels"] >= 0).nonzero()[:, 0].tolist() for s in (found.train, found.validation, found.test)]
        assert labelled == [PARTS[s].tolist() for s in (first, second, "test")]
    with pytest.raises(InputError, match=r"data\.fold is 2, and folds are numbered from 0 to 1"):
        load_graph({"name": str(tmp_path / "g.npz"), "fold": 2})


def test_columns_that_no_graph_has_are_noted(tmp_path):
    edges, weights = torch.from_numpy(EDGES.T), torch.rand(7)
    parts = {k: torch.as_tensor(v) for k, v in {**NODES, **SPLIT}.items()}
    torch.save({**parts, "edge_index": edges, "edge_weight": weights}, tmp_path / "g.pt")
    assert "g.pt: not used: column edge_weight." in load_graph({"name": str(tmp_path / "g.pt")}).notes
    found = load_graph(graph(tmp_path / "g.npz", weight=np.ones(7), edge_attr=np.ones(7)))
    assert "g.npz: not used: columns edge_attr, weight." in found.notes


class Trap:
    """A pickle that makes a folder, if anybody lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


def planetoid(folder, protocol=4, **changes):
    """The files of the original release, made small."""
    from scipy.sparse import csr_matrix

    raw = folder / "Cora" / "raw"
    raw.mkdir(parents=True)
    x, y = np.random.default_rng(0).random((1100, 5)), np.eye(2)[np.arange(1100) % 2]
    links = {i: [(i + 1) % 1100, (i - 1) % 1100] for i in range(1100)}
    parts = {"x": csr_matrix(x[:10]), "allx": csr_matrix(x[:600]), "tx": csr_matrix(x[600:]), "graph": links}
    parts |= {"y": y[:10], "ally": y[:600], "ty": y[600:]}
    for name, value in (parts | changes).items():
        (raw / f"ind.cora.{name}").write_bytes(pickle.dumps(value, protocol=protocol))
    order = np.random.default_rng(1).permutation(np.arange(600, 1100))
    (raw / "ind.cora.test.index").write_text("".join(f"{i}\n" for i in order))
    return {"name": "planetoid:Cora", "root": str(folder), "normalize": False}, x, order


@pytest.mark.parametrize("protocol", range(6))
def test_planetoid_is_read_without_unpickling(tmp_path, protocol):
    spec, x, order = planetoid(tmp_path, protocol)
    found = load_graph(spec)
    nodes = found.train[0]["nodes"].numpy()
    assert (
        np.allclose(nodes[:600], x[:600])
        and np.allclose(nodes[order], x[600:])
        and found.train[0]["edges"].shape[1] == 2200
    )
    assert found.test[0]["labels"][order[1]] == 1 and found.test[0]["labels"][order[0]] == 0


@pytest.mark.parametrize("part", ["x", "graph", "ty"])
def test_no_code_in_a_graphs_file_runs(tmp_path, part):
    spec, *_ = planetoid(tmp_path, **{part: Trap(tmp_path / "trap")})
    with pytest.raises(InputError, match="planetoid:Cora cannot be read"):
        load_graph(spec)
    torch.save(NODES | {"edges": Trap(tmp_path / "trap")}, tmp_path / "g.pt")
    with pytest.raises(InputError, match="pickles are not run"):
        load_graph({"name": str(tmp_path / "g.pt")})
    assert not (tmp_path / "trap").exists()


SPARSE = {
    "x_data": np.ones(2, "f4"),
    "x_indices": np.array([0, 3]),
    "x_indptr": np.array([0, 1, *[2] * 8]),
    "x_shape": np.array([9, 4]),
}
BAD_GRAPHS = {
    "no nodes": ({"x": np.zeros((0, 4)), "y": np.zeros(0, int)}, r"features are \(0, 4\) and there are 0 labels"),
    "a label of 2^40": ({"y": np.arange(9) * 2**40}, "the label of node 8 is 8796093022208"),
    "an unsigned label beyond all": (
        {"y": np.full(9, 2**64 - 1, np.uint64)},
        "the label of node 0 is 18446744073709551615",
    ),
    "complex features": ({"x": NODES["x"].astype(complex)}, "features are complex"),
    "features of five dimensions": ({"x": NODES["x"][..., None, None, None]}, r"features are \(9, 4, 1, 1, 1\)"),
    "features of objects": ({"x": NODES["x"].astype(object)}, "x holds Python objects"),
    "two edge lists that differ": ({"edges": EDGES.T}, r"edges are \(2, 7\)"),
    "sparse features whose columns lie outside": (
        {**SPARSE, "x": None, "x_indices": np.array([0, 10**6])},
        "make no matrix",
    ),
    "sparse features without end": ({**SPARSE, "x": None, "x_shape": np.array([9, 2**40])}, "GiB of memory"),
}


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_bad_graphs_are_one_line(case, tmp_path):
    changes, says = BAD_GRAPHS[case]
    columns = NODES | {"edges": EDGES} | SPLIT | changes
    np.savez(tmp_path / "g.npz", **{k: v for k, v in columns.items() if v is not None})
    with pytest.raises(InputError, match=says) as refused:
        load_graph({"name": str(tmp_path / "g.npz")})
    assert "\n" not in str(refused.value)


def test_sparse_features_are_dense_ones(tmp_path):
    columns = {**SPARSE, "y": NODES["y"], "edges": EDGES, **SPLIT}
    np.savez(tmp_path / "g.npz", **columns)
    nodes = load_graph({"name": str(tmp_path / "g.npz")}).train[0]["nodes"]
    assert nodes.nonzero().tolist() == [[0, 0], [1, 3]]


def test_a_folder_of_several_graphs_is_refused(tmp_path):
    graph(tmp_path / "train.npz")
    graph(tmp_path / "test.npz")
    with pytest.raises(
        InputError, match=r"holds 2 graphs .*, and one is needed: name the file. A graph's splits are columns"
    ):
        load_graph({"name": str(tmp_path)})


# Triples

TRIPLES = [Triple(7.5, -1.25, f"query {i // 3}", f"good {i}", f"bad {i}") for i in range(60)]


@pytest.mark.parametrize("line", ["1.0\t2.0\tq\tp\tn\tmore", "1.0\t2.0\tq\ta\tb\tn", "q\tp\tn", "1.0\tq\tp\tn"])
def test_a_line_of_other_columns_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "t.tsv").write_text(f"1.0\t2.0\tq\tp\tn\n{line}\n")
    with pytest.raises(InputError, match=rf"t.tsv, line 2: {line.count(chr(9)) + 1} columns where 5 are expected"):
        read_triples(tmp_path / "t.tsv")


def test_texts_of_ids_may_not_be_cut_at_a_tab_or_be_there_twice(tmp_path):
    for text, says in (
        ("1\ta\n2\tb\tc\n", "line 2: 3 columns where 2"),
        ("1\ta\n1\tb\n", "line 2: the id '1' is there twice"),
    ):
        (tmp_path / "q.tsv").write_text(text)
        with pytest.raises(InputError, match=says):
            read_texts(tmp_path / "q.tsv")


def test_triples_are_read_from_json_lines(tmp_path):
    write_triples(tmp_path / "t.jsonl", [*TRIPLES, Triple(1.0, 2.0, "a\tb", "c\nd", "e")])
    assert read_triples(tmp_path / "t.jsonl") == [*TRIPLES, Triple(1.0, 2.0, "a\tb", "c\nd", "e")]
    lines(tmp_path / "texts.jsonl", [{"_id": i, "text": f"text {i}"} for i in range(4)])
    lines(tmp_path / "ids.jsonl", [{"query_id": 0, "pos_id": 1, "neg_id": 3, "pos_score": 2, "neg_score": 1}])
    sources = {"queries": tmp_path / "texts.jsonl", "collection": tmp_path / "texts.jsonl"}
    assert read_triples(tmp_path / "ids.jsonl", **sources) == [Triple(2.0, 1.0, "text 0", "text 1", "text 3")]
    good = {"query": "q", "positive": "p", "negative": "n", "pos_score": 1, "neg_score": 0}
    for bad, says in (
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is list, not an object"),
        (json.dumps(good | {"query": ["q"]}), "line 2: the query is list, not text"),
        (json.dumps(good | {"pos_score": "ab"}), "line 2: pos_score is 'ab'"),
        (json.dumps({k: v for k, v in good.items() if "score" not in k}), "line 2 has no column 'pos_score'"),
        ("[" * 100_000, "line 2 is not JSON"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps(good) + f"\n{bad}\n")
        with pytest.raises(InputError, match=says):
            read_triples(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("name", ["t.tsv", "t.parquet", "t.jsonl"])
def test_triples_without_scores_are_scored_by_the_teacher(tmp_path, name):
    rows = [{"query": t.query, "positive": t.positive, "negative": t.negative} for t in TRIPLES]
    if name == "t.tsv":
        (tmp_path / name).write_text(
            "query\tpositive\tnegative\n" + "".join("\t".join(r.values()) + "\n" for r in rows)
        )
    elif name == "t.jsonl":
        lines(tmp_path / name, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    found = load_rankings({"name": str(tmp_path / name)})
    assert len(found.train) == 48 and not found.recorded and not any("members" in r for r in found.test.records)
    assert "the triples have no scores" in found.notes[0]
    if name != "t.tsv":
        return
    run = {
        "task": "ranking",
        "method": "margin-mse",
        "data": {"name": str(tmp_path / name), "vocab_size": 300},
        "student": "embedding:8",
        "output": str(tmp_path / "run"),
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 8},
    }
    with pytest.raises(InputError, match=r"the data has no teacher scores. Set `teacher`"):
        distill({**run, "output": str(tmp_path / "without")})
    teacher = {"model": "embedding:4", "train": {"max_steps": 2}}
    written = tmp_path / "scored.jsonl"
    distill({**run, "teacher": teacher, "options": {"write_scores": str(written)}})
    scored = read_triples(written)
    assert {t.query for t in scored} == {r["query"] for r in found.train.records} and all(
        t.pos_score is not None for t in scored
    )


def test_other_values_of_rankings_are_refused(tmp_path):
    write_triples(tmp_path / "t.tsv", TRIPLES)
    (tmp_path / "bare.tsv").write_text("".join(f"{t.query}\t{t.positive}\t{t.negative}\n" for t in TRIPLES))
    name = str(tmp_path / "t.tsv")
    for spec, says in (
        ({"name": name, "members": "ab"}, "data.members is 'ab' and must be a list"),
        ({"name": name, "members": [str(tmp_path / "bare.tsv")]}, "has triples without scores"),
        ({"name": name, "seed": "x"}, "data.seed is 'x'"),
        ({"name": name, "limit": True}, "data.limit is True"),
        ({"name": "world", "foreign": 3}, "data.foreign is 3"),
        ({"name": str(tmp_path / "none")}, "nor a path"),
    ):
        with pytest.raises(InputError, match=says):
            load_rankings(spec)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"holds neither triples .* nor files that end in docs, queries, qrels"):
        load_rankings({"name": str(tmp_path / "none")})
