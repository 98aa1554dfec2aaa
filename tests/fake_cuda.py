"""As much of torch.cuda as `model.gpu` uses, without a GPU: what is queued runs late, in any order that may happen."""

import random
from collections import deque
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch


class FakeTorch:
    """Takes the place of the module `torch` in `model.gpu`; a seed decides what runs first where streams allow both."""

    def __init__(self, seed: int) -> None:
        self.random, self.streams, self.captured = random.Random(seed), [], None
        self.current = Stream(self)
        self.cuda = SimpleNamespace(
            Stream=lambda _: Stream(self),
            Event=lambda blocking: Event(self),
            CUDAGraph=SimpleNamespace,
            graph=self.graph,
            stream=self.stream,
            current_stream=lambda _: self.streams[0],
            device=lambda _: nullcontext(),
        )

    def __getattr__(self, name):
        return getattr(torch, name)

    def zeros(self, shape, dtype, pin_memory):
        return Memory(self, np.zeros(shape, np.uint8 if dtype == torch.uint8 else np.int16), "cpu")

    def empty_like(self, like, device):
        return Memory(self, np.full_like(like.data, 85), device)

    def zeros_like(self, like):
        return Memory(self, np.zeros_like(like.data), like.device)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.captured = steps = []
        yield
        self.captured = None
        graph.replay = lambda: [self.current.queue(step) for step in steps]

    def run_one(self) -> bool:
        """Run the first step of one of the streams; False where each waits, or has none."""
        ready = [stream for stream in self.streams if stream.queued and stream.queued[0][1]()]
        if ready:
            (stream,) = self.random.choices(ready, [stream.speed for stream in ready])
            stream.queued.popleft()[0]()
        return bool(ready)

    def run_until(self, done) -> None:
        while not done():
            assert self.run_one(), "streams wait for each other"


class Stream:
    def __init__(self, fake):
        self.fake, self.queued, self.speed = fake, deque(), fake.random.choice((0.01, 0.1, 1, 10))
        fake.streams.append(self)

    def queue(self, step, ready=lambda: True):
        if self.fake.captured is not None:
            self.fake.captured.append(step)
            return
        self.queued.append((step, ready))
        for _ in range(self.fake.random.choice((0, 0, 1, 3, 10))):
            self.fake.run_one()

    def wait_event(self, event):
        assert event.records, "waits for an event that was never recorded"
        self.queue(lambda: None, lambda number=event.records: event.passed >= number)

    def wait_stream(self, other):
        other.synchronize()

    def synchronize(self):
        self.fake.run_until(lambda: not self.queued)


class Event:
    def __init__(self, fake):
        self.fake, self.records, self.passed = fake, 0, 0

    def record(self):
        self.records += 1
        self.fake.current.queue(lambda number=self.records: setattr(self, "passed", number))

    def synchronize(self):
        self.fake.run_until(lambda: self.passed == self.records)


class Memory:
    """A tensor; copies into it, of another or of what is computed then, are queued."""

    def __init__(self, fake, data, device):
        self.fake, self.data, self.device = fake, data, device

    def copy_(self, source, non_blocking=False):
        value = source if callable(source) else lambda: source.data
        self.fake.current.queue(lambda: np.copyto(self.data, value()))

    def numpy(self):
        return self.data
