"""Malformed files of text and preference data: they load, or are refused in one line; nothing else, and in bounded time."""

import csv
import json
import random
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from understudy import InputError
from understudy.data import encode, encode_lists, load_preferences, load_text, train_tokenizer
from understudy.data.knowledge import load_events, load_labels

SECONDS = 20
"""Longest time for one file."""

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(chance, number):
    return [
        {"role": ("user", "assistant")[i % 2], "content": chance.choice(["a", "the user", "é 🙂"])}
        for i in range(number)
    ]


SHARES = {"user": "human", "assistant": "gpt"}
RECORDS = {
    "text": lambda c: {"text": c.choice(["hello world", "é\u2028x", "<s>a</s>"])},
    "messages": lambda c: {"messages": turns(c, c.randint(2, 4)), "tools": [{"type": "function"}]},
    "completion": lambda c: {"prompt": "the user", "completion": c.choice([" hello", turns(c, 2)[1:]])},
    "sharegpt": lambda c: {"conversations": [{"from": SHARES[m["role"]], "value": m["content"]} for m in turns(c, 2)]},
    "alpaca": lambda c: {"instruction": "add", "input": c.choice(["", "1 2"]), "output": "3"},
    "pair": lambda c: {"prompt": "the user", "chosen": " hello", "rejected": " world"},
    "implicit": lambda c: {"chosen": turns(c, 2), "rejected": [*turns(c, 1), {"role": "assistant", "content": "no"}]},
    "list": lambda c: {"prompt": "a", "completions": ["b", "c"], "scores": [1, c.random()], "log_probs": [-1.0, -2.0]},
    "single": lambda c: {"prompt": turns(c, 1), "completion": " b", "label": c.random() < 0.5},
    "event": lambda c: {"event": "it rains"},
    "triple": lambda c: {"head": "it rains", "relation": "xNeed", "tail": "an umbrella", "label": 1},
}


def nested(depth, inside="a"):
    for _ in range(depth):
        inside = [inside]
    return inside


NASTY = [
    lambda c: None,
    lambda c: "",
    lambda c: " \n\t",
    lambda c: c.choice([0, -1, 3.5, 10**400, float("nan"), float("inf"), 1e308, True]),
    lambda c: c.choice(
        ["\ud800", "a\udfffb", "\x00", "\ufeff", "{{ 1/0 }}", "[b]", "<s>" * 50, "a" * 20_000, "[1,", "{"]
    ),
    lambda c: c.choice([[], {}, [[]], [None], [{}], ["a"], {"a": 1}, [1, "a"], [["a"]]]),
    lambda c: nested(c.choice([3, 50, 400])),
    lambda c: [
        {"role": c.choice(["user", "assistant", "", 3, None, "a\nb"]), "content": c.choice(["a", None, 3, [], {}])}
    ],
    lambda c: [
        {"role": "assistant", "content": [{"type": c.choice(["text", "image", 3]), "text": c.choice(["a", 3])}]}
    ],
    lambda c: [{"role": "assistant", "content": None, "tool_calls": c.choice([[], [{}], "x", nested(300)])}],
    lambda c: [{"from": c.choice(["gpt", 3, None, []]), "value": c.choice(["a", 3, None])}],
]


def damage(chance, value, depth=0):
    """`value` with something in it replaced, doubled or taken out."""
    if isinstance(value, dict) and value and depth < 3 and chance.random() < 0.8:
        key = chance.choice(list(value))
        other = dict(value)
        what = chance.random()
        if what < 0.15:
            del other[key]
        elif what < 0.3:
            other[chance.choice(["", "a\nb", "text", "label", "tools", "\ud800", *value])] = other.pop(key)
        else:
            other[key] = damage(chance, value[key], depth + 1)
        return other
    if isinstance(value, list) and value and depth < 3 and chance.random() < 0.6:
        i, what = chance.randrange(len(value)), chance.random()
        if what < 0.2:
            return value[:i] + value[i + 1 :]
        if what < 0.4:
            return [*value[:i], value[i], *value[i:]]
        return [*value[:i], damage(chance, value[i], depth + 1), *value[i + 1 :]]
    return chance.choice(NASTY)(chance)


