"""Malformed images, arrays, graphs and rankings: each either loads as what it says or is one line of `InputError`.

A case is a function of its number alone, so a failure is found again by its number.
"""

import io
import json
import pickle
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from understudy import InputError
from understudy.data import load_graph, load_images
from understudy.data.retrieval_sources import load_rankings
from understudy.data.scored_triples import Triple, write_triples

QUICK, MANY = 48, 300


def damaged(rng, data):
    """Bytes with some of them changed, cut off, doubled, or others put between."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, max(1, len(data))))
        kind = rng.integers(0, 5)
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at:at] = rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8).tobytes()
        elif kind == 2:
            data[at:at] = data[at : at + int(rng.integers(1, 64))]
        else:
            data[at : at + 1] = bytes([int(rng.integers(0, 256))])
    return bytes(data)


def maybe(rng, data):
    """Damaged one time in four."""
    return damaged(rng, data) if rng.random() < 0.25 else data


def picture(rng, at_least=1):
    """An image of any mode and size in any of the usual formats."""
    odd = "F" if rng.random() < 0.05 else "RGB"
    mode = str(rng.choice(["L", "RGB", "RGBA", "1", "P", "LA", "CMYK", "I;16", "I", odd]))
    size = tuple(int(n) for n in rng.integers(at_least, 10, 2))
    values = rng.integers(0, 256, (*size, 4), dtype=np.uint8)
    if mode in ("I;16", "F", "I"):
        kind = {"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]
        image = Image.fromarray((values[..., 0].astype(kind) * 257).astype(kind))
    else:
        image = Image.fromarray(values, "RGBA").convert(mode)
    for form in rng.permutation(["PNG", "GIF", "TIFF", "JPEG", "WEBP", "BMP", "ICO", "TGA", "JPEG2000"]):
        buffer = io.BytesIO()
        try:
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(0, 12))
            image.save(buffer, str(form), **({"exif": exif} if form in ("PNG", "TIFF", "JPEG", "WEBP") else {}))
        except (OSError, ValueError, KeyError, SystemError):  # a format that has no such mode
            continue
        return str(form), buffer.getvalue()
    return "PNG", b""


def image_folder(rng, folder):
    size = {"size": int(rng.integers(1, 12))} if rng.random() < 0.9 else {}
    splits = rng.choice(["val", "dev", "test", "test_night", "notes", ".cache"], 2, replace=False)
    for split in ["train", *splits] if rng.random() < 0.6 else [""]:
        for name in ("[b]cat", "dog[i]"):
            place = folder / "set" / split / name
            place.mkdir(parents=True)
            for i in range(6):
                form, data = picture(rng)
                data = damaged(rng, data) if rng.random() < 0.02 else data
                (place / f"{i}.{form.lower()}").write_bytes(data)
    return lambda: load_images({"name": str(folder / "set"), **size})


def image_parquet(rng, folder):
    number = int(rng.integers(0, 30))
    kinds = {
        "struct": lambda: [{"bytes": picture(rng)[1], "path": None} for _ in range(number)],
        "bytes": lambda: [picture(rng)[1] for _ in range(number)],
        "text": lambda: ["missing.png"] * number,
        "lists": lambda: [[1, 2, 3]] * number,
        "none": lambda: [None] * number,
    }
    labels = [
        list(range(number)),
        [0.0, 1.0] * number,
        ["1"] * number,
        ["cat"] * number,
        [None, 1] * number,
        [[0]] * number,
        [2**62] * number,
        [-(2**63)] * number,
        [True, False] * number,
    ]
    table = pa.table(
        {
            "image": kinds[str(rng.choice([*kinds, *["struct", "bytes"] * 4]))](),
            "label": labels[int(rng.choice([0, 1, 2, 8, 8, 8, *range(9)]))][:number],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    (folder / "x.parquet").write_bytes(maybe(rng, buffer.getvalue()))
    return lambda: load_images({"name": str(folder / "x.parquet"), "size": 4})


COMMON = ["u1", "u2", "i8", "f4", "?"]
DTYPES = ["u1", "u2", "i8", ">i4", "u8", "f2", ">f4", "f8", "g", "?", "c16", "U3", "S2", "M8[s]", "O", "V4"]


def array(rng, shape):
    kind = np.dtype(str(rng.choice(COMMON if rng.random() < 0.6 else DTYPES)))
    if kind.kind in "fc":
        values = rng.normal(size=shape).astype(kind)
        if rng.random() < 0.2 and values.size:
            values.flat[int(rng.integers(values.size))] = rng.choice([np.nan, np.inf])
        return values
    if kind.kind in "MV":
        return np.zeros(shape, kind)
    top = int(rng.choice([2, 2, 5, 256, 2**16, 2**31, 2**62]))
    if kind.kind in "iu":
        top = min(top, int(np.iinfo(kind).max))
    return rng.integers(0, max(2, top), shape).astype(kind)


def archive(path, values, rng):
    buffer = io.BytesIO()
    np.savez(buffer, **{k: v for k, v in values.items() if v is not None})
    path.write_bytes(damaged(rng, buffer.getvalue()) if rng.random() < 0.1 else buffer.getvalue())


def image_archive(rng, folder):
    shape = tuple(int(n) for n in rng.choice([1, 2, 3, 4, 8, 12], int(rng.choice([1, 2, 3, 3, 3, 4]))))
    shape = shape if rng.random() < 0.9 else (*shape[1:], 0)
    number = int(rng.choice([0, 1, 2, 3, 10, 40, 40, 40]))
    labels = (number + int(rng.choice([-1, 1, *[0] * 8])),) if rng.random() < 0.9 else (number, 1)
    values = {"images": array(rng, (number, *shape)), "labels": np.arange(max(0, labels[0])) % 2}
    if rng.random() < 0.2:
        values["labels"] = array(rng, tuple(max(0, n) for n in labels))
    archive(folder / "x.npz", values, rng)
    return lambda: load_images({"name": str(folder / "x.npz")})


def graph_archive(rng, folder):
    nodes = int(rng.choice([0, 1, *[9] * 8]))
    values = {
        "x": np.eye(nodes, 4, dtype=np.float32),
        "y": np.arange(nodes) % 2,
        "edges": np.array([[i, i + 1] for i in range(max(0, nodes - 2))]).reshape(-1, 2),
        "train_idx": np.array([0, 1]),
        "valid_idx": np.array([2, 3]),
        "test_idx": np.array([4, 5, 6, 7, 8]),
    }
    for column in rng.choice(list(values), int(rng.choice([0, 1, 1, 3])), replace=False):
        shape = tuple(int(n) for n in rng.choice([0, 1, 2, 4, 9], int(rng.integers(0, 4))))
        new = [array(rng, shape), None, values[column][::-1], values[column].T, values[column] * 2**40]
        values[column] = new[int(rng.integers(len(new)))]
    if rng.random() < 0.3:
        values |= {
            "x": None,
            "x_data": np.ones(4, "f4"),
            "x_indices": np.array([0, 1, 2, int(rng.choice([3, 3, 99, -1]))]),
        }
        values["x_indptr"] = np.minimum(np.arange(nodes + 1), 4)
        if rng.random() < 0.5:
            values["x_indptr"] = np.array(rng.choice([0, 1, 2, 4, 7], nodes + 1))
        values["x_shape"] = np.array([nodes, int(rng.choice([4, 4, 4, 2**40]))])
    if rng.random() < 0.3:
        values["edge_index"], values["edges"] = None if values["edges"] is None else values["edges"].T, None
    archive(folder / "g.npz", values, rng)
    return lambda: load_graph({"name": str(folder / "g.npz")})


class Trap:
    """A pickle that calls `os.mkdir`, if anybody lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


