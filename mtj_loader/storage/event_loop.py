"""An event loop in its own thread, for code that waits for many responses at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads; starts with the first one and ends with `close`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts a coroutine; cancelling the future cancels the coroutine."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                # A daemon: a storage that was not closed must not keep the process alive.
                name = "mtj_loader objects"
                self._thread = threading.Thread(
                    target=_run, args=(self._loop,), name=name, daemon=True
                )
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Waits for a coroutine's result; Ctrl-C cancels it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # a kept error's frames must not hold the connection

    def close(self) -> None:
        """Cancels all coroutines and ends the thread; a later `submit` starts a new one."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results; the first error cancels the other coroutines."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        await _cancel(tasks)
        raise


async def call_in_thread(call: Callable[[], T]) -> T:
    """Waits for a blocking call in a thread of its own.

    If this coroutine is cancelled, nothing waits for the call, not even the end of the process;
    threads of `asyncio.to_thread` would delay both.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    threading.Thread(target=_call, args=(call, future), daemon=True).start()
    try:
        return await asyncio.wrap_future(future)
    finally:
        del future  # see LoopThread.run


def _call(call: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001 -- raised where the future is awaited
        future.set_exception(error)
    finally:
        del future  # see LoopThread.run


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """Runs until the loop is stopped, then cancels the remaining tasks."""
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel(asyncio.all_tasks(loop)))
    finally:
        loop.close()


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