def damaged_bytes(chance, content):
    """Bytes cut, changed, doubled or put in."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.randint(1, 12))
        put = chance.choice(
            [b"", b"\xff", b"\x00", b'"', b"\n", b"[" * 5000, b"{", b",", b"\r", b"9" * 5000, content[:at][-9:]]
        )
        content[at:end] = put
    return bytes(content)


def write(chance, folder, seed):
    """A file of records, most of them sound; and whether it was damaged at all."""
    kind = chance.choice(list(RECORDS))
    rows = [RECORDS[kind](chance) for _ in range(chance.choice([1, 12, 30]))]
    harm = chance.random()
    if harm < 0.75:
        for i in chance.sample(range(len(rows)), chance.choice([1, 1, len(rows)])):
            rows[i] = damage(chance, rows[i])
    suffix = chance.choice(["jsonl", "jsonl", "json", "csv", "parquet", "txt"])
    path = folder / f"{seed}.{suffix}"
    if suffix in ("jsonl", "json"):
        whole = [json.dumps(r, ensure_ascii=chance.random() < 0.7) for r in rows]
        text = "[" + ",\n".join(whole) + "]" if suffix == "json" and chance.random() < 0.7 else "\n".join(whole)
        content = text.encode("utf-8", "surrogatepass")
    elif suffix == "csv":
        rows = [r if isinstance(r, dict) else {"text": r} for r in rows]
        keys = list(dict.fromkeys(k for r in rows for k in r))
        with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
            writer = csv.writer(file)
            writer.writerow(keys)
            for r in rows:
                cells = [r.get(k, "") for k in keys]
                writer.writerow([v if isinstance(v, (str, int, float)) else json.dumps(v) for v in cells])
        content = path.read_bytes()
    elif suffix == "parquet":
        rows = [r if isinstance(r, dict) else {"text": r} for r in rows]
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):  # it holds no such records
            pq.write_table(pa.table({"text": [["a"], None], "prompt": [3, None], "event": [[1], []]}), path)
        content = path.read_bytes()
    else:
        content = json.dumps(rows).encode("utf-8", "surrogatepass")
    path.write_bytes(damaged_bytes(chance, content) if harm > 0.6 else content)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["the user asked and the assistant said hello world"] * 4, 300)
    made.chat_template = TEMPLATE
    return made


def uses(path, tokenizer):
    """What is done with a file: each must succeed or be refused."""

    def texts():
        for records in vars(load_text({"name": str(path)})).values():
            if isinstance(records, list) and records and isinstance(records[0], dict):
                encode(records, tokenizer, max_length=64, pack=True)
                encode(records, tokenizer, max_length=64, pack=False)

    def preferences():
        encode_lists(load_preferences({"name": str(path)}).train, tokenizer, max_length=64)

    yield texts
    yield preferences
    yield lambda: load_text({"name": str(path), "columns": {"text": "prompt"}, "domain_column": "label"})
    yield lambda: load_events(str(path))
    yield lambda: load_labels(str(path), {"xNeed": None})


def refused(path, tokenizer):
    """How often a file was refused. Anything but success or one line is an error, as is a use that takes too long."""

    def late(*_):
        raise TimeoutError(f"{path} takes more than {SECONDS} seconds")

    number = 0
    for use in uses(path, tokenizer):
        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        try:
            use()
        except InputError as error:
            said = str(error)
            assert said.isprintable() and len(said) < 2000, (path, said[:500])
            number += 1
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    return number


def fuzz(seeds, folder, tokenizer):
    counts = [refused(write(random.Random(seed), folder, seed), tokenizer) for seed in seeds]
    assert 0 < sum(counts) < 5 * len(counts)  # the files are neither all sound nor all hopeless


def test_malformed_files_load_or_are_refused_in_one_line(tmp_path, tokenizer):
    fuzz(range(40), tmp_path, tokenizer)


@pytest.mark.slow
def test_many_malformed_files_load_or_are_refused_in_one_line(tmp_path, tokenizer):
    fuzz(range(1000, 1250), tmp_path, tokenizer)


@pytest.mark.parametrize("kind", RECORDS)
def test_the_sound_records_of_the_fuzzer_are_accepted(kind, tmp_path, tokenizer):
    chance = random.Random(1)
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(RECORDS[kind](chance)) + "\n" for _ in range(30)))
    assert refused(path, tokenizer) < 5
