"""Progress on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from updp_tf.walking import Progress as Callback


@contextmanager
def shown(verbose: bool) -> Iterator[Callback | None]:
    """Give a progress callback that draws a bar with the time left; None where nothing is to be shown.

    A bar starts again when the count does: each stage has its own.
    """
    if not verbose:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def report(done: int, total: int, what: str) -> None:
            if done <= 1:
                bar.reset(task, total=total)
            bar.update(task, completed=done, total=total, description=what)

        yield report
