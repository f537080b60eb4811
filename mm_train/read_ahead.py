"""Work done ahead of its need by threads, handed out in the order in which it is asked for."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class ReadAhead(Generic[Key, Made]):
    """Calls `make(key)` on `workers` threads for the keys that are needed now and soon.

    Results go by their keys, so neither the number of threads nor their pace can change what comes out. What was made
    for keys that are no longer wanted, because the caller went elsewhere, is thrown away.
    """

    def __init__(self, make: Callable[[Key], Made], workers: int) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="read-ahead")
        self._futures: dict[Key, Future[Made]] = {}

    def take(self, now: Sequence[Key], soon: Iterable[Key] = ()) -> Iterator[Made]:
        """Results for the keys `now`, in their order; those for `soon` are begun and kept for the next call.

        At most len(now) + len(soon) results exist at a time. An error of `make` is raised in place of its result.
        """
        wanted = dict.fromkeys([*now, *soon])
        for key in [key for key in self._futures if key not in wanted]:
            self._futures.pop(key).cancel()
        for key in wanted:
            if key not in self._futures:
                self._futures[key] = self._pool.submit(self._make, key)
        for key in now:
            yield self._futures.pop(key).result()

    def forget(self) -> None:
        """Throw away what was made and not asked for: `make` is going to answer otherwise."""
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def close(self) -> None:
        """End the threads; waits for what they have begun."""
        self.forget()
        self._pool.shutdown()
