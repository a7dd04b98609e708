"""A teacher with another tokenizer: it runs on the same text in its own tokens; its outputs become targets for the
student's.

Both token sequences are mapped to the bytes of the text and split into the smallest groups that cover the same bytes
(`alignment`). The target of a student row depends on its group:

- **One token to one, with the same bytes.** Both models have read the same text and continue with the same piece of it.
The
  target is the teacher's distribution over the tokens that both vocabularies have, byte for byte: the `support` most
  probable of them and the actual next token, with their probabilities; a bucket holds the rest of the mass. Nothing is
  renormalised. Biased where a tokenizer would split the same text differently: P("the") is that of the token, not of
  the bytes.
- **Any other group** of m teacher tokens and n student tokens. The teacher's probability of the group's text by the
chain
  rule, P = Π p(token | before), is preserved: each of the n rows gets two buckets, *the actual next token* with
  probability P^(1/n) and *any other*. A student that matches all n targets gives the text the probability P
  (approximate likelihood matching, Minixhofer et al. 2025, makes the same statement about the group; GOLD of TRL merges
  its probabilities the same way). How P is divided inside the group is a convention: there is no target for other
  tokens, and P leaves out other tokenizations of the text, so it is a lower bound.
- **No group**: before the teacher's first token, unknown tokens, a character cut off at the end of a row, special
tokens
  that the teacher does not have, text beyond the teacher's limit. The row has no target (all mass in the bucket: no
  loss and no gradient) and is still counted; only its label is learned, by cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from understudy.data import IGNORE, Batch, collate_text
from understudy.errors import InputError
from understudy.models import ModelAdapter, ModelOutput
from understudy.streaming import logits_of
from understudy.targets import TopK
from understudy.teachers.alignment import Aligned, Aligner

TILE = 512
"""Number of teacher rows whose distribution over the whole vocabulary is in memory at a time."""
KEPT = 50_000
"""Number of aligned rows in the cache."""


@dataclass
class _Plan:
    """Which rows of the teacher give the targets of which rows of the student; all `[n]`, int64.

    `direct`: student row, teacher row of one-to-one groups. `spread`: student row, group. `parts`: teacher row, group.
    """

    batch: Batch
    direct: Tensor
    spread: Tensor
    parts: Tensor
    lengths: Tensor


class OtherTokenizer(ModelAdapter):
    """Targets for the rows of the student's tokens, from a model with other tokens.

    Args:
        model: of the teacher, over its own vocabulary.
        aligner: from the student's tokenizer to the teacher's.
        support: number of shared tokens that a one-to-one row keeps beside the bucket.
        limit: longest sequence of the model in tokens; `None` for no limit.
    """

    def __init__(self, model: ModelAdapter, aligner: Aligner, support: int = 64, limit: int | None = None) -> None:
        super().__init__()
        self.model, self.aligner, self.limit = model, aligner, limit
        mine, theirs = zip(*sorted(aligner.partner.items()), strict=True) if aligner.partner else ((), ())
        self.support = min(support, len(mine))
        if not mine:
            raise InputError("Teacher and student have no token in common: their tokenizers cannot be aligned.")
        self.register_buffer("mine", torch.tensor(mine))
        self.register_buffer("theirs", torch.tensor(theirs))
        self._known: dict[bytes, Aligned] = {}

    mine: Tensor
    theirs: Tensor

    def answer(self, batch: Batch, features: bool) -> ModelOutput:
        """`TopK` over the student's tokens at temperature 1, `support` classes wide, padded with −1."""
        if features:
            raise InputError(
                "A teacher with another tokenizer has no features for the student's tokens: choose a method that learns "
                "from outputs, or a teacher of the student's tokenizer."
            )
        device, labels = batch.labels.device, batch.row_labels
        ids = torch.full((batch.num_items, self.support), -1, device=device)
        log_probs = torch.full((batch.num_items, self.support), -torch.inf, device=device)
        log_tail = torch.zeros(batch.num_items, 1, device=device)
        plan = self._plan(batch)
        if plan is None:
            return ModelOutput(TopK(ids, log_probs, log_tail))
        with torch.no_grad():
            self._tell(plan, labels, ids, log_probs, log_tail)
        return ModelOutput(TopK(ids, log_probs, log_tail))

    def _tell(self, plan: _Plan, labels: Tensor, ids: Tensor, log_probs: Tensor, log_tail: Tensor) -> None:
        """Write the targets, one tile of the teacher's rows after another."""
        signal, theirs = self.model(plan.batch).signal, plan.batch.row_labels
        said = theirs.new_zeros(len(theirs), dtype=torch.float32)
        for start in range(0, len(theirs), TILE):
            part = slice(start, start + TILE)
            log_p = torch.log_softmax(logits_of(signal.select(part)).float(), -1)
            said[part] = log_p.gather(-1, theirs[part, None])[:, 0]
            here = (plan.direct[1] >= start) & (plan.direct[1] < start + TILE)
            rows, log_p = plan.direct[0, here], log_p[plan.direct[1, here] - start]
            column = torch.searchsorted(self.mine, labels[rows])[:, None]
            chosen = log_p[:, self.theirs].scatter(-1, column, torch.inf).topk(self.support, -1).indices
            at = self.theirs[chosen]
            ids[rows], log_probs[rows] = self.mine[chosen], log_p.gather(-1, at)
            log_tail[rows] = log_p.scatter(-1, at, -torch.inf).logsumexp(-1, keepdim=True)
        total = said.new_zeros(len(plan.lengths)).index_add(0, plan.parts[1], said[plan.parts[0]])
        rows, group = plan.spread
        share = (total / plan.lengths)[group].clamp(max=0.0)
        ids[rows, 0], log_probs[rows, 0] = labels[rows], share
        log_tail[rows, 0] = (-torch.expm1(share.double())).log().float()

    def _plan(self, batch: Batch) -> _Plan | None:
        """The teacher's batch of these texts and the use of its rows; `None` if no row has a group."""
        lengths = batch.inputs["attention_mask"].sum(-1).tolist()
        numbers = torch.full_like(batch.labels, -1)
        numbers[:, 1:][batch.mask] = torch.arange(batch.num_items, device=batch.labels.device)
        items, direct, spread, parts = [], [], [], []
        sizes: list[int] = []
        for row, (ids, length) in enumerate(zip(batch.inputs["input_ids"].tolist(), lengths, strict=True)):
            found, number = self._aligned(ids[:length]), numbers[row].tolist()
            read = found.ids[: self.limit]
            wanted = torch.full((max(1, len(read)),), IGNORE)
            for group in found.groups:
                counted = [number[s] for s in range(group.start, group.stop) if number[s] >= 0]
                if not counted or not 0 < group.other_start < group.other_stop <= len(read):
                    continue
                where = [(row, t) for t in range(group.other_start, group.other_stop)]
                for _, t in where:
                    wanted[t] = read[t]
                if group.single and self.aligner.partner.get(ids[group.start]) == read[group.other_start]:
                    direct.append((counted[0], where[0]))
                    continue
                parts += [(place, len(sizes)) for place in where]
                spread += [(n, len(sizes)) for n in counted]
                sizes.append(group.stop - group.start)
            items.append({"input_ids": torch.tensor(read or [0]), "labels": wanted, "id": row, "bytes": 0})
        if not direct and not spread:
            return None
        device = batch.labels.device
        made = Batch.from_dict(collate_text(items)).to(device)
        order = torch.zeros_like(made.labels)
        order[:, 1:][made.mask] = torch.arange(made.num_items, device=device)
        return _Plan(
            made,
            _columns([(n, int(order[place])) for n, place in direct], device),
            _columns(spread, device),
            _columns([(int(order[place]), g) for place, g in parts], device),
            torch.tensor(sizes, device=device),
        )

    def _aligned(self, ids: list[int]) -> Aligned:
        key = torch.tensor(ids).numpy().tobytes()
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[key] = self.aligner.align(ids)
        return self._known[key]


def _columns(pairs: list[tuple[int, int]], device: Any) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).T
