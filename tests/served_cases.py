"""A small trained teacher behind a server, its recipe, and a process that asks for scores and can be killed."""

import torch

from engine_cases import TEXT
from fault_server import KEY_ENV
from understudy import distill
from understudy.data import Batch, load_text, train_tokenizer
from understudy.fitting import served
from understudy.models import load_causal_lm, load_tokenizer
from understudy.recipe import make
from understudy.tasks import get as get_task

DATA = {**TEXT["data"], "characters": 30_000, "limit": 4}
QUICK = {"backoff": 0.001, "longest_backoff": 0.01, "retries": 30, "timeout": 5.0}


def trained(folder, steps=60):
    """A teacher's folder, with tokenizer."""
    teacher = {"model": "llama:hidden=32,layers=1,heads=2"}
    trainer = {**TEXT["trainer"], "max_steps": steps, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    distill({**TEXT, "data": DATA, "method": "sft", "teacher": None, "student": teacher, "trainer": trainer, "output": str(folder)})
    return folder / "student"


def untrained(folder):
    """A teacher's folder, with tokenizer: random weights, larger than usual so that it has opinions."""
    words = train_tokenizer(load_text({k: v for k, v in DATA.items() if k in ("name", "characters", "limit")}).texts(), 300)
    torch.manual_seed(0)
    model = load_causal_lm("llama:hidden=32,layers=1,heads=2", tokenizer=words)
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
    values = {**TEXT, "data": DATA, "method": "kd", "options": {"temperature": 1.0}, "output": str(output), "teacher": teacher}
    return {**values, **changes}


def opened(values, folder, student=None, number=None):
    """The served teacher of a recipe, and its training examples (the first `number`) as one batch."""
    made = make(values)
    prepared = get_task(made.task).prepare(made)
    examples = [prepared.train[i] for i in range(number or len(prepared.train))]
    return served(made, prepared, folder, student), Batch.from_dict(prepared.collate(examples))


def asking(values, folder):
    """Ask for the scores of all training examples; runs in a process that a test kills."""
    torch.set_num_threads(1)
    teacher, everything = opened(values, folder)
    teacher.rows(everything)
