"""Questions with worked answers: the running sums, sets in `UNDERSTUDY_DATA`, and any file with question and answer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from understudy.data.columns import arrange, checked_text
from understudy.data.folders import find
from understudy.data.reasoning_world import STYLES, digits_of, questions, running_sums, shown
from understudy.data.records import Record, absent, place, read_records
from understudy.data.text import TextSplits, check_keys, finish, read_source, split_off, whole
from understudy.errors import InputError, nearest

_OF_SUMS = ("digits", "size", "seed", "styles")
OPTIONS = {"name", "limit", "eval_limit", "columns", *_OF_SUMS}
WORLD = "sums"
MARK = "####"
LETTERS = "ABCDEFGH"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,15}(\.0)?\s*")
_SIZES = {"validation": 200, "test": 500}


def completion(rationale: str, answer: str) -> str:
    """The text that a student is trained to write: the rationale, and the answer behind the mark."""
    return f" {rationale}\n{MARK} {answer}" if rationale else f" {MARK} {answer}"


def load_reasoning(spec: Mapping[str, Any]) -> TextSplits:
    """Read questions with their answers.

    Args:
        spec: `name` (`sums`; `gsm8k`, `svamp`, `aqua`, `commonsense_qa`, `strategyqa` in `UNDERSTUDY_DATA`; a file, folder or
            Hub id), `limit` (most training questions), `eval_limit` (of validation and test each), `columns`
            (`{ours: theirs}`); of the running sums `digits`, `size`, `seed`, `styles`
            (weights by name: each solution is written in one of them, drawn at random).

    An answer that holds `####` is the rationale and, behind it, the answer, as in GSM8K. Training questions that are also in
    validation or test are left out.

    Returns:
        Records with `question`, `rationale` (empty where there is none), `answer`, and where the data say it `level`, their
        difficulty as a whole number.

    Raises:
        InputError: an answer or question is missing; or test problems of GSM8K are trained on and judged.
    """
    check_keys(spec, OPTIONS)
    name, notes = str(spec["name"]), list[str]()
    if name == WORLD:
        splits = _sums(spec)
    else:
        for key in _OF_SUMS:
            if key in spec:
                raise InputError(f"data.{key} belongs to the running sums (data=sums) and has no effect on {name}.")
        splits = _read(name, spec, notes)
    for records in splits.values():
        for record in records:
            record["prompt"] = record["question"]  # questions that are alike stay in one split
    split_off(name, splits, notes)
    for split in ("validation", "test"):
        splits[split] = splits[split][: whole(spec, "eval_limit", len(splits[split]))]
    _leave_out_judged(name, splits, notes)
    return finish(name, spec, splits, notes)


def _sums(spec: Mapping[str, Any]) -> dict[str, list[Record]]:
    levels, size = tuple(spec.get("digits") or (4, 6)), whole(spec, "size", 3000)
    if len(levels) != 2:
        raise InputError(f"data.digits is {list(levels)}: give the least and the most digits, as in [4, 6].")
    seed = whole(spec, "seed", 0, least=0)
    made, weights, splits = questions(levels, size + sum(_SIZES.values()), seed), spec.get("styles"), {}
    for split, number in {**_SIZES, "train": size}.items():
        splits[split] = [_sum_record(next(made)) for _ in range(number)]
    if weights is not None:
        _restyle([r for records in splits.values() for r in records], weights, seed)
    return splits


def _sum_record(question: str) -> Record:
    sums = running_sums(digits_of(question))
    return {"question": question, "rationale": shown(sums), "answer": str(sums[-1]), "level": len(sums)}


def _restyle(records: list[Record], weights: Mapping[str, float], seed: int) -> None:
    """Write each solution in a style drawn by its weight, and note it as the record's `style`."""
    unknown = [style for style in weights if style not in STYLES]
    if unknown or not sum(weights.values()) > 0:
        what = f"style {unknown[0]!r}.{nearest(unknown[0], STYLES)}" if unknown else "weight above 0."
        raise InputError(f"data.styles has no known {what} Known styles: {', '.join(STYLES)}.")
    chance, names = np.random.default_rng([seed, 0x57]), list(weights)
    shares = np.asarray([weights[n] for n in names], np.float64) / sum(weights.values())
    for record in records:
        record["style"] = names[int(chance.choice(len(names), p=shares))]
        record["rationale"] = STYLES[record["style"]](digits_of(record["question"]), chance)


def _read(name: str, spec: Mapping[str, Any], notes: list[str]) -> dict[str, list[Record]]:
    path, adapt = SETS.get(name, (name, None))
    if adapt is not None and find(path) is None:
        raise InputError(f"Data {name!r} is read from {path} in UNDERSTUDY_DATA, where it is not: set UNDERSTUDY_DATA.")
    found = find(path)
    single = adapt is not None and found is not None and found.is_file()
    splits = {"train": read_records(Path(str(found)))} if single else read_source(path, spec, (WORLD, *SETS), notes)
    if adapt is not None:
        splits = {split: [adapt(record) for record in records] for split, records in splits.items()}
    notes += arrange(name, splits, ({"question", "answer"},), {"rationale", "level"}, spec.get("columns"))
    marks = 0
    for split, records in splits.items():
        if not records:
            raise InputError(f"{name}: the {split} split is empty.")
        marks += sum([_check(place(f"{name}, {split} record {i}", r), r) for i, r in enumerate(records)])
    if marks:
        notes.append(f"{name}: calculator marks <<…>> of {marks} rationales were left out.")
    return splits


