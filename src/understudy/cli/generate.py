"""`understudy generate`: generate completions of prompts, resumable."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from understudy.cli.options import Shard, finite, shard_of
from understudy.errors import InputError, nearest
from understudy.files import replacing
from understudy.generation import Limits, Prompt, Request, RequestLog, generate, source_from

EPILOG = (
    "Example: understudy generate prompts.jsonl --model my-llm --endpoint http://localhost:8000/v1 --draws 4 "
    "--token-budget 200000 --output completions.jsonl"
)
Budget = Annotated[
    int | None, typer.Option(min=1, help="Most tokens, prompts and completions, over all runs of this output.")
]


def generate_command(
    prompts: Annotated[
        Path, typer.Argument(help=".txt: a prompt a line; .jsonl: prompt or messages, and id; rows for --template.")
    ],
    model: Annotated[str, typer.Option(help="A folder, a Hub id, or the endpoint's name of it.")],
    endpoint: Annotated[str | None, typer.Option(help="Base URL of an OpenAI-compatible server.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Name of the environment variable that holds the key.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="A prompt with {{ slots }}, filled from a .jsonl or .csv.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Completions; the request log is next to it.")] = Path(
        "completions.jsonl"
    ),
    chat: Annotated[bool, typer.Option(help="Send text prompts as a user's message.")] = False,
    draws: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(callback=finite, min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(callback=finite, min=0, max=1)] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the text; may be repeated; \\n is a newline.")] = None,
    log_probs: Annotated[bool, typer.Option(help="Ask for summed log-probabilities.")] = False,
    concurrency: Annotated[int, typer.Option(min=1, max=1024)] = 8,
    rate: Annotated[float | None, typer.Option(callback=finite, help="Most attempts a second.")] = None,
    retries: Annotated[int, typer.Option(min=0)] = 8,
    timeout: Annotated[
        float, typer.Option(callback=finite, help="Seconds until an unanswered request counts as failed.")
    ] = 120.0,
    token_budget: Budget = None,
    cost_budget: Annotated[float | None, typer.Option(callback=finite, help="Most money, by the two prices.")] = None,
    price_in: Annotated[float, typer.Option(callback=finite, min=0, help="Price of a million prompt tokens.")] = 0.0,
    price_out: Annotated[float, typer.Option(callback=finite, min=0, help="Price of a million written tokens.")] = 0.0,
    shard: Shard = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Generate completions of prompts. Started again, it resumes, and no completion is paid for twice."""
    stops = tuple(s.replace("\\n", "\n") for s in stop or ())
    shape = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p, stop=stops, log_probs=log_probs)
    budgets = dict(token_budget=token_budget, cost_budget=cost_budget, price_in=price_in, price_out=price_out)
    limits = dict(concurrency=concurrency, rate=rate, retries=retries, **budgets)
    if endpoint is None and api_key_env is not None:
        raise InputError(
            "--api-key-env names the key of a server, and no --endpoint is given. Add it, or leave both out."
        )
    served = dict(url=endpoint, api_key_env=api_key_env, timeout=timeout) if endpoint else None
    part, parts = shard_of(shard)
    requests = read_requests(prompts, template, chat, draws, shape)
    if parts > 1:
        _refuse_other_parts(output, requests, part, parts)
        requests = requests[part::parts]
    facts = _carry_out(requests, {"model": model, "endpoint": served}, limits, output, progress=not as_json)
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=1) + "\n")
        return
    cost = f", cost {facts['cost']:g}" if price_in or price_out else ""
    sys.stdout.write(
        f"{facts['answered']} completions in {output} ({facts['from_log']} from the log); the log holds "
        f"{facts['prompt_tokens']} prompt tokens and {facts['tokens']} written ones{cost}.\n"
    )


def _refuse_other_parts(output: Path, requests: Sequence[Request], part: int, parts: int) -> None:
    """Refuse to replace completions of other parts: the output would hold only the last part that was run."""
    own = {request.id for request in requests[part::parts]}
    others = {request.id for request in requests} - own
    held: set[str] = set()
    with suppress(OSError, ValueError, TypeError, KeyError):  # no output yet, or one that is no file of completions
        held = {json.loads(line)["id"] for line in output.read_text(encoding="utf-8").split("\n") if line}
    if held & others:
        raise InputError(
            f"Output {output} holds completions of other parts than {part + 1}/{parts}, which this part would replace: give "
            f"each part its own, such as --output {output.stem}-{part + 1}-of-{parts}{output.suffix}, and join them."
        )


