"""Labelled texts and pairs of texts: the standard library's passages by subject, sets in `UNDERSTUDY_DATA`, files, folders,
sets of the Hub, lists in memory."""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from understudy.data.batch import UNLABELLED
from understudy.data.class_labels import NamesOf, check_alike, check_taught, label_name
from understudy.data.columns import arrange, checked_text, names
from understudy.data.folders import find
from understudy.data.records import Record, absent, place, read_records
from understudy.data.text import check_keys, read_source, split_off, whole
from understudy.errors import InputError, nearest

OPTIONS = {"name", "limit", "columns", "classes", "domain_column", "unlabelled", "labelled", "for_teacher"}
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
        everything: the training split before `limit`, with its labels.
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

    def taught(self) -> list[Record]:
        """What a teacher that is trained first may see: all training records that have a label."""
        return [r for r in self.everything if r["label"] != UNLABELLED]

    def texts(self) -> list[str]:
        """All training texts, for training a tokenizer."""
        return [r[side] for r in self.everything for side in ("text", "text_pair") if side in r]


def load_classified(spec: Mapping[str, Any], known: Sequence[str] | None = None) -> ClassifiedTexts:
    """Read labelled texts.

    Args:
        spec: `name` (`subjects`, one of `SETS`, a file, folder or Hub id), `limit` (training records of the student, drawn
            once), `columns` (names of columns, `{ours: theirs}`), `classes` (names of the classes, by number),
            `domain_column` (a column that names each record's domain), `unlabelled` (hide the student's training labels),
            `labelled` (hide all but so many of each class), `for_teacher` (train on everything that has a label).
        known: names of the classes by number as a model of the run has them.

    Labels are class names, or numbers from 0. Names are numbered as `classes` or `known` has them, else by alphabet.
    A training record of label −1 has none. A further split without any label (−1 throughout, as published test splits have
    it) is left out.

    Raises:
        InputError: a record without text or label, a label that is no class, or fewer than two classes.
    """
    check_keys(spec, OPTIONS)
    name, column = str(spec["name"]), spec.get("domain_column")
    notes: list[str] = []
    label = label_name(spec)
    named: NamesOf = {c: {} for c in (label, column) if isinstance(c, str)}
    splits, published = _read(name, spec, notes, named)
    for split in [s for s, rows in splits.items() if s != "train" and rows]:
        if any(str(r.get(label)) != "-1" for r in splits[split]):
            continue
        del splits[split]
        notes.append(f"{name}: the {split} split has no labels (-1) and is not used.")
    notes += arrange(name, splits, FORMATS, {column} if column is not None else set(), spec.get("columns"))
    if not any(named[label].values()) and spec.get("classes") is None:
        check_alike(name, (r["label"] for records in splits.values() for r in records))
    for split, records in splits.items():
        for i, record in enumerate(records):
            _check(place(f"{name}, {split} record {i}", record), record, column, split == "train")
    shapes = {"text_pair" in r for records in splits.values() for r in records}
    if len(shapes) > 1:
        raise InputError(f"{name} holds single texts and pairs. Keep them in two sets.")
    own = dict.fromkeys(n.strip() for split in ("train", *named[label]) for n in named[label].get(split, ()))
    classes, numbers = _classes(name, splits, _named(spec), published or known, list(own), notes)
    if not (published or known or own or spec.get("classes")):  # nothing but the records says which classes there are
        seen = {split: [r["label"] for r in rows if r["label"] != UNLABELLED] for split, rows in splits.items()}
        check_taught(name, seen, ", or name every class in data.classes")
    for record in (r for records in splits.values() for r in records if r["label"] != UNLABELLED):
        record["label"] = numbers[record["label"]]
    # Files are often sorted by class, or alternate: what is set aside, and what `limit` keeps, is a fixed draw.
    order = torch.randperm(len(splits.get("train", ())), generator=torch.Generator().manual_seed(0)).tolist()
    splits |= {"train": [splits["train"][i] for i in order]} if order else {}
    _split_off(name, splits, notes)
    for number, record in enumerate(r for records in splits.values() for r in records):
        record["id"] = number
    everything = splits["train"]
    found = ClassifiedTexts([], splits["validation"], splits["test"], everything, classes, notes)
    found.train = train = found.taught() if spec.get("for_teacher") else _student(everything, spec, notes)
    said = [train, everything, splits["validation"], splits["test"], classes]
    found.hash = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    found.domains = tuple(sorted({r["domain"] for rows in splits.values() for r in rows})) if column is not None else ()
    return found


