"""Labelled texts and pairs of texts: the standard library's passages by subject, sets in `UNDERSTUDY_DATA`, files, folders,
sets of the Hub, lists in memory."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from understudy.data.batch import UNLABELLED
from understudy.data.columns import arrange, checked_text, names
from understudy.data.folders import find
from understudy.data.records import Record, place, read_records
from understudy.data.text import check_keys, read_source, split_off, whole
from understudy.errors import InputError, nearest

OPTIONS = {"name", "limit", "columns", "classes", "domain_column", "unlabelled", "for_teacher"}
PAIRS = (
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Names of the two columns of a pair, as the tokenizers and GLUE have them."""
TEXTS = ("text", "sentence")
FORMATS = (*({*pair, "label"} for pair in PAIRS), *({text, "label"} for text in TEXTS))
EMBEDDED = "subjects"
PASSAGE = 240
"""Characters of a passage of the standard library."""
SUBJECTS = {
    "concurrency": "asyncio/base_events asyncio/events multiprocessing/managers multiprocessing/pool queue sched "
    "subprocess threading",
    "files": "configparser csv gzip mailbox pathlib shelve shutil tarfile tempfile zipfile",
    "network": "ftplib http/client http/cookiejar http/server imaplib poplib ssl urllib/parse urllib/request",
    "numbers": "calendar datetime decimal fractions random statistics",
    "programs": "ast bdb cmd dis doctest inspect pdb pickletools trace traceback unittest/case",
}
"""Modules of the standard library by subject."""
SETS: Mapping[str, tuple[Mapping[str, str], tuple[str, ...]]] = {
    "sst2": (
        {"train": "sst2_train", "validation": "sst2_dev", "test": "sst2_test"},
        ("negative", "positive"),
    ),
    "sst5": (
        {"train": "sst5_train", "validation": "sst5_dev"},
        ("very negative", "negative", "neutral", "positive", "very positive"),
    ),
    "trec6": ({"train": "trec6_train", "test": "trec6_test"}, ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")),
    "subj": ({"train": "subj_all"}, ("subjective", "objective")),
    "custrev": ({"train": "custrev_all"}, ("negative", "positive")),
    "agnews": ({"train": "agnews_train", "test": "agnews_test"}, ("World", "Sports", "Business", "Sci/Tech")),
    "movie_reviews": ({"train": "movie_reviews_long"}, ("negative", "positive")),
    "rte": ({"train": "rte_pairs"}, ("not_entailment", "entailment")),
}
"""Sets in `UNDERSTUDY_DATA/text_classification`: the file of each split, and the names of the classes by number."""


@dataclass
class ClassifiedTexts:
    """Records `{"id", "text", "label"}` of each split, with `text_pair` and `domain` where the data have them.

    Args:
        everything: the training split before `limit`: what a teacher that is trained first may see.
        classes: names of the classes by number.
    """

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    everything: list[Record]
    classes: list[str]
    notes: list[str] = field(default_factory=list)
    hash: str = ""
    domains: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        """All training texts, for training a tokenizer."""
        return [r[side] for r in self.everything for side in ("text", "text_pair") if side in r]


def load_classified(spec: Mapping[str, Any], known: Sequence[str] | None = None) -> ClassifiedTexts:
    """Read labelled texts.

    Args:
        spec: `name` (`subjects`, one of `SETS`, a file, folder or Hub id), `limit` (training records of the student, drawn
            once), `columns` (names of columns, `{ours: theirs}`), `classes` (names of the classes, by number),
            `domain_column` (a column that names each record's domain), `unlabelled` (hide the student's training labels),
            `for_teacher` (train on everything).
        known: names of the classes by number as a model of the run has them.

    Labels are class names, or numbers from 0. Names are numbered as `classes` or `known` has them, else by alphabet.
    A further split without any label (−1 throughout, as published test splits have it) is left out.

    Raises:
        InputError: a record without text or label, a label that is no class, or fewer than two classes.
    """
    check_keys(spec, OPTIONS)
    name, column = str(spec["name"]), spec.get("domain_column")
    notes: list[str] = []
    splits, published = _read(name, spec, notes)
    mapped = spec.get("columns")
    label = mapped.get("label", "label") if isinstance(mapped, Mapping) else "label"
    for split in [s for s, rows in splits.items() if s != "train" and rows]:
        if any(str(r.get(label)) != "-1" for r in splits[split]):
            continue
        del splits[split]
        notes.append(f"{name}: the {split} split has no labels (-1) and is not used.")
    notes += arrange(name, splits, FORMATS, {column} if column is not None else set(), spec.get("columns"))
    for split, records in splits.items():
        for i, record in enumerate(records):
            _check(place(f"{name}, {split} record {i}", record), record, column)
    shapes = {"text_pair" in r for records in splits.values() for r in records}
    if len(shapes) > 1:
        raise InputError(f"{name} holds single texts and pairs. Keep them in two sets.")
    classes = _classes(name, splits, _named(spec), published or known, notes)
    numbers = {label: i for i, label in enumerate(classes)}
    by_number = not any(r["label"] in numbers for records in splits.values() for r in records)
    for records in splits.values():
        for record in records:
            record["label"] = int(record["label"]) if by_number else numbers[record["label"]]
    # Files are often sorted by class, or alternate: what is set aside, and what `limit` keeps, is a fixed draw.
    order = torch.randperm(len(splits.get("train", ())), generator=torch.Generator().manual_seed(0)).tolist()
    splits |= {"train": [splits["train"][i] for i in order]} if order else {}
    split_off(name, splits, notes)
    for number, record in enumerate(r for records in splits.values() for r in records):
        record["id"] = number
    everything = splits["train"]
    train = everything if spec.get("for_teacher") else _student(everything, spec, notes)
    said = [train, everything, splits["validation"], splits["test"], classes]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    domains = tuple(sorted({r["domain"] for rows in splits.values() for r in rows})) if column is not None else ()
    return ClassifiedTexts(train, splits["validation"], splits["test"], everything, classes, notes, digest, domains)


def _read(
    name: str, spec: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, list[Record]], tuple[str, ...] | None]:
    """The records of each split, and the published names of the classes of a set that is known."""
    if name == EMBEDDED:
        return {"train": subjects()}, None
    if name in SETS and find(name) is None:
        folder = find("text_classification")
        if folder is None:
            raise InputError(
                f"Data {name!r} lies in UNDERSTUDY_DATA, which is not set or has no folder text_classification. Set it, or "
                "name a file or a set of the Hub."
            )
        files, classes = SETS[name]
        return {split: read_records(folder / f"{stem}.parquet") for split, stem in files.items()}, classes
    return read_source(name, spec, (EMBEDDED, *SETS), notes), None


