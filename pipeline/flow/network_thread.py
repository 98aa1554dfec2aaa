"""The network in a thread of its own, so that it goes from block to block while others pass these in and out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from pipeline.flow.plan import Stages
from pipeline.stages import Block

if TYPE_CHECKING:
    from model import Refiner

_MOMENT_SECONDS = 0.01
"""How long a batch that is not full yet waits for patches of the next block; shorter than a GPU takes for the batches
that it has in hand."""

_Asked = tuple[Block, Future[Block]]


class NetworkThread:
    """Refines the blocks of any number of threads in one, which alone ever touches the network.

    A network touched in two threads would keep two teams of OpenMP threads, which are then put to sleep after every
    layer: a third of the rate on two cores.
    """

    def __init__(self, stages: Stages, load: Callable[[], Refiner]) -> None:
        """The network is loaded with the first block."""
        self.stages, self.load = stages, load
        self._asked: SimpleQueue[_Asked] = SimpleQueue()
        Thread(target=self._run, daemon=True).start()

    def refine(self, block: Block) -> Block:
        """As `Stages.refine`, of one block, whose first frame is told how long the network had to wait for it."""
        future: Future[Block] = Future()
        self._asked.put((block, future))
        return future.result()

    def _run(self) -> None:
        refiner = None
        while True:
            waiting = time.perf_counter()
            asked = self._asked.get()
            taken: deque[Future[Block]] = deque()
            try:
                refiner = refiner or self.load()
                for refined in self.stages.refine(self._blocks(asked, waiting, taken), refiner):
                    taken.popleft().set_result(refined)
            except BaseException as error:
                # Whoever asked is to know, and the thread goes on.
                for future in taken or [asked[1]]:
                    future.set_exception(error)

    def _blocks(self, asked: _Asked, waiting: float, taken: deque[Future[Block]]) -> Iterator[Block]:
        """The block asked for and those after it, until none comes for a moment: what is under way must not wait."""
        while True:
            (works, patches), future = asked
            works[0].seconds["wait"] = time.perf_counter() - waiting
            taken.append(future)
            yield works, patches
            waiting = time.perf_counter()
            try:
                asked = self._asked.get(timeout=_MOMENT_SECONDS)
            except Empty:
                return
