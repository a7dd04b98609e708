"""Sample texts of a language model beside the references, as a table for the report."""

from __future__ import annotations

from typing import Any

import torch

from understudy.data.samples import prompt_length
from understudy.generation.decoding import begin, read_by, without_routers
from understudy.models import ModelAdapter, evaluating
from understudy.models.positions import positions

PROMPT, WRITTEN = 64, 40
"""Most tokens shown of a prompt, and most tokens generated after it."""


@torch.no_grad()
def sample_texts(
    student: ModelAdapter, teacher: ModelAdapter | None, examples: Any, tokenizer: Any, number: int = 4
) -> dict[str, Any] | None:
    """A table of greedy completions of a split's first prompts; `None` if the student cannot generate, or the prompts are
    about images (their task shows its own).

    Args:
        teacher: its completions are added if it can generate too.
        examples: token rows, or lists of candidates, the best of which is the reference.
    """
    if len(examples) and "pictures" in examples[0]:
        return None
    sides = {"student": student} | ({"teacher": teacher} if teacher is not None else {})
    writers = {n: s for n, s in sides.items() if getattr(getattr(s, "model", None), "can_generate", lambda: False)()}
    if "student" not in writers:
        return None
    most = min(filter(None, (positions(side.model) for side in writers.values())), default=PROMPT + WRITTEN)
    new = min(WRITTEN, most // 2)
    asked, wanted = [], []
    for row in (examples[i] for i in range(min(number, len(examples)))):
        ids, labels = _tokens(row)
        start = prompt_length(labels, 0.5, 0.5)
        asked.append(ids[max(0, start - min(PROMPT, most - new)) : start])
        wanted.append(ids[start : start + new])
    found = {name: _written(side, asked, tokenizer, new) for name, side in writers.items()}
    read = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in part] for part in (asked, wanted)]
    return {
        "title": "Sample texts, greedy",
        "headings": ["prompt (its end)", "in the data", *found],
        "rows": [list(row) for row in zip(*read, *found.values(), strict=True)],
    }


def _tokens(row: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if "sequences" in row:
        return row["sequences"][max(range(len(row["scores"])), key=lambda i: row["scores"][i])]
    return row["input_ids"], row["labels"]


def _written(side: ModelAdapter, prompts: list[torch.Tensor], tokenizer: Any, new: int) -> list[str]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    home, told = next(side.parameters()).device, [read_by(side.model, prompt.tolist()) for prompt in prompts]
    width = max(map(len, told))
    ids, mask = (torch.full((len(prompts), width), value) for value in (pad, 0))
    for row, prompt in enumerate(told):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    with evaluating(side):
        out = side.model.generate(  # type: ignore[operator, union-attr]
            input_ids=ids.to(home),
            attention_mask=mask.to(home),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=pad,
            **without_routers(side.model),
        )
    return [tokenizer.decode(text, skip_special_tokens=True) for text in out[:, begin(side.model, told) :].tolist()]
