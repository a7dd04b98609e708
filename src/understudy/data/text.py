"""Text sets: the standard library's own text, files, folders and Hub sets, in TRL's column conventions."""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.data import memory
from understudy.data.class_labels import NamesOf, names_in, parquet_names, spelled
from understudy.data.columns import arrange, checked_text, conversation, names, readable, tools, without_prompt
from understudy.data.folders import find, hub_id, own_names, split_files
from understudy.data.memory import MEMORY
from understudy.data.records import READERS, Record, absent, place, read_records, reason
from understudy.errors import InputError, nearest
from understudy.files import replacing

OPTIONS = {"name", "domains", "limit", "characters", "domain_column", "columns"}
FORMATS = ({"text"}, {"messages"}, {"prompt", "completion"})
PRIVILEGED = "teacher_prompt"
"""Column of what the teacher reads in the place of the prompt, before the same completion."""
# Modules whose sources every CPython 3.11+ carries, chosen for prose-like documentation strings.
MODULES = (
    "argparse ast asyncio/base_events asyncio/events bdb calendar cmd code codecs collections/__init__ configparser "
    "contextlib copy csv ctypes/util dataclasses datetime decimal difflib dis doctest email/message enum fractions ftplib "
    "functools gettext glob gzip heapq html/parser http/client http/cookiejar http/server imaplib inspect ipaddress "
    "json/decoder json/encoder logging/__init__ logging/handlers mailbox mimetypes multiprocessing/managers "
    "multiprocessing/pool netrc numbers optparse os pathlib pdb pickle pickletools platform plistlib poplib pprint "
    "profile pstats pydoc queue random re/__init__ sched selectors shelve shlex shutil smtplib socket socketserver "
    "ssl statistics string subprocess tarfile tempfile textwrap threading timeit tokenize traceback turtle typing "
    "unittest/case unittest/mock urllib/parse urllib/request uuid warnings wave weakref xml/dom/minidom zipfile"
).split()


@dataclass
class TextSplits:
    """Records of each split: `{"id": int, "text": …}`, `{"id", "messages"}` or `{"id", "prompt", "completion"}`."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    notes: list[str] = field(default_factory=list)
    hash: str = ""
    domains: tuple[str, ...] = ()

    def texts(self) -> list[str]:
        """The training split as plain text, for training a tokenizer."""
        return [_plain(r) for r in self.train]


def _plain(record: Record) -> str:
    parts = [record.get(k) for k in ("text", "prompt", "completion", "completions", "messages") if record.get(k)]
    return "".join(_flat(p) for p in parts if p)


def _flat(part: Any) -> str:
    if isinstance(part, str):
        return part
    return "\n".join(m["content"] if isinstance(m, dict) else _flat(m) for m in part)


def load_text(spec: Mapping[str, Any]) -> TextSplits:
    """Read a text set.

    Args:
        spec: `name` (`stdlib`, a set in `UNDERSTUDY_DATA`, a file or folder, a Hub id), `domains` (of `lm_domains`),
            `limit` (most training records), `characters` (most characters of `stdlib`), `domain_column` (a column that
            names each record's domain; it becomes the record's `domain`), `columns` (names of columns, `{ours: theirs}`).

    A source without validation or test split gives up a tenth of its records for each, by a hash of their content. A
    column `tools` beside messages is kept for the chat template, and `teacher_prompt` beside a prompt for the teacher.
    """
    check_keys(spec, OPTIONS)
    name, column = str(spec["name"]), spec.get("domain_column")
    notes: list[str] = []
    splits = read_source(name, spec, ("stdlib",), notes, {column: {}} if isinstance(column, str) else None)
    for split, records in splits.items():
        if not records:
            raise InputError(f"{name}: the {split} split is empty.")
    columns = {split: names(records[0]) for split, records in splits.items()}
    notes += arrange(
        name, splits, FORMATS, {"tools", PRIVILEGED} | ({column} if column is not None else set()), spec.get("columns")
    )
    for split, records in splits.items():
        repeated = sum(
            [_check(place(f"{name}, {split} record {i}", r), r, column, columns[split]) for i, r in enumerate(records)]
        )
        if repeated:
            notes.append(repetition(name, split, repeated))
    return finish(name, spec, splits, notes, column)


def check_keys(spec: Mapping[str, Any], options: Collection[str]) -> None:
    """Raise an error for an unknown key of `data`."""
    for key in spec:
        if key not in options:
            raise InputError(
                f"Unknown key data.{key}.{nearest(str(key), options)} Known: {', '.join(sorted(options))}."
            )


def whole(spec: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    """An integer of the recipe's `data`, at least `least`."""
    value = spec.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"data.{key} is {value!r} and must be a whole number of at least {least}.")
    return value