def graph_saved(rng, folder):
    y = torch.arange(9) % 2
    values = {"x": torch.eye(9, 4), "y": y, "edge_index": torch.stack([torch.arange(8), torch.arange(1, 9)])}
    values |= {f"{s}_mask": torch.arange(9) % 3 == i for i, s in enumerate(("train", "val", "test"))}
    changes = [
        torch.zeros(0),
        torch.eye(9).to_sparse(),
        y.to(torch.bfloat16),
        "text",
        [1, 2],
        None,
        Trap(folder / "trap"),
    ]
    changed = str(rng.choice([*values, "more"]))
    if rng.random() < 0.6:
        values[changed] = changes[int(rng.integers(len(changes)))]
    buffer = io.BytesIO()
    torch.save(values if rng.random() < 0.8 else (values, None), buffer)
    (folder / "g.pt").write_bytes(maybe(rng, buffer.getvalue()))
    return lambda: load_graph({"name": str(folder / "g.pt")})


def planetoid(rng, folder):
    from scipy.sparse import csr_matrix

    raw = folder / "Cora" / "raw"
    raw.mkdir(parents=True)
    x, y = rng.random((1100, 3)), np.eye(2)[np.arange(1100) % 2]
    links = {i: [(i + 1) % 1100] for i in range(1100)}
    parts = {"x": csr_matrix(x[:10]), "allx": csr_matrix(x[:600]), "tx": csr_matrix(x[600:]), "graph": links}
    parts |= {"y": y[:10], "ally": y[:600], "ty": y[600:]}
    wrong = str(rng.choice([*parts, "test.index", "nothing", "nothing"]))
    if rng.random() < 0.4 and wrong in parts:
        parts[wrong] = [Trap(folder / "trap"), parts[wrong] if wrong == "graph" else parts[wrong][:3], 7, None][
            int(rng.integers(4))
        ]
    for name, value in parts.items():
        data = pickle.dumps(value, protocol=int(rng.integers(0, 6)))
        (raw / f"ind.cora.{name}").write_bytes(damaged(rng, data) if name == wrong else data)
    numbers = "".join(f"{i}\n" for i in range(600, 1100)).encode()
    (raw / "ind.cora.test.index").write_bytes(damaged(rng, numbers) if wrong == "test.index" else numbers)
    return lambda: load_graph({"name": "planetoid:Cora", "root": str(folder)})


