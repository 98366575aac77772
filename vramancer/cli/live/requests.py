"""The third page: requests, one of which is selected; below them the tasks."""

from __future__ import annotations

from rich.text import Text

from vramancer.cli.live.canvas import TITLE, Canvas, Column, Flexible
from vramancer.cli.live.parts import request_columns, task_lines
from vramancer.cli.live.watch import Seen

SELECTED = "reverse"


def requests_page(seen: Seen, canvas: Canvas, selected: str | None) -> tuple[list[Text], int]:
    """Its lines, and which of them has the selected request."""
    queue = seen.look.queue
    lines = [
        canvas.beside(
            [
                Text.assemble(
                    ("Requests", TITLE), f"  {queue.running} running, {queue.waiting} waiting of {queue.limit}"
                ),
                Text("c: cancel", "dim"),
            ]
        )
    ]
    selected_line = 0
    if queue.requests:
        marks = [Text(">" if request.id == selected else " ") for request in queue.requests]
        columns: list[Column | Flexible] = [Column("", marks), *request_columns(queue.requests, canvas, "id")]
        lines.append(Text())
        for row, line in enumerate(canvas.columns(columns)):
            if row and queue.requests[row - 1].id == selected:
                line.stylize(SELECTED)
                selected_line = len(lines)
            lines.append(line)
    missing = queue.unfinished - len(queue.requests)
    if missing > 0:
        lines.append(Text(f"and {missing} more, which came later", "dim"))
    return [*lines, *_tasks(seen, canvas)], selected_line


def _tasks(seen: Seen, canvas: Canvas) -> list[Text]:
    tasks = seen.look.tasks
    if tasks is None:
        return []
    lines = task_lines([*tasks.running, *tasks.recent], canvas)
    return [Text(), Text("Tasks", TITLE) if lines else Text.assemble(("Tasks", TITLE), "  none yet"), *lines]
