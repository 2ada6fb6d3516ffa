"""Work over foreign text in a process of its own, which gets only so much time and memory.

A chat template and a tokenizer's patterns are programs of whoever made the model: a few bytes of them can run for ever
or fill the memory, and native code cannot be interrupted from within. The process is forked, so that it has the model's
tokenizer and the text without reading them anew; it starts in milliseconds and answers as often as it is asked.
"""

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Self, TypeVar
from weakref import finalize

from spike_export.artifacts.closing import Closing

Request = TypeVar("Request")
Answer = TypeVar("Answer")

_MEBI = 1 << 20

_PATIENCE = 20
"""Times the processor seconds after which a process is ended that has not used them: the machine may be busy."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the answer to one request may take.

    Attributes:
        seconds: Of processor time.
        memory: Bytes beyond those that the process has when it starts.
    """

    seconds: int = 10
    memory: int = 1 << 30


class BudgetError(Exception):
    """The work exceeded its budget, or its process died of a fault in native code; the message says which."""


class BoundedProcess(Closing, Generic[Request, Answer]):
    """A function in a forked process.

    What the function raises is raised here. After a `BudgetError` the next request starts a new process. Where the
    system cannot fork, the function runs in this process, without limits.
    """

    def __init__(self, work: Callable[[Request], Answer], budget: Budget = Budget()) -> None:
        self._work, self._budget = work, budget
        self._asking = threading.Lock()
        self._child: _Child | None = None

    def ask(self, request: Request) -> Answer:
        """Return the function's answer to one request; requests of several threads wait for each other.

        Raises:
            BudgetError: The process took more than its budget, or died.
        """
        if not hasattr(os, "fork"):
            return self._work(request)
        with self._asking:
            try:
                answered, value = self._started().answer(request)
            except BaseException:  # an interrupt, too, leaves an answer behind that nobody has read
                self.close()
                raise
        if not answered:
            if isinstance(value, BudgetError):
                self.close()
            raise value
        result: Answer = value
        return result

    def start(self) -> Self:
        """Fork now, while this process has few threads and little memory, and not at the first request."""
        if hasattr(os, "fork"):
            self._started()
        return self

    def _started(self) -> "_Child":
        self._child = self._child or _Child.start(self._work, self._budget)
        return self._child

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.end()
        self._child = None


def within_budget(work: Callable[[], Answer], budget: Budget = Budget()) -> Answer:
    """Return what `work` returns, from a process of its own that ends then.

    Raises:
        BudgetError: The process took more than its budget, or died.
    """
    with BoundedProcess[None, Answer](lambda _: work(), budget) as process:
        return process.ask(None)


class _Child:
    """The process, seen from its parent."""

    def __init__(self, pid: int, connection: Connection, budget: Budget) -> None:
        self._pid, self._connection, self._budget = pid, connection, budget
        self.end = finalize(self, _kill, pid, connection, os.getpid())

    @classmethod
    def start(cls, work: Callable[[Any], Any], budget: Budget) -> Self:
        parent, child = Pipe()
        with warnings.catch_warnings():
            # Python warns of other threads' locks. The child takes none of them: it renders or encodes, and exits.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _serve(work, child, budget)
        child.close()
        return cls(pid, parent, budget)

    def answer(self, request: Any) -> tuple[bool, Any]:
        """Return whether the work returned, and what it returned or raised."""
        seconds = self._budget.seconds
        try:
            self._connection.send(request)
            if not self._connection.poll(_PATIENCE * seconds):
                raise BudgetError(f"took more than {_PATIENCE * seconds} s")
            answer: tuple[bool, Any] = self._connection.recv()
        except (EOFError, OSError) as error:  # the process has closed its end, which it does when it dies
            raise BudgetError(_cause(_status(self._pid), self._budget)) from error
        return answer


def _kill(pid: int, connection: Connection, parent: int) -> None:
    if os.getpid() != parent:  # a fork of the parent ends: the process is not its own
        return
    connection.close()
    with suppress(ChildProcessError, ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _status(pid: int) -> int:
    """Return the wait status of a process that is ending; 0 where it has been waited for already."""
    try:
        return os.waitpid(pid, 0)[1]
    except ChildProcessError:
        return 0


def _cause(status: int, budget: Budget) -> str:
    dead = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    if dead == signal.SIGXCPU:
        return f"took more than {budget.seconds} s of processor time"
    name = f" ({signal.Signals(dead).name})" if dead else ""
    return f"took more than {budget.memory // _MEBI} MiB of memory, or failed in native code{name}"


def _serve(work: Callable[[Any], Any], connection: Connection, budget: Budget) -> None:
    """Answer requests until the parent closes its end; never returns."""
    try:
        _detach(connection.fileno())
        _limit_memory(budget.memory)
        while True:
            request = connection.recv()
            _limit_time(budget.seconds)
            connection.send(_answered(work, request, budget))
    except BaseException:  # the parent is gone, or takes no answer
        os._exit(0)


def _answered(work: Callable[[Any], Any], request: Any, budget: Budget) -> tuple[bool, Any]:
    try:
        return True, work(request)
    except MemoryError:
        return False, BudgetError(f"took more than {budget.memory // _MEBI} MiB of memory")
    except BaseException as error:
        error.__traceback__ = error.__cause__ = error.__context__ = None
        return False, error


def _detach(kept: int) -> None:
    """Take nothing of the parent's along: neither its files, locks and sockets, nor its streams and interrupts."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.settrace(None)


def _limit_memory(more: int) -> None:
    import resource

    with suppress(OSError, ValueError):  # a system that does not tell or does not limit
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))


def _limit_time(seconds: int) -> None:
    """Let the process live for so many more seconds of processor time; then SIGXCPU ends it."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    with suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard))
