"""What pipelines ask of models in conversations: answers, ratings, and simulated customers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from understudy.curation.strategies import rating, transcript
from understudy.errors import InputError
from understudy.generation import Prompt, Request
from understudy.training.pipeline import PipelineContext

Messages = Sequence[Mapping[str, str]]


def asked(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


@dataclass(frozen=True)
class Dialogue:
    """Asks the models of a pipeline in chats, through its request logs.

    Args:
        context: of the pipeline. judge_prompt: template with the slots `conversation` and `answer`.
        customer_prompt: with `conversation` and `persona`. max_tokens, temperature: of every text.
        tries: judgements until one is a number.
    """

    context: PipelineContext
    judge_prompt: Prompt
    customer_prompt: Prompt
    max_tokens: int = 256
    temperature: float = 0.0
    tries: int = 3

    def say(self, role: str, conversations: Sequence[Messages], place: str, draw: int = 0) -> list[str]:
        """What the model in a role says next in each conversation.

        Args:
            place: begins the ids of the requests. draw: another number asks for another answer to the same conversation.
        """
        how: Any = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        place = f"{self.context.prefix}{place}/{role}"
        requests = [Request(tuple(m), f"{place}/{i}", draw, **how) for i, m in enumerate(conversations)]
        return [answer.text for answer in self.context.ask(role, requests)]

    def rate(self, conversations: Sequence[Messages], answers: Sequence[str], place: str) -> list[float | None]:
        """The judge's ratings from 1 to 10 of the answers. What is no such number is asked for again, sampled and no longer
        greedy, and `None` after `tries`.

        Raises:
            InputError: no judgement of all is a number.
        """
        scores: list[float | None] = [None] * len(answers)
        pairs = zip(conversations, answers, strict=True)
        texts = [self.judge_prompt.render(conversation=transcript(c), answer=answer) for c, answer in pairs]
        last = ""
        for draw in range(self.tries):
            left = [i for i, score in enumerate(scores) if score is None]
            again = replace(self, temperature=float(draw > 0))
            replies = again.say("judge", [asked(texts[i]) for i in left], f"{place}/{draw}", draw)
            for i, reply in zip(left, replies, strict=True):
                scores[i], last = rating(reply), reply
        if answers and all(score is None for score in scores):
            raise InputError(
                f"None of {len(answers)} judgements is one number from 1 to 10 (the last: {last[:60]!r}): mend "
                "options.judge_prompt, or name another model as roles.judge."
            )
        return scores

    def simulate(
        self,
        starts: Sequence[Messages],
        personas: Sequence[str],
        prompts: Callable[[Sequence[Messages]], Sequence[Messages]],
        turns: int,
    ) -> list[tuple[list[dict[str, str]], str]]:
        """Every turn of the student in conversations with simulated customers: the conversation so far, and its answer.

        Args:
            starts: end with the customer's first message. personas: who each customer is.
            prompts: what the student is given for conversations. turns: of the student in each.

        Returns:
            `turns * len(starts)` pairs, all first turns first.
        """
        found, talks = [], [[dict(m) for m in start] for start in starts]
        for turn in range(turns):
            answers = self.say("student", prompts(talks), f"turn-{turn}")
            found += [([*talk], answer) for talk, answer in zip(talks, answers, strict=True)]
            for talk, answer in zip(talks, answers, strict=True):
                talk.append({"role": "assistant", "content": answer})
            if turn + 1 < turns:
                pairs = zip(personas, talks, strict=True)
                texts = [self.customer_prompt.render(persona=p, conversation=transcript(talk)) for p, talk in pairs]
                replies = self.say("customer", [asked(text) for text in texts], f"turn-{turn}")
                for talk, reply in zip(talks, replies, strict=True):
                    talk.append({"role": "user", "content": reply})
        return found
