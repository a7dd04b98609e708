"""A plan as text tables, for the terminal and for pages."""

from __future__ import annotations

from understudy.planning.plan import Plan

Body = list[tuple[str, ...]]
Lines = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def size(number: float) -> str:
    """Format a number of bytes."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"


def count(number: float) -> str:
    """Format a number of parameters, operations or rows."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes, hours or days."""
    for unit, scale in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:,.3g} s"


def _passes(number: float | None) -> str:
    return "–" if number is None else f"{number:.2f}"


def lines(plan: Plan) -> list[Lines]:
    """Tables: title, head and rows."""
    where = f"{plan.gpus} × {plan.machine.name}" if plan.gpus > 1 else plan.machine.name
    sharded = {"none": "", "student": ", student sharded", "both": ", both sides sharded"}[plan.shard]
    sides: Body = [
        (n, count(s.parameters), count(s.active), count(s.trained), size(s.weights)) for n, s in plan.sides.items()
    ]
    memory: Body = [(name, size(value)) for name, value in plan.memory.items() if value]
    memory += [(f"**{name}**", f"**{size(value)}**") for name, value in plan.phases.items()]
    work: Body = [
        (role, count(w["flops"]), count(w["attention"]), size(w["bytes"]), duration(w["seconds"]))
        for role, w in plan.work.items()
    ]
    flops = sum(w["flops"] for w in plan.work.values())
    total = (f"floor {duration(plan.floor_seconds)}, {plan.percent_of_floor:.0f} % of it", duration(plan.step_seconds))
    work.append(("**step**", f"**{count(flops)}**", "", total[0], f"**{total[1]}**"))
    run: Body = [
        ("steps", f"{plan.steps:,}"),
        (plan.unit, count(plan.rows)),
        ("time", duration(plan.steps * plan.step_seconds)),
        ("device hours", f"{plan.device_hours:,.3g}"),
    ]
    if plan.speed_up is not None:
        run.append(("a step with a cached teacher", f"{plan.speed_up:.2f} × as fast"))
    found: list[Lines] = [
        ("Models", ("side", "parameters", "active", "trained", "weights"), sides),
        (f"Memory of each device ({where}{sharded})", ("component", "bytes"), memory),
        ("One optimizer step of a device", ("role", "operations", "of them attention", "bytes moved", "time"), work),
        ("The run", ("", ""), run),
    ]
    if plan.cache:
        body: Body = [
            (n, f"{c['bytes_per_row']:,.0f}", size(c["bytes"] or 0), _passes(c["pays_after_passes"]))
            for n, c in plan.cache.items()
        ]
        head = ("support", f"bytes of one of the {plan.unit}", "on disk", "cheaper from so many passes")
        found.append(("The teacher's answers as a cache", head, body))
    return found


def markdown(plan: Plan) -> str:
    """The tables as Markdown, with the verdict."""
    text = []
    for title, head, body in lines(plan):
        rows = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *body)]
        text.append(f"**{title}**\n\n" + "\n".join(rows))
    return "\n\n".join([*text, plan.verdict, *plan.notes])