def subjects() -> list[Record]:
    """Passages of the standard library's sources; the class is the subject of the module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    records: list[Record] = []
    for subject, modules in SUBJECTS.items():
        for module in modules.split():
            file = root / f"{module}.py"
            text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
            pieces = (text[start : start + PASSAGE] for start in range(0, min(len(text), 60 * PASSAGE), PASSAGE))
            records += [{"text": piece, "label": subject} for piece in pieces if piece.strip()]
    return records


def _check(where: str, record: Record, column: str | None) -> None:
    """Give a record the columns `text`, `text_pair` and `label`, with its label as text."""
    pair = next((pair for pair in PAIRS if set(pair) <= record.keys()), None)
    sides = pair or tuple(text for text in TEXTS if text in record)
    texts = [(side, record.pop(side)) for side in sides]
    for side, text in texts:
        if not isinstance(text, str):
            raise InputError(f"{where}: {side} is {type(text).__name__}, not text.")
        checked_text(where, side, text)
    record |= dict(zip(("text", "text_pair"), (text for _, text in texts), strict=False))
    record["label"] = _label(where, record["label"])
    if column is not None:
        domain = record.pop(column, None)
        if domain is None or isinstance(domain, (list, dict)):
            raise InputError(
                f"{where} has no {column!r} to name its domain. Choose another column (teacher.route, data.domain_column), "
                "or fill it."
            )
        record["domain"] = checked_text(where, column, str(domain))


def _label(where: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value >= 0:
        return str(value)
    if isinstance(value, str) and value.strip():
        return checked_text(where, "label", value.strip())
    raise InputError(f"{where}: the label is {value!r}; give one class, a name or a number from 0.")


def _named(spec: Mapping[str, Any]) -> list[str] | None:
    """`data.classes`, if it is a list of different names."""
    found = spec.get("classes")
    if found is None:
        return None
    if not isinstance(found, list) or len({str(c) for c in found}) != len(found):
        raise InputError(f"data.classes is {found!r} and must be a list of different names, one for each class.")
    return [str(c) for c in found]


def _classes(
    name: str,
    splits: Mapping[str, Sequence[Record]],
    chosen: Sequence[str] | None,
    known: Sequence[str] | None,
    notes: list[str],
) -> list[str]:
    """The names of the classes, by number: `chosen` in the recipe, or `known` of the data or a model, where they fit."""
    seen = {r["label"] for records in splits.values() for r in records}
    known = chosen or known
    numeric = all(label.isdecimal() for label in seen)
    if known is not None and numeric and max(map(int, seen)) < len(known):
        return list(known)
    back = {label.casefold(): label for label in sorted(seen)}
    if known is not None and len(back) == len(seen) and back.keys() <= {k.casefold() for k in known}:
        return [back.get(k.casefold(), k) for k in known]
    if chosen is not None:
        other = max(seen, key=int) if numeric else sorted(seen - set(chosen))[0]
        raise InputError(
            f"{name}: label {other!r} is none of data.classes ({names(chosen)}).{nearest(other, chosen)} Name all classes, "
            "in the order of their numbers."
        )
    if known is not None and not numeric:
        other = sorted(seen - set(known))[0]
        notes.append(
            f"{name}: label {other!r} is none of the model's classes ({names(known)}): classes are numbered by alphabet. "
            "Choose their order with data.classes."
        )
    found = sorted(seen, key=int) if numeric else sorted(seen)
    if len(found) < 2:
        raise InputError(f"{name} has {len(found)} class ({names(found)}). Give records of at least two.")
    if numeric and found != [str(i) for i in range(len(found))]:
        notes.append(f"{name}: the labels {names(found)} are the names of classes that are numbered from 0.")
    return found


def _student(everything: list[Record], spec: Mapping[str, Any], notes: list[str]) -> list[Record]:
    """The student's training records: the first `limit`, with or without labels."""
    found = everything[: whole(spec, "limit", len(everything))]
    if spec.get("unlabelled"):
        notes.append("The student's training part is used without its labels.")
        found = [{**record, "label": UNLABELLED} for record in found]
    return found