def _carry_out(
    requests: list[Request], spec: dict[str, Any], limits: dict[str, Any], output: Path, progress: bool
) -> dict[str, Any]:
    """Generate, write the completions received so far, also after an error, and count."""
    from understudy.runs.recipe import validated
    from understudy.runs.specs import ModelSpec

    bounds: Limits = validated(Limits, limits, "limit")
    output = output.resolve()  # a link stays one
    beside = output.with_name(output.name + ".log")
    if output.exists() and not output.is_file():
        raise InputError(f"Output {output} is no regular file. Choose another --output.")
    if output.exists() and not beside.exists():
        raise InputError(
            f"Output {output} is there already and no request log is next to it ({beside.name}): it was not written here "
            "and is left alone. Choose another --output."
        )
    source = source_from(validated(ModelSpec, spec, "model"), batch=bounds.concurrency)
    with RequestLog(beside, source.name) as log:
        before = sum(log.key(r) in log for r in requests)
        try:
            generate(source, requests, log, progress=progress, **limits)
        finally:
            answered = _write(output, requests, log)
        return {
            "output": str(output),
            "requests": len(requests),
            "answered": answered,
            "from_log": before,
            "prompt_tokens": log.prompt_tokens,
            "tokens": log.tokens,
            "cost": round(bounds.cost(log.prompt_tokens, log.tokens), 6),
        }


def read_requests(path: Path, template: Path | None, chat: bool, draws: int, shape: dict[str, Any]) -> list[Request]:
    """The requests of a file of prompts, or of a table and a template; ids are those of the file, or line numbers."""
    prompt = Prompt.load(template) if template is not None else None
    requests: list[Request] = []
    seen: set[str] = set()
    for number, row in _rows(path):
        name = str(row.get("id", number))
        if name in seen:
            raise InputError(f"{path}, row {number}: id {name!r} stands there twice. Give each row its own, or none.")
        seen.add(name)
        if prompt is not None:
            missing = sorted(prompt.slots - set(row))
            if missing:
                raise InputError(
                    f"{path}, row {number}: prompt {prompt.name} needs slot {missing[0]!r} and the columns are "
                    f"{', '.join(map(str, row)) or 'none'}.{nearest(missing[0], map(str, row))}"
                )
            content: Any = prompt.render({k: row[k] for k in prompt.slots})
        else:
            content = _content(path, number, row)
        if isinstance(content, str) and chat:
            content = ({"role": "user", "content": content},)
        for draw in range(draws):
            requests.append(Request(content, f"{name}/{draw}" if draws > 1 else name, draw=draw, **shape))
    if not requests:
        raise InputError(f"{path} holds no prompts.")
    return requests


def _content(path: Path, number: int, row: dict[str, Any]) -> Any:
    value = row.get("prompt", row.get("messages"))
    if isinstance(value, str) and value:
        return value
    whole = lambda m: isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))  # noqa: E731
    if isinstance(value, list) and value and all(map(whole, value)):
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    columns = ", ".join(map(str, row)) or "none"
    raise InputError(
        f"{path}, row {number}: no prompt (text) and no messages (role, content) in its columns ({columns})."
        f"{nearest('prompt', row)} Slots of a prompt need --template."
    )


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise InputError(f"Prompts {path} do not exist. Give a .txt, .jsonl or .csv file.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), start=1)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            row = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line.rstrip("\r")}
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: a row is {type(row).__name__}, not an object with columns.")
            yield number, row
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None


def _write(output: Path, requests: Sequence[Request], log: RequestLog) -> int:
    """Write one completion per line as prompt and completion columns that training reads; the file is replaced when
    complete."""
    count = 0
    with replacing(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for request in requests:
            completion = log.get(log.key(request))
            if completion is None:
                continue
            chat = not isinstance(request.prompt, str)
            said = [{"role": "assistant", "content": completion.text}] if chat else completion.text
            line = {
                "id": request.id,
                "prompt": request.prompt,
                "completion": said,
                "finish": completion.finish,
                "log_prob": completion.log_prob,
                "prompt_tokens": completion.prompt_tokens,
                "tokens": completion.tokens,
            }
            file.write(json.dumps(line) + "\n")
            count += 1
    return count
