"""A teacher on a server that scores the student's tokens, with a store, so that nothing is requested twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.data import IGNORE, Batch
from understudy.errors import InputError
from understudy.files import read_json, replacing
from understudy.generation import Endpoint, SourceError
from understudy.generation.endpoint import served_name
from understudy.models import ModelAdapter, ModelOutput, evaluating
from understudy.streaming import project
from understudy.targets import Projected
from understudy.teachers.cache.store import ShardStore, content_key
from understudy.teachers.cache.teacher import CachedTeacher, Captured, example_keys
from understudy.teachers.server.client import ScoringClient
from understudy.teachers.server.scores import Asked, OtherWay, Score

PROBE = "probe.json"
PROBE_TOKENS = 64
TILE = 1024  # rows of the student's logits computed at once
GROUP = 32  # batches that are sent together when capturing
WORSE_THAN_GUESSING = 1.0  # nats per token above the uniform distribution
ANOTHER_MODEL = 0.25  # nats per token: more than the difference of one model on other hardware or in another dtype
TEXT = "Aé 日本 🙂\n\tdef f(x):  # 12345"
MESSAGES = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]


class ServedTeacher(CachedTeacher):
    """Returns targets from a store; missing examples are scored by an OpenAI-compatible server first.

    The store is an ordinary cache: its keys are those of `understudy cache capture`, and `teacher.cache` reads it
    without the server. With `score=ids:N` the key includes the support, which needs one more forward pass of the
    student.

    Args:
        model, endpoint: the server's name of the teacher, and its address.
        score: the kind of scores requested (`teachers.server.scores`).
        folder: of the store.
        identity: what the scores depend on beside model and score.
        tokenizer: of the run.
        student: its most probable tokens are requested with `ids:N`.
    """

    def __init__(
        self,
        model: str,
        endpoint: Endpoint,
        score: Score,
        folder: Path,
        identity: Mapping[str, Any],
        tokenizer: Any,
        student: ModelAdapter | None = None,
    ) -> None:
        self.score, self.tokenizer, self.student = score, tokenizer, student
        self.home, self.given, self.notes = folder, dict(identity), list[str]()
        self._begin(model, endpoint)
        self.name = f"{self.client.url} {model}"

    def _begin(self, model: str, endpoint: Endpoint) -> None:
        classes = int(self.given["classes"])
        facts = {
            **self.given,
            "teacher": served_name(model, endpoint),
            "score": str(self.score),
            "support": f"scored:{min(self.score.k, classes)}",
            "temperature": 1.0,
        }
        folder = self.home / "ids" if self.score.kind == "ids" else self.home
        self._open(ShardStore(folder, facts), None)
        self.client = ScoringClient(model, endpoint, self.store, self.score, classes, self._text, self._id)

    def start(self, example: Batch, conversations: bool = False) -> None:
        """Compare tokenizers, find the request format, and check that the server's model fits these tokens.

        Args:
            example: one training example.
            conversations: the data are rendered by the chat template.

        Raises:
            InputError: the server has another tokenizer, template or model, or supports no scoring.
        """
        self._same_tokenizer(conversations)
        ids, before, own = self._probe(example)
        if before is not None:
            change = sum(abs(a - b) for a, b in zip(own, before, strict=True)) / len(own)
            if change > ANOTHER_MODEL:
                raise InputError(
                    f"{self.name} now answers {change:.2f} nats a token away from what cache {self.store.folder} was begun "
                    "with: it serves another model under this name. Choose another output, or serve the first one again."
                )
            return
        even = torch.tensor(float(self.classes)).log().item()
        if -sum(own) / len(own) > even + WORSE_THAN_GUESSING:
            raise InputError(
                f"{self.name} gives the training text {-sum(own) / len(own):.1f} nats a token, and guessing evenly "
                f"gives {even:.1f}: it reads these ids as other tokens. Serve the teacher of the run's tokenizer, or set "
                "teacher.tokenizer to the teacher's."
            )
        self.store.claim()
        with replacing(self.store.folder / PROBE) as temporary:
            temporary.write_text(json.dumps({"ids": ids, "log_probs": own}))

    def _probe(self, example: Batch) -> tuple[list[int], list[float] | None, list[float]]:
        """The tokens of a text, and their log-probabilities: those from the start of the store, if any, and the present
        ones."""
        before = _read_probe(self.store.folder / PROBE)
        ids = before["ids"] if before else _sequence(example, 0)[0][:PROBE_TOKENS]
        if len(ids) < 2:
            raise InputError("The first training example has one token: a served teacher has nothing to score.")
        asked = Asked(b"probe", tuple(ids), tuple(range(len(ids) - 1)), tuple((i,) for i in ids[1:]))
        try:
            own = self.client.settle(asked)
        except OtherWay:
            if self.score.kind != "ids":
                raise
            wanted, self.score = self.score, Score("top_k", self.score.k)
            self.notes.append(f"The server scores no given ids: score={wanted} became {self.score}.")
            self._begin(self.client.model, self.client.endpoint)
            return self._probe(example)
        self.notes.append(f"{self.score.meaning} Scores come from {self.name}.")
        return ids, before["log_probs"] if before else None, own

    def _same_tokenizer(self, conversations: bool) -> None:
        """Raise an error if the server splits text, names the end token or renders messages differently, where it says
        so."""
        plain = self._tokenize({"prompt": TEXT, "add_special_tokens": False})
        if plain is None:
            self.notes.append("The server has no /tokenize: its tokenizer could not be compared, only its scores.")
            return
        checks: dict[str, tuple[Any, Any]] = {
            "the tokens of a text": (plain, self.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
        }
        end = self.tokenizer.eos_token
        if end is not None:
            said = self._tokenize({"prompt": end, "add_special_tokens": False})
            checks[f"the end of a text ({end})"] = (said, [self.tokenizer.eos_token_id])
        if conversations:
            said = self._tokenize({"messages": MESSAGES, "add_generation_prompt": False})
            checks["a conversation (chat template)"] = (said, _rendered(self.tokenizer))
        for what, (theirs, ours) in checks.items():
            if theirs != list(ours):
                raise InputError(
                    f"{self.name} and the run have different tokenizers: {what} is {_some(theirs)} there and "
                    f"{_some(ours)} here. Serve a teacher of the student's family, or choose a student of the teacher's."
                )

    def _tokenize(self, body: Mapping[str, Any]) -> list[int] | None:
        """The server's tokenization, or `None` if it does not provide it."""
        url = self.client.url.removesuffix("/v1") + "/tokenize"
        try:
            reply, _ = self.client.post(url, {"model": self.client.model, **body})
        except (SourceError, InputError):
            return None
        tokens = reply.get("tokens")
        return tokens if isinstance(tokens, list) and all(type(i) is int for i in tokens) else None

    def _text(self, token: int) -> str:
        """The text of a token, for servers that identify tokens by text."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _spelled(self) -> Mapping[str, int]:
        """Ids by text; −1 where several share one."""
        found: dict[str, int] = {}
        for token in range(len(self.tokenizer)):
            text = self._text(token)
            found[text] = -1 if text in found else token
        return found

    def _id(self, text: str) -> int:
        if text.startswith("token_id:"):
            return int(text.removeprefix("token_id:"))
        found = self._spelled.get(text, -1)
        if found < 0:
            raise InputError(
                f"the server names tokens by text, and {text!r} is no single token of the run's tokenizer. Use a server "
                "that names them by id (vLLM), or score=sampled."
            )
        return found

    def __call__(self, batch: Batch) -> ModelOutput:
        """The targets of the batch's rows; those that are not stored are requested."""
        asked = self._asked(batch)
        self.client.fill(asked)
        return self.recall([a.key for a in asked], batch)

    def _asked(self, batch: Batch) -> list[Asked]:
        support = self._support(batch) if self.score.kind == "ids" else None
        found, start = [], 0
        for i, key in enumerate(example_keys(batch)):
            ids, labels = _sequence(batch, i)
            rows = tuple(t - 1 for t in range(1, len(ids)) if labels[t] != IGNORE)
            mine = None
            if support is not None:
                part = support[start : start + len(rows)]
                key = content_key(torch.frombuffer(bytearray(key), dtype=torch.uint8), part)
                mine = tuple(tuple(row) for row in part.tolist())
                start += len(rows)
            found.append(Asked(key, tuple(ids), rows, mine))
        return found

    @torch.no_grad()
    def _support(self, batch: Batch) -> Tensor:
        """`[rows, k]`, the student's most probable tokens, ascending."""
        if self.student is None:
            raise InputError(
                "score=ids:N follows the student as it trains and cannot be captured ahead: capture top_k:N or sampled."
            )
        with evaluating(self.student):
            signal = self.student(batch).signal
        found = []
        for start in range(0, signal.rows, TILE):
            part = signal.select(slice(start, start + TILE))
            logits = project(part) if isinstance(part, Projected) else part.logits
            best = logits.topk(min(self.score.k, logits.shape[-1]), -1).indices
            found.append(best.sort(-1).values.cpu())
        return torch.cat(found) if found else torch.zeros(0, self.score.k, dtype=torch.long)