def repetition(name: str, split: str, number: int) -> str:
    """The note on completions that repeated their prompt."""
    return f"{name}, {split}: {number} records repeat the prompt in front of the completion; it is read once."


def finish(
    name: str, spec: Mapping[str, Any], splits: dict[str, list[Record]], notes: list[str], column: str | None = None
) -> TextSplits:
    """Split, limit and number checked records. `column` names their domain, if any."""
    split_off(name, splits, notes)
    splits["train"] = splits["train"][: whole(spec, "limit", sys.maxsize)]
    for number, record in enumerate(r for records in splits.values() for r in records):
        record["id"] = number
    digest = hashlib.sha256(json.dumps(splits, sort_keys=True, default=str).encode()).hexdigest()
    domains = tuple(sorted({r["domain"] for records in splits.values() for r in records})) if column is not None else ()
    return TextSplits(splits["train"], splits["validation"], splits["test"], notes, digest, domains)


def _check(where: str, record: Record, column: str | None, columns: str) -> bool:
    """Check a record's text and its domain. `columns` are those of its split. Returns whether its completion repeated the prompt."""
    repeated = False
    if "text" in record:
        if not isinstance(record["text"], str):
            raise InputError(f"{where}: text is {type(record['text']).__name__}, not text.")
        checked_text(where, "text", record["text"])
    elif "messages" in record:
        record["messages"] = conversation(where, "messages", record["messages"])
    else:
        prompt, said = (readable(where, key, record[key]) for key in ("prompt", "completion"))
        found = without_prompt(prompt, [said]) if said else None
        repeated = found is not None
        if found is not None:
            prompt, (said,) = found
        record |= {"prompt": prompt, "completion": said}
    if record.get(PRIVILEGED) is None:
        record.pop(PRIVILEGED, None)
    elif "prompt" not in record:
        raise InputError(
            f"{where}: {PRIVILEGED} stands in the place of a prompt, and there is none: give prompt and completion."
        )
    else:
        record[PRIVILEGED] = readable(where, PRIVILEGED, record[PRIVILEGED])
    keep_tools(where, record, any(isinstance(record.get(k), list) for k in ("messages", "prompt", "completion")))
    if column is not None:
        domain = record.get(column)
        if absent(domain) or isinstance(domain, (list, dict)):
            raise InputError(
                f"{where} has no {column!r} to name its domain: its columns are {columns}. Choose another column "
                "(teacher.route, data.domain_column), or fill it."
            )
        if column not in set().union(*FORMATS):
            del record[column]
        record["domain"] = checked_text(where, column, str(domain))
    return repeated


def keep_tools(where: str, record: Record, messages: bool) -> None:
    """Check a record's tools, which plain text must not have."""
    given = record.pop("tools", None)
    found = tools(where, given) if given is not None and messages else None
    if found is not None:
        record["tools"] = found


def split_off(name: str, splits: dict[str, list[Record]], notes: list[str]) -> None:
    """Set aside a tenth of the training prompts, of each domain, for each of test and validation that is missing.

    Records of one prompt stay together, since a student must not be evaluated on prompts it was trained on. A record
    without a prompt column is its own group, and so is every record if there are fewer than ten prompts.
    """
    if "train" not in splits:
        raise InputError(f"{name} has splits {', '.join(splits)} but no train split.")
    for split, bucket in (("test", 0), ("validation", 1)):
        if split not in splits:
            seen: Counter[str] = Counter()
            aside: dict[str, bool] = {}
            parts: dict[bool, list[Record]] = {True: [], False: []}
            asked = _prompts(splits["train"])
            if len(set(asked)) < min(10, len(asked)):
                notes.append(
                    f"{name} has {len(set(asked))} prompts, too few to be split by: {split} holds prompts of train."
                )
                asked = [str(i) for i in range(len(asked))]
            for record, prompt in zip(splits["train"], asked, strict=True):
                if prompt not in aside:
                    domain = str(record.get("domain"))
                    aside[prompt] = seen[domain] % 10 == bucket * 5
                    seen[domain] += 1
                parts[aside[prompt]].append(record)
            splits[split], splits["train"] = parts[True], parts[False]
            notes.append(f"{name} has no {split} split: {len(splits[split])} of its records were set aside as one.")
    for split in ("train", "validation", "test"):
        if not splits[split]:
            raise InputError(f"{name}: the {split} split is empty. Give more records (at least ten without splits).")


