"""Processes and threads that work through what there is, holding little of it at a time."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Literal, TypeVar

from latentdiff.errors import InputError

START: Literal["spawn", "fork"] = "spawn"
"""How processes begin: fork is for tests, and for nobody who has threads."""

T = TypeVar("T")
R = TypeVar("R")


def in_turn(pool: Executor, work: Callable[[T], R], items: Iterable[T], limit: int) -> Iterator[R]:
    """Results as they come, with at most `limit` begun and not yet taken: they hold pictures."""
    done: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
    begun = 0
    for item in items:
        if begun == limit:
            yield done.get().result()
            begun -= 1
        pool.submit(work, item).add_done_callback(done.put)
        begun += 1
    for _ in range(begun):
        yield done.get().result()


def in_processes(processes: int, work: Callable[[T], tuple[bool, T]], items: Iterable[T]) -> None:
    """All items, those whose work says False once more, by so many processes.

    img2dataset's own pool waits forever for the shard of a process that was killed. Raises
    InputError where one was.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context(START), initializer=_end_with_parent
    )
    try:
        for _ in range(2):
            results = in_turn(pool, work, items, limit=2 * processes)
            items = [item for well, item in results if not well]
    except BrokenProcessPool:
        raise InputError(
            "A process that downloads was ended from outside, perhaps for want of memory; run the "
            "step again to go on, with fewer processes or threads if it happens again."
        ) from None
    finally:
        # None has work to lose, and one killed now would keep the others from their last message.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Workers of a process that was killed would write beside those of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_await_end, args=(parent,), daemon=True).start()


def _await_end(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