def capture_served(
    teacher: ServedTeacher, batches: Iterable[Batch], *, tick: Callable[[int], None] | None = None
) -> Captured:
    """Have examples scored in advance, many at once, except those in the store."""
    before, several = len(teacher.store), iter(batches)
    while group := list(islice(several, GROUP)):
        teacher.client.fill([a for batch in group for a in teacher._asked(batch)])
        if tick:
            tick(sum(len(batch.labels) for batch in group))
    store = teacher.store
    store.compact()
    return Captured(len(store), store.rows, len(store) - before, store.size)


def verify_served(fresh: ServedTeacher, batches: Iterable[Batch], folder: Path) -> dict[str, float]:
    """Have examples scored again into the store of `fresh`, and compare the log-probabilities of the tokens in both
    stores."""
    stored = CachedTeacher(folder, {"teacher": fresh.store.identity["teacher"], "score": str(fresh.score)})
    rows, total, worst = 0, 0.0, 0.0
    for batch in batches:
        new, old = fresh(batch).signal, stored(batch).signal
        same = new.ids[:, :, None] == old.ids[:, None, :]
        change = (new.log_probs[:, :, None] - old.log_probs[:, None, :]).abs().masked_fill(~same, 0.0)
        rows, total = rows + batch.num_items, total + float((change.sum((1, 2)) / same.sum((1, 2)).clamp(min=1)).sum())
        worst = max(worst, float(change.max()))
    return {"rows": rows, "mean_difference": total / max(rows, 1), "largest_difference": worst}


def _sequence(batch: Batch, index: int) -> tuple[list[int], list[int]]:
    """Tokens and labels of one example, without padding."""
    kept = batch.inputs["attention_mask"][index].bool()
    return batch.inputs["input_ids"][index][kept].tolist(), batch.labels[index][kept].tolist()


def _rendered(tokenizer: Any) -> list[int]:
    found = tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=False)
    return list(found["input_ids"] if isinstance(found, Mapping) else found)


def _read_probe(file: Path) -> dict[str, Any] | None:
    """The tokens of a text and their log-probabilities from the start of a store, or `None`.

    Raises:
        InputError: the file is damaged.
    """
    held = read_json(file)
    if held is None:
        return None
    ids: Any = held.get("ids")
    said: Any = held.get("log_probs")
    whole = isinstance(ids, list) and isinstance(said, list) and len(said) == len(ids) - 1
    if not whole or not all(type(n) is int and n >= 0 for n in ids) or not all(type(v) is float for v in said):
        raise InputError(f"{file} is damaged: it must hold ids and the log_probs of all but the first. Put it back.")
    return held


def _some(ids: Sequence[int] | None) -> str:
    return "unknown" if ids is None else f"{list(ids[:6])}{'…' if len(ids) > 6 else ''}"
