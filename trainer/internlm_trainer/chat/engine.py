"""Answering several at a time: requests of many threads, and one thread that has the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue

from internlm_trainer.generate import Decoder, Made, Request


class Busy(RuntimeError):  # noqa: N818
    """As many requests wait as may."""


class Ticket(Iterator[Made]):
    """A request's tokens, for one thread to take as they are made."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.left = False
        """Whether nobody waits for more."""
        self.made: SimpleQueue[Made | BaseException] = SimpleQueue()
        self._ended = False

    def __next__(self) -> Made:
        if self._ended:
            raise StopIteration
        made = self.made.get()
        if isinstance(made, BaseException):
            self._ended = True
            raise RuntimeError(_sentence(made)) from made
        self._ended = made.finish is not None
        return made

    def close(self) -> None:
        self.left = True


class Engine:
    """A thread that decodes; each request begins as a row of the decoder gets free, at most `waiting` wait for one.

    Each step gives every row that is under way a token, so that a late request does not wait for the ends of others.
    """

    def __init__(self, decoder: Decoder, waiting: int = 64) -> None:
        self.decoder, self._most = decoder, waiting
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._stopped: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def answer(self, request: Request) -> Ticket:
        """The tokens of a request, which waits from now on.  Raises Busy."""
        ticket = Ticket(request)
        with self._changed:
            if len(self._waiting) >= self._most:
                raise Busy(f"{self._most} requests wait already; try again later")
            if self._stopped:
                ticket.made.put(self._stopped)
            else:
                self._waiting.append(ticket)
                self._changed.notify()
        return ticket

    @property
    def stopped(self) -> str | None:
        """Why it answers no more, as a sentence; None while it does."""
        return _sentence(self._stopped) if self._stopped else None

    def close(self) -> None:
        """End all that is under way."""
        self._stop(InterruptedError("it was told to"))
        self._thread.join()

    def _stop(self, reason: BaseException) -> None:
        with self._changed:
            self._stopped = self._stopped or reason
            self._changed.notify()

    def _run(self) -> None:
        under_way: dict[int, Ticket] = {}
        try:
            while self._begin(under_way):
                for row in [row for row, ticket in under_way.items() if ticket.left]:
                    self.decoder.end(row)
                    del under_way[row]
                for made in self.decoder.step():
                    under_way[made.row].made.put(made)
                    if made.finish:
                        del under_way[made.row]
        except Exception as error:
            self._stop(error)
            raise
        finally:
            assert self._stopped
            for ticket in (*under_way.values(), *self._waiting):
                ticket.made.put(self._stopped)

    def _begin(self, under_way: dict[int, Ticket]) -> bool:
        """Begin what waits and has room, after something is there to do; whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or under_way or self._stopped)
            if self._stopped:
                return False
            ready = [self._waiting.popleft() for _ in range(min(self.decoder.free, len(self._waiting)))]
        for ticket in ready:
            if not ticket.left:
                under_way[self.decoder.begin(ticket.request)] = ticket
        return True


def _sentence(reason: BaseException) -> str:
    return f"the model has stopped: {str(reason) or type(reason).__name__}"
