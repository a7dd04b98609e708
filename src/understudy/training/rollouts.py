"""Rollouts: during training the student, the teacher or both generate new completions for a fraction of the examples.

Which examples, their prompts and every drawn token depend on (seed, step, example id) and the weights alone, whatever
the split into micro-batches; what the teacher writes alone depends on the epoch in place of the step. The texts of several steps are generated at once, and a checkpoint holds those not used
yet, so that a resumed run gets the same texts.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.data.batch import SOURCES
from understudy.data.noise import uniform
from understudy.data.samples import Sample, pack, prompt_length, sampled_row, token_rows, unpack
from understudy.errors import InputError
from understudy.files import writing
from understudy.generation.continuous import sample_continuously
from understudy.generation.decoding import end_tokens, sample, writer
from understudy.models import ModelAdapter
from understudy.training.on_policy import OnPolicy
from understudy.training.order import COUNTS

CHOICE, DRAWS = 0x0FF, 0x0FE  # separate random streams


@dataclass(frozen=True)
class _Window:
    """The updates `start … end − 1`, and the texts that replace some of their examples: (update, id) → (source, text)."""

    start: int
    end: int
    texts: Mapping[tuple[int, int], tuple[int, Sample]]


class Rollouts:
    """Takes micro-batches from the data, `policy.steps` updates ahead, and replaces completions by samples.

    Args:
        policy: the options.
        student, teacher: their `model`s generate; the teacher's where `policy` gives it a share.
        tokenizer: of student and teacher.
        collate: collates the examples.
        seed, total: of the run.
        file: gets one line per sample.
        meter: a cost meter, or `None`.
    """

    def __init__(
        self,
        policy: OnPolicy,
        student: ModelAdapter,
        tokenizer: Any,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        *,
        seed: int,
        total: int,
        file: Path | None = None,
        meter: Any = None,
        teacher: ModelAdapter | None = None,
    ) -> None:
        share = policy.teacher_share
        if share and teacher is None:
            raise InputError("on_policy.teacher_share lets the teacher write, and none was given.")
        self.model = writer(teacher if teacher is not None and share == 1 else student)
        self.beside = writer(teacher) if teacher is not None and 0 < share < 1 else None
        self.labelled = share == 1
        self.epoch = 0
        self.policy, self.tokenizer, self.collate = policy, tokenizer, collate
        self.vocabulary = int(getattr(student, "vocabulary", len(tokenizer)))
        self.ends = end_tokens(self.model, tokenizer)
        self.seed, self.total, self.file, self.meter = seed, total, file, meter
        self.fraction = policy.fraction
        self.buffer: deque[Sample] = deque(maxlen=policy.replay.size if policy.replay else 0)
        self.kept: dict[tuple[int, int], Sample] = {}
        self._judged: float | None = None
        self._window = _Window(0, 0, {})
        self._queue: list[dict[str, Any]] = []
        self._tally: dict[str, float] = {}

    def take(
        self,
        iterator: Iterator[dict[str, Any]],
        number: int,
        step: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> list[dict[str, Any]]:
        """The `number` micro-batches of update `step`. If samples have to be generated, that happens inside `autocast`."""
        if not self._queue:
            held = self._window
            resumed = held.start < step < held.end  # from a checkpoint with unused samples
            end = held.end if resumed else min(step + self.policy.steps, max(self.total, step + 1))
            batches = list(itertools.islice(iterator, (end - step) * number))
            beside = [{COUNTS: b.pop(COUNTS)} if COUNTS in b else {} for b in batches]  # only of this rank
            if not resumed:
                read = batches if self.fraction or self.policy.adaptive else []  # with a fraction of 0 nothing is read
                rows = [(step + i // number, row) for i, b in enumerate(read) for row in token_rows(b)]
                self._window = _Window(step, step - (-len(batches) // number), self._texts(rows, step, autocast))
            pairs = enumerate(zip(batches, beside, strict=True))
            self._queue = [{**self._dressed(b, step + i // number), **kept} for i, (b, kept) in pairs]
        taken, self._queue = self._queue[:number], self._queue[number:]
        self._count(taken, step)
        return taken

    def _dressed(self, values: dict[str, Any], step: int) -> dict[str, Any]:
        """A micro-batch with its samples inserted, and the source of each example."""
        found = [self._window.texts.get((step, number)) for number in values["ids"].tolist()]
        if any(found):
            rows = [
                row if text is None else {**row, **sampled_row(text[1], self.tokenizer, self.labelled)}
                for row, text in zip(token_rows(values), found, strict=True)
            ]
            values = self.collate(rows)
        source = torch.tensor([0 if text is None else text[0] for text in found])
        return {**values, "source": source, "sampled": torch.tensor([-1 if t is None else t[1].at for t in found])}

    def _texts(
        self, rows: list[tuple[int, dict[str, Any]]], now: int, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> dict[tuple[int, int], tuple[int, Sample]]:
        """Decide for each example of the coming updates whether it is replaced, and generate the fresh samples."""
        texts: dict[tuple[int, int], tuple[int, Sample]] = {}
        fresh: dict[tuple[int, int], tuple[list[int], Tensor, list[int]]] = {}
        replay = self.policy.replay
        generation = self.epoch % (self.policy.generations or self.epoch + 1)
        if rows and "teacher_prompt" in rows[0][1] and (replay is not None or self.beside is not None):
            raise InputError(
                "teacher_prompt is of one example, and replay or a mixture of both sides writes after one prompt: leave out "
                "on_policy.replay, and set on_policy.teacher_share to 0 or 1."
            )
        for step, row in rows:
            ids, at = torch.tensor([row["id"]]), generation if self.labelled else step
            mine, again, which, _ = uniform(ids, (4,), seed=self.seed, step=step, stream=CHOICE)[0].tolist()
            key = (step, row["id"])
            if mine >= self.fraction:
                continue
            full = replay is not None and len(self.buffer) == replay.size
            if replay is not None and full and again < replay.at(step / self.total):
                texts[key] = (SOURCES.index("replayed"), self.buffer[int(which * len(self.buffer))])
                continue
            if (row["id"], generation) in self.kept:
                texts[key] = (SOURCES.index("replayed"), self.kept[row["id"], generation])
                continue
            cut = float(uniform(ids, (4,), seed=self.seed, step=at, stream=CHOICE)[0, 3])
            prompt = row["input_ids"][: prompt_length(row["labels"], self.policy.cut, cut)].tolist()
            drawn = uniform(ids, (1,), seed=self.seed, step=at, stream=DRAWS)
            told = row["teacher_prompt"].tolist() if self.labelled and "teacher_prompt" in row else prompt
            fresh.setdefault(key, (prompt, (drawn[:, 0] * 2**53).long(), told))
        if fresh:
            with self.meter.generate(self.model) if self.meter is not None else nullcontext(), autocast():
                found = self._write(fresh, now)
            for key, text in zip(fresh, found, strict=True):
                texts[key] = (SOURCES.index("fresh"), text)
                self.buffer.append(text)
                if self.policy.generations is not None:
                    self.kept[text.id, generation] = text
        return texts

    def _write(self, fresh: Mapping[tuple[int, int], tuple[list[int], Tensor, list[int]]], now: int) -> list[Sample]:
        """Generate continuations of what the writer is told with the present weights, and put them after the prompts."""
        policy, started = self.policy, time.perf_counter()
        prompts, told = [prompt for prompt, *_ in fresh.values()], [told for *_, told in fresh.values()]
        keys = torch.cat([key for _, key, _ in fresh.values()]).to(next(self.model.parameters()).device)
        options: dict[str, Any] = {
            "most": policy.max_new_tokens,
            "vocabulary": self.vocabulary,
            "ends": self.ends,
            **policy.model_dump(include={"in_flight", "temperature", "top_p", "top_k"}),
        }
        if policy.engine == "continuous":
            found = sample_continuously(self.model, told, keys, **options)
        else:
            options |= {"teacher": self.beside, "teacher_share": policy.teacher_share}
            found = sample(self.model, told, keys, pad=self.tokenizer.pad_token_id or 0, **options)
        tokens = sum(map(len, found))
        if self.meter is not None:
            self.meter.generated += tokens
        ended = [text[-1] in self.ends for text in found]
        empty = sum(end and len(text) == 1 for text, end in zip(found, ended, strict=True))
        rounds = max(1.0, len(found) / policy.in_flight)  # while prompts wait, `continuous` keeps all slots busy
        rounds = rounds if policy.engine == "continuous" else math.ceil(rounds)
        self._add(written=len(found), rounds=rounds, tokens=tokens, empty=empty, unended=len(found) - sum(ended))
        self._add(seconds=time.perf_counter() - started)
        self._note(fresh, found, ended, now)
        pairs = zip(fresh, prompts, found, strict=True)
        return [Sample(number, now, len(prompt), (*prompt, *text)) for (_, number), prompt, text in pairs]

    def _note(self, fresh: Any, found: list[list[int]], ended: list[bool], now: int) -> None:
        """Write one line per sample: when it was generated, for which update and example, and its text."""
        if self.file is None:
            return
        with writing(self.file), self.file.open("a") as file:
            for (use, number), text, end in zip(fresh, found, ended, strict=True):
                words = self.tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                line = {"step": now, "for_step": use, "id": number, "tokens": len(text), "ended": end, "text": words}
                file.write(json.dumps(line) + "\n")

    def _add(self, **numbers: float) -> None:
        for name, number in numbers.items():
            self._tally[name] = self._tally.get(name, 0) + number

    def _count(self, taken: list[dict[str, Any]], step: int) -> None:
        for values in taken:
            own, again = values["source"] > 0, values["source"] == SOURCES.index("replayed")
            age = float((step - values["sampled"][again]).sum())
            self._add(examples=len(own), own=int(own.sum()), replayed=int(again.sum()), age=age)

    def logs(self) -> dict[str, dict[str, float]]:
        """Values for the log.

        `on_policy`, of this rank since the last log: fraction of generated samples among the examples and of replays
        among those, mean age of replays in steps; number of samples generated, their tokens, how many were empty or did
        not end, how many were generated in parallel, seconds of generation. `time_share`, of the run: fractions of the
        time by role.
        """
        t, self._tally = self._tally, {}
        own, replayed = t.get("own", 0), t.get("replayed", 0)
        found = {
            "fraction": self.fraction,
            "share": own / max(1, t.get("examples", 0)),
            "replayed": replayed / max(1, own),
            "replay_age": t.get("age", 0) / max(1, replayed),
            **{name: t.get(name, 0) for name in ("written", "tokens", "empty", "unended")},
            "in_flight": t.get("written", 0) / max(1, t.get("rounds", 0)),
            "seconds": round(t.get("seconds", 0.0), 3),
        }
        return {"on_policy": found, "time_share": self.meter.shares() if self.meter is not None else {}}

    def on_evaluate(self, metrics: Mapping[str, float]) -> None:
        """Receives the metrics of each evaluation; `adaptive` reads `nll`."""
        adaptive, loss = self.policy.adaptive, metrics.get("nll")
        if adaptive is None:
            return
        if loss is None:
            raise InputError(f"on_policy.adaptive reads nll and the task measures {', '.join(metrics)}: leave it out.")
        if self._judged is not None and loss >= self._judged + adaptive.tolerance:
            self.fraction = min(1.0, self.fraction + adaptive.by)
        self._judged = loss

    def state_dict(self) -> dict[str, Any]:
        """All state that the next update depends on."""
        texts = self._window.texts
        return {
            "window": [self._window.start, self._window.end],
            "places": torch.tensor([(*k, source) for k, (source, _) in texts.items()], dtype=torch.long).view(-1, 3),
            "texts": pack([text for _, text in texts.values()]),
            "buffer": pack(list(self.buffer)),
            "kept": pack(list(self.kept.values())),
            "generations": [generation for _, generation in self.kept],
            "fraction": self.fraction,
            "judged": self._judged,
            "tally": self._tally,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        places, texts = state["places"].tolist(), unpack(state["texts"])
        found = {(step, number): (source, t) for (step, number, source), t in zip(places, texts, strict=True)}
        start, end = state["window"]
        self._window = _Window(start, end, found)
        self.buffer.clear()
        self.buffer.extend(unpack(state["buffer"]))
        kept = zip(unpack(state["kept"]), state["generations"], strict=True)
        self.kept = {(text.id, generation): text for text, generation in kept}
        self.fraction, self._judged, self._tally = state["fraction"], state["judged"], dict(state["tally"])
        self._queue = []