def _split_off(name: str, splits: dict[str, list[Record]], notes: list[str]) -> None:
    """Set aside records for the splits that are missing, of those that have a label if any does."""
    drawn = splits.get("train", [])
    labelled = [r for r in drawn if r["label"] != UNLABELLED]
    if labelled:
        splits["train"] = labelled
    split_off(name, splits, notes)
    if len(labelled) < len(drawn):
        aside = {id(r) for split, records in splits.items() if split != "train" for r in records}
        splits["train"] = [r for r in drawn if id(r) not in aside]
        number = sum(r["label"] == UNLABELLED for r in splits["train"])
        notes.append(f"{name}: {number} of {len(splits['train'])} training records have no label (-1).")


def _read(
    name: str, spec: Mapping[str, Any], notes: list[str], named: NamesOf
) -> tuple[dict[str, list[Record]], tuple[str, ...] | None]:
    """The records of each split, and the published names of the classes of a set that is known.

    Args:
        named: see `read_source`.
    """
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
    return read_source(name, spec, (EMBEDDED, *SETS), notes, named), None


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


def _check(where: str, record: Record, column: str | None, train: bool) -> None:
    """Give a record the columns `text`, `text_pair` and `label`, with its label as text; −1 stays where it may, in `train`."""
    pair = next((pair for pair in PAIRS if set(pair) <= record.keys()), None)
    sides = pair or tuple(text for text in TEXTS if text in record)
    texts = [(side, record.pop(side)) for side in sides]
    for side, text in texts:
        if not isinstance(text, str):
            raise InputError(f"{where}: {side} is {type(text).__name__}, not text.")
        checked_text(where, side, text)
    record |= dict(zip(("text", "text_pair"), (text for _, text in texts), strict=False))
    none = train and type(record["label"]) is int and record["label"] == UNLABELLED
    record["label"] = UNLABELLED if none else _label(where, record["label"])
    if column is not None:
        domain = record.pop(column, None)
        if absent(domain) or isinstance(domain, (list, dict)):
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
    own: Sequence[str],
    notes: list[str],
) -> tuple[list[str], dict[str, int]]:
    """The names of the classes by number, and the number of each label: `chosen` in the recipe, or `known` of the data or a
    model, where they fit; else the data's `own`, if numbers were replaced by these."""
    seen = {r["label"] for records in splits.values() for r in records if r["label"] != UNLABELLED}
    if not seen:
        raise InputError(f"{name}: every record has the label {UNLABELLED}, which is none. Label some.")
    if own and list(own) != [str(i) for i in range(len(own))]:
        return _by_own_names(name, seen, chosen, known, own, notes)
    wanted = chosen or known
    numeric = all(label.isdecimal() for label in seen)
    read = _as_wanted(name, seen, wanted, chosen is None, notes) if wanted else None
    if read is not None:
        return read
    if chosen is not None:
        other = max(seen, key=int) if numeric else sorted(seen - set(chosen))[0]
        raise _foreign(name, other, chosen)
    if known is not None and not numeric:
        notes.append(f"{_other(name, seen, known)}: classes are numbered by alphabet. {_ORDER}")
    found = sorted(seen, key=int) if numeric else sorted(seen)
    if len(found) < 2:
        raise InputError(f"{name} has {len(found)} class ({names(found)}). Give records of at least two.")
    if numeric and found != [str(i) for i in range(len(found))]:
        notes.append(f"{name}: the labels {names(found)} are the names of classes that are numbered from 0.")
    return found, {label: i for i, label in enumerate(found)}


