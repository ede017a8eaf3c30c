"""Progress over many images: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function that is told of more images: a bar on a terminal, else a line now and then."""
    start = last = time.monotonic()
    first = done

    def rate() -> str:
        return f"{(done - first) / max(time.monotonic() - start, 1e-9):.0f} img/s"

    if sys.stdout.isatty():
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with Progress(TextColumn("[bold]images"), *columns) as bar:
            task = bar.add_task("embed", total=total, completed=done, rate="")

            def advance(images: int) -> None:
                nonlocal done
                done += images
                bar.update(task, completed=done, rate=rate())

            yield advance
        return

    def line(images: int) -> None:
        nonlocal done, last
        done += images
        if done == total or time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            print(f"{done:,} of {total:,} images  {rate()}", flush=True)

    yield line