def _prompts(records: list[Record]) -> list[str]:
    """The key of records that stay together: their images, else the prompt, or the index of a record without one."""
    prompts = [record.get("pictures") or record.get("prompt") for record in records]
    return [json.dumps(p, sort_keys=True, default=str) if p else str(i) for i, p in enumerate(prompts)]


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common prefix, in characters (or messages)."""
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return length


def read_source(
    name: str, spec: Mapping[str, Any], embedded: tuple[str, ...], notes: list[str], named: NamesOf | None = None
) -> dict[str, list[Record]]:
    """The records of train, validation and test with their original columns: a built-in set, file, folder or set of the Hub.

    Args:
        named: columns whose numbered classes are replaced by their names, which are added to it.
    """
    splits = _every_split(name, spec, embedded, notes, {} if named is None else named)
    further = [split for split in splits if split not in memory.SPLITS]
    if not further or len(further) == len(splits):  # none, or what follows says that train is missing
        return splits
    notes.append(f"{name}: not used are its further splits, {', '.join(further)}.")
    return {split: records for split, records in splits.items() if split not in further}


def _every_split(
    name: str, spec: Mapping[str, Any], embedded: tuple[str, ...], notes: list[str], named: NamesOf
) -> dict[str, list[Record]]:
    if name.startswith(MEMORY):
        features = {split: names_in(getattr(rows, "features", None)) for split, rows in memory.held(name).items()}
        return {split: spelled(rows, features[split], split, named) for split, rows in memory.records(name).items()}
    if name == "stdlib":
        return {"train": stdlib(whole(spec, "characters", 1_200_000))}
    path = find(name)
    if path is None:
        if "/" not in name or name.startswith((".", "/", "~")):
            raise InputError(
                f"Data {name!r} is neither built in ({', '.join(embedded)}), nor a path, nor in UNDERSTUDY_DATA.{nearest(name, embedded)}"
            )
        return _hub(name, named)
    if path.is_file():
        return {"train": _file(path, "train", named)}
    if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return _saved(path, named)
    if (path / "chunks.parquet").is_file():
        return _domains(path / "chunks.parquet", spec.get("domains"))
    files = split_files(path, READERS, notes)
    if not files:
        raise InputError(f"{path} holds no text files ({', '.join(sorted(READERS))}).")
    return {
        split: [record for file in shards for record in _file(file, split, named)] for split, shards in files.items()
    }


def _file(path: Path, split: str, named: NamesOf) -> list[Record]:
    names = parquet_names(path) if named and path.suffix == ".parquet" else {}
    return spelled(read_records(path), names, split, named)


def stdlib(characters: int) -> list[Record]:
    """Sources of a fixed list of standard-library modules, split into passages of about 2,000 characters."""
    root = Path(sysconfig.get_paths()["stdlib"])
    records: list[Record] = []
    total = 0
    for module in MODULES:
        file = root / f"{module}.py"
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), 2000):
            records.append({"text": text[start : start + 2000]})
            total += len(records[-1]["text"])
            if total >= characters:
                return records
    return records


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSON lines; the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _domains(path: Path, chosen: list[str] | None) -> dict[str, list[Record]]:
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    known = {r["domain"] for r in rows}
    if chosen is not None and not isinstance(chosen, list):
        raise InputError(f"data.domains is {chosen!r} and must be a list of names. Known: {', '.join(sorted(known))}.")
    for domain in chosen or ():
        if domain not in known:
            raise InputError(f"Unknown domain {domain!r}.{nearest(domain, known)} Known: {', '.join(sorted(known))}.")
    splits: dict[str, list[Record]] = {}
    for row in rows:
        if chosen is None or row["domain"] in chosen:
            splits.setdefault(row["split"], []).append({"text": row["text"], "domain": row["domain"]})
    return splits


def _saved(path: Path, named: NamesOf) -> dict[str, list[Record]]:
    """Read `save_to_disk` of `datasets`: one set, or one per split."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
        parts = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
        own = own_names(str(path), map(str, parts))
        return {s: spelled(parts[n].to_list(), names_in(parts[n].features), s, named) for s, n in own.items()}
    except InputError:
        raise
    except Exception as error:  # readers raise many types; the folder is damaged
        raise InputError(f"Data set {path} cannot be loaded: {reason(error)}") from error


def _hub(name: str, named: NamesOf) -> dict[str, list[Record]]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(hub_id(name))
    except Exception as error:  # the Hub client raises many types; the set is not available
        raise InputError(f"Data set {name!r} cannot be loaded: {reason(error)}") from error
    return {
        split: spelled(loaded[own].to_list(), names_in(loaded[own].features), split, named)
        for split, own in own_names(name, loaded).items()
    }