def _as_wanted(
    name: str, seen: set[str], wanted: Sequence[str], ask: bool, notes: list[str]
) -> tuple[list[str], dict[str, int]] | None:
    """The classes `wanted` and the number of each label; `None` where a label is neither a name nor a number of these.

    Names that are numbers, or begin with one ("1 star"), may be what numbers in the data mean: whether 0 occurs, or the
    last class, must not decide that silently.

    Args:
        ask: whether labels that can be read in both ways are refused; else they are names where all are, else numbers.

    Raises:
        InputError: the labels can be read in both ways.
    """
    named = _same_names(seen, wanted)
    numeric = all(label.isdecimal() for label in seen)
    if not numeric:
        return named
    starts = [(_NUMBER.match(w) or [w])[0] for w in wanted]
    begun = {s: i for i, s in enumerate(starts)} if len(set(starts)) == len(starts) else {}
    if named is None and seen <= begun.keys():
        named = list(wanted), {label: begun[label] for label in seen}
    counted = {label: int(label) for label in seen}
    if max(counted.values()) >= len(wanted):
        found, how = named, "names"
    elif named is None or all(named[1][label] == number for label, number in counted.items()):
        found, how = (list(wanted), counted), "numbers, from 0,"
    elif ask:
        raise InputError(
            f"{name}: the labels {_in_order(seen)} can be numbers, from 0, or names of the model's classes ({_in_order(wanted)}): "
            f"set data.classes=[{_in_order(map(str, range(len(wanted))))}] if they are numbers, or [{_in_order(starts)}]."
        )
    else:
        exact = seen <= set(wanted)
        found, how = (named, "names") if exact else ((list(wanted), counted), "numbers, from 0,")
    if found is not None and starts != [str(i) for i in range(len(wanted))] and any(s.isdecimal() for s in starts):
        one = min(seen, key=int)
        notes.append(
            f"{name}: the labels are read as {how} of the classes: {one} is {wanted[found[1][one]]!r}. Name them with data.classes "
            "if this is wrong."
        )
    return found


_NUMBER = re.compile(r"[0-9]+(?![0-9.])")


def _in_order(values: Iterable[str]) -> str:
    listed = list(values) if not isinstance(values, set) else sorted(values, key=int)
    return ", ".join(listed[:20]) + (", ..." if len(listed) > 20 else "")


def _by_own_names(
    name: str,
    seen: set[str],
    chosen: Sequence[str] | None,
    known: Sequence[str] | None,
    own: Sequence[str],
    notes: list[str],
) -> tuple[list[str], dict[str, int]]:
    """As `_classes`, where the data name their numbered classes."""
    named = _same_names(seen, chosen or known or ())
    if named is not None:
        return named
    place = {label: i for i, label in enumerate(own)}
    for label in sorted(seen - place.keys()):  # of a split whose classes have no names
        if not label.isdecimal() or int(label) >= len(own):
            raise InputError(
                f"{name}: label {label!r} is none of its classes ({names(own)}). Name it as they are named."
            )
        place[label] = int(label)
    if chosen is not None:
        same = {n.casefold() for n in chosen} & {n.casefold() for n in own}
        if same or len(chosen) < len(own):  # other names for all classes stand in the order of the numbers
            raise _foreign(name, sorted(seen - set(chosen))[0], chosen)
        return list(chosen), place
    if known is not None:
        notes.append(f"{_other(name, seen, known)}: classes are numbered as the data number them. {_ORDER}")
    return list(own), place


_ORDER = "Choose their order with data.classes."


def _same_names(seen: set[str], wanted: Sequence[str]) -> tuple[list[str], dict[str, int]] | None:
    """The classes `wanted`, spelled as the labels are, and their numbers; `None` where a label is none of them."""
    if seen <= set(wanted):
        return list(wanted), {name: i for i, name in enumerate(wanted)}
    back = {label.casefold(): label for label in sorted(seen)}
    place = {name.casefold(): i for i, name in enumerate(wanted)}
    if len(back) < len(seen) or not back.keys() <= place.keys():
        return None
    classes = [back.get(name.casefold(), name) for name in wanted]
    return classes, {label: place[label.casefold()] for label in seen}


def _foreign(name: str, label: str, chosen: Sequence[str]) -> InputError:
    return InputError(
        f"{name}: label {label!r} is none of data.classes ({names(chosen)}).{nearest(label, chosen)} Name all classes, "
        "in the order of their numbers."
    )


def _other(name: str, seen: set[str], known: Sequence[str]) -> str:
    return f"{name}: label {sorted(seen - set(known))[0]!r} is none of the model's classes ({names(known)})"


def _student(everything: list[Record], spec: Mapping[str, Any], notes: list[str]) -> list[Record]:
    """The student's training records: the first `limit`, with the labels that it may read."""
    found = everything[: whole(spec, "limit", len(everything))]
    if spec.get("labelled") is not None:
        number, seen = whole(spec, "labelled", 1), Counter[int]()
        shown = []
        for record in found:
            seen[record["label"]] += 1
            shown.append(record if seen[record["label"]] <= number else {**record, "label": UNLABELLED})
        found = shown
        known = sum(r["label"] != UNLABELLED for r in found)
        notes.append(f"{known} of the student's {len(found)} training records have a label.")
    if spec.get("unlabelled"):
        notes.append("The student's training part is used without its labels.")
        found = [{**record, "label": UNLABELLED} for record in found]
    return found