TRIPLES = [Triple(7.5, -1.25, f"query {i // 3}", f"good {i}", f"bad {i}") for i in range(60)]
ODD = [
    None,
    "",
    "a\tb",
    "x\u2028y",
    1e400,
    float("nan"),
    2**70,
    True,
    [1],
    {"a": 1},
    -1,
    "0x1",
    "1_000",
    "\ud800",
    10**400,
]


def triples(rng, folder):
    name = str(rng.choice(["t.tsv", "t.jsonl", "t.parquet"]))
    write_triples(folder / name, TRIPLES if rng.random() < 0.7 else TRIPLES[: int(rng.integers(0, 12))])
    path = folder / name
    if name == "t.jsonl" and rng.random() < 0.7:
        rows = [json.loads(line) for line in path.read_text().splitlines()] or [{}]
        row, key = rows[int(rng.integers(len(rows)))], str(rng.choice(["pos_score", "query", "negative", "more"]))
        row[key] = ODD[int(rng.integers(len(ODD)))]
        if rng.random() < 0.3:
            del row[key]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif name == "t.parquet" and rng.random() < 0.7:
        table = pq.read_table(path)
        column = str(rng.choice(table.column_names))
        new = [pa.array([v] * len(table)) for v in (None, 1.5, "1", [1], b"\xff", {"a": 1}, float("nan"), 7)]
        pq.write_table(
            table.set_column(table.column_names.index(column), column, new[int(rng.integers(len(new)))]), path
        )
    else:
        path.write_bytes(maybe(rng, path.read_bytes()))
    return lambda: load_rankings({"name": str(path)})


def judgements(rng, folder):
    tables = {
        "docs": {"doc_id": [str(i) for i in range(30)], "text": [f"word{i} thing" for i in range(30)]},
        "queries": {"query_id": [str(i) for i in range(15)], "text": [f"word{i}" for i in range(15)]},
        "qrels": {"query_id": [str(i) for i in range(15)], "doc_id": [str(i) for i in range(15)], "grade": [1] * 15},
    }
    kind = str(rng.choice(list(tables)))
    column = str(rng.choice(list(tables[kind])))
    odd = [None, "", "?", 1.5, float("nan"), -(2**60), b"\xff\xfe", [1], True, "1"]
    if rng.random() < 0.7:
        tables[kind][column] = [odd[int(rng.integers(len(odd)))]] * len(tables[kind][column])
    if rng.random() < 0.1:
        del tables[kind][column]
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    path = folder / f"{kind}.parquet"
    path.write_bytes(maybe(rng, path.read_bytes()))
    return lambda: load_rankings({"name": str(folder)})


KINDS = (image_folder, image_parquet, image_archive, graph_archive, graph_saved, planetoid, triples, judgements)


def sound(found):
    """What loaded is what every later room relies on."""
    if hasattr(found, "teacher_train"):
        for part in (found.train, found.validation, found.test):
            assert (
                part.pixels.dim() == 4 and part.pixels.numel() and len(part.pixels) == len(part.labels) == len(part.ids)
            )
            assert part.pixels.shape[1:] == found.shape and torch.isfinite(part.pixels.float()).all()
            assert part.labels.min() >= 0 and part.labels.max() < len(found.classes)
    elif hasattr(found, "features"):
        for part in (found.train, found.validation, found.test):
            values = part[0]
            nodes = len(values["nodes"])
            assert values["nodes"].shape == (nodes, found.features) and torch.isfinite(values["nodes"]).all()
            assert values["edges"].shape[0] == 2 and (values["edges"] < nodes).all() and (values["edges"] >= 0).all()
            assert len(values["labels"]) == nodes and values["labels"].max() < found.classes
    else:
        for part in (found.train, found.validation, found.test):
            for row in part.records:
                assert row["query"].strip() and all(isinstance(d, str) for d in row["documents"])
                assert len(row["labels"]) == len(row["documents"])
                assert all(len(m) == len(row["documents"]) and np.isfinite(m).all() for m in row.get("members", []))


def loads_or_says_why(number, folder):
    rng = np.random.default_rng(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = KINDS[number % len(KINDS)](rng, folder)
        try:
            found = load()
        except InputError as error:
            assert str(error).strip() and "\n" not in str(error)
        else:
            sound(found)
    assert not (folder / "trap").exists()


@pytest.mark.parametrize("number", range(QUICK))
@pytest.mark.timeout(60)
def test_malformed_data_loads_or_is_one_line(number, tmp_path):
    loads_or_says_why(number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(QUICK, MANY))
@pytest.mark.timeout(60)
def test_more_malformed_data_loads_or_is_one_line(number, tmp_path):
    loads_or_says_why(number, tmp_path)
