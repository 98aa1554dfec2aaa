import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.flow import Stages
from pipeline.flow.network_thread import NetworkThread
from pipeline.formats.cityscapes import CityscapesReader, CityscapesWriter
from pipeline.guard import GuardConfig
from pipeline.limits import LimitsConfig
from pipeline.stages import Cutting
from pipeline.work import Work

STAGES = Stages(CityscapesReader("", ""), CityscapesWriter(""), "", Cutting(0.25), GuardConfig(), LimitsConfig())


class Doubling:
    """Takes the place of a Refiner: answers with twice the first channel, and notes which threads used it."""

    arithmetic = "none"
    places = 0

    def __init__(self):
        self.threads = {threading.get_ident()}
        self.runs = []

    def each(self, blocks):
        self.threads.add(threading.get_ident())
        self.runs.append(0)
        for parts in blocks:
            self.runs[-1] += 1
            patches = np.concatenate(parts)
            if (patches[..., 0] == 255).any():
                raise RuntimeError("the network fell over a patch")
            yield patches[..., 0].astype(np.uint16) * 2


class Delayed(Doubling):
    """Like a GPU it gives a block's answer when the next one has come, or none comes any more."""

    def each(self, blocks):
        answer = None
        for found in super().each(blocks):
            if answer is not None:
                yield answer
            answer = found
        if answer is not None:
            yield answer


def _block(value, frames=2):
    works = [Work(f"{value}_{i}") for i in range(frames)]
    return works, [np.full((3, 64, 64, 4), value, np.uint8) for _ in works]


@pytest.mark.parametrize("network", [Doubling, Delayed])
def test_every_thread_gets_the_answers_to_its_own_blocks_from_one_network_in_one_thread(network):
    made = []
    thread = NetworkThread(STAGES, lambda: made.append(network()) or made[0])

    def ask(value):
        works, probabilities = thread.refine(_block(value))
        assert [work.frame_id for work in works] == [f"{value}_0", f"{value}_1"]
        assert all((part == 2 * value).all() and part.shape == (3, 64, 64) for part in probabilities)
        assert works[0].seconds["wait"] >= 0
        assert works[0].arithmetic == "none"

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(100)))
    assert len(made) == len(made[0].threads) == 1


def test_blocks_that_wait_are_refined_in_one_run_of_the_network():
    refiner, ready = Doubling(), threading.Event()
    thread = NetworkThread(STAGES, lambda: ready.wait(30) and refiner)
    with ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(thread.refine, _block(value)) for value in range(5)]
        while thread._asked.qsize() < 4:
            ready.wait(0.01)
        ready.set()
        assert [future.result()[0][0].frame_id for future in asked] == [f"{value}_0" for value in range(5)]
    assert refiner.runs == [5]


def test_a_block_by_itself_does_not_wait_for_another():
    works, probabilities = NetworkThread(STAGES, Delayed).refine(_block(7))
    assert (probabilities[1] == 14).all()
    assert works[1].refined_at > 0


def test_what_the_network_raises_is_raised_where_it_was_asked_and_the_next_block_is_refined():
    thread = NetworkThread(STAGES, Doubling)
    with pytest.raises(RuntimeError, match="fell over a patch"):
        thread.refine(_block(255))
    assert (thread.refine(_block(3))[1][0] == 6).all()


def test_a_network_that_cannot_be_loaded_is_told_to_whoever_asks():
    attempts = []

    def load():
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no such checkpoint")
        return Doubling()

    thread = NetworkThread(STAGES, load)
    with pytest.raises(OSError, match="no such checkpoint"):
        thread.refine(_block(1))
    assert (thread.refine(_block(1))[1][0] == 2).all()