def _check(where: str, record: Record) -> bool:
    """Make question, rationale and answer of a record plain text; whether it held calculator marks."""
    for key in ("question", "answer"):
        value = record[key]
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if isinstance(value, (int, float)) and math.isfinite(value):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            said = (
                "empty" if absent(value) or value == "" else value if isinstance(value, float) else type(value).__name__
            )
            raise InputError(f"{where}: {key} is {said}, not text.")
        record[key] = checked_text(where, key, value.strip())
    if isinstance(record.get("level"), (str, float)) and _WHOLE.fullmatch(str(record["level"])):
        record["level"] = int(float(record["level"]))  # cells of .csv are text, and columns with gaps are fractions
    if "level" in record and (not isinstance(record["level"], int) or isinstance(record["level"], bool)):
        raise InputError(f"{where}: level is {record['level']!r} and must be a whole number.")
    rationale = record.get("rationale") or ""
    if not isinstance(rationale, str):
        raise InputError(f"{where}: rationale is {type(rationale).__name__}, not text.")
    if not rationale and MARK in record["answer"]:
        rationale, _, record["answer"] = (part.strip() for part in record["answer"].rpartition(MARK))
        if not record["answer"]:
            raise InputError(f"{where}: nothing stands behind {MARK} in the answer.")
    record["rationale"] = checked_text(where, "rationale", _CALCULATOR.sub("", rationale).strip())
    return bool(_CALCULATOR.search(rationale))


def _svamp(row: Record) -> Record:
    body = row["body"].strip().rstrip(".")
    return _like(row, f"{body}. {row['question']}", f"{row['equation'].strip('( )')} = {row['answer']}", row["answer"])


def _aqua(row: Record) -> Record:
    return _like(row, "\n".join([row["question"], *row["options"]]), row["rationale"], row["correct"])


def _commonsense(row: Record) -> Record:
    options = [f"{letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=False)]
    return _like(row, "\n".join([row["question"], *options]), row["explanation"], LETTERS[row["label"]])


def _strategyqa(row: Record) -> Record:
    facts = re.sub(r"^(Yes|No)\.\s*", "", row["target"])
    return _like(row, row["question"], facts, bool(row["label"]))


def _like(row: Record, question: str, rationale: str, answer: Any) -> Record:
    """A record of the three columns, at the place of `row`."""
    found = type(row)({"question": question, "rationale": rationale, "answer": answer})
    if hasattr(row, "at"):
        found.at = row.at  # type: ignore[attr-defined]
    return found


SETS: dict[str, tuple[str, Callable[[Record], Record]]] = {
    "svamp": ("reasoning_traces/svamp.parquet", _svamp),
    "aqua": ("reasoning_traces/aqua_test.parquet", _aqua),
    "commonsense_qa": ("commonsense_qa", _commonsense),
    "strategyqa": ("commonsense_qa/strategyqa.parquet", _strategyqa),
}
"""Sets whose columns are their own: where they lie in `UNDERSTUDY_DATA`, and how a record is read."""


def same_question(text: str) -> str:
    """A question as it is compared with others: without case, space and punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _leave_out_judged(name: str, splits: dict[str, list[Record]], notes: list[str]) -> None:
    """Leave out training questions that are judged; refuse to judge GSM8K's test problems where others of them are trained on."""
    trained = [same_question(r["question"]) for r in splits["train"]]
    judged = {same_question(r["question"]) for split in ("validation", "test") for r in splits[split]}
    tested = gsm8k_test()
    if tested & judged and (wrong := sum(q in tested for q in trained if q not in judged)):
        raise InputError(
            f"{name} trains on {wrong} test problems of GSM8K and is judged on others of them, which is no test accuracy of "
            "GSM8K: give the judged questions in a file of their own (data.name as a folder with test.jsonl)."
        )
    kept = [r for r, question in zip(splits["train"], trained, strict=True) if question not in judged]
    if len(kept) < len(trained):
        notes.append(f"{name}: {len(trained) - len(kept)} training questions are also in validation or test: left out.")
    if not kept:
        raise InputError(f"{name}: every training question is also in validation or test. Give other ones.")
    splits["train"] = kept


def gsm8k_test() -> set[str]:
    """GSM8K's test questions, as of `same_question`; empty where `UNDERSTUDY_DATA` does not hold them."""
    file = find("gsm8k/test.parquet")
    return {same_question(r["question"]) for r in read_records(file)} if file is not None else set()
