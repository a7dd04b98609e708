"""A small trained teacher behind a server, its recipe, and a process that asks for scores and can be killed."""

import torch

from engine_cases import TEXT
from fault_server import KEY_ENV
from understudy.data import Batch, load_text, train_tokenizer
from understudy.generation import Endpoint
from understudy.models import load_causal_lm, load_tokenizer
from understudy.runs.recipe import make
from understudy.runs.teachers import served
from understudy.tasks import get as get_task
from understudy.teachers import ServedTeacher
from understudy.teachers.server.scores import Score

DATA = {**TEXT["data"], "characters": 30_000, "limit": 4}
QUICK = {"backoff": 0.001, "longest_backoff": 0.01, "retries": 30, "timeout": 5.0}


def made(folder, steps=0):
    """A teacher's folder, with tokenizer: so many steps on the text, or random weights with opinions."""
    texts = load_text({k: v for k, v in DATA.items() if k in ("name", "characters", "limit")}).texts()
    words = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    model = load_causal_lm("llama:hidden=32,layers=1,heads=2", tokenizer=words)
    tokens = torch.tensor([i for text in texts for i in words(text)["input_ids"]])
    rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        some = rows[torch.randint(len(rows), (8,))]
        model(input_ids=some, labels=some).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not steps:
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(4)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sides(folder):
    """Model and tokenizer of a folder."""
    tokenizer = load_tokenizer(str(folder))
    return load_causal_lm(folder, tokenizer=tokenizer), tokenizer


def recipe(folder, url, score="top_k:20", output="unused", *, key=False, endpoint=None, **changes):
    """A recipe whose teacher is behind a server."""
    at = {"url": url, **QUICK, **({"api_key_env": KEY_ENV} if key else {}), **(endpoint or {})}
    teacher = {"model": "toy", "tokenizer": str(folder), "endpoint": at, "score": score}
    values = {
        **TEXT,
        "data": DATA,
        "method": "kd",
        "options": {"temperature": 1.0},
        "output": str(output),
        "teacher": teacher,
    }
    return {**values, **changes}


def opened(values, folder, student=None, number=None):
    """The served teacher of a recipe, and its training examples (the first `number`) as one batch."""
    asked = make(values)
    prepared = get_task(asked.task).prepare(asked)
    examples = [prepared.train[i] for i in range(number or len(prepared.train))]
    return served(asked, prepared, folder, student), Batch.from_dict(prepared.collate(examples))


def asking(url, home, folder, batch, endpoint):
    """Ask for the scores of a batch; runs in a process that a test kills."""
    torch.set_num_threads(1)
    words = load_tokenizer(str(home))
    at = Endpoint(url=url, **QUICK, **endpoint)
    ServedTeacher("toy", at, Score("top_k", 20), folder, {"classes": len(words)}, words)(batch)
