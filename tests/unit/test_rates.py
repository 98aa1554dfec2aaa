import pytest

from model import Refiner
from model.rates import BASE, REFERENCE, rate, rates, table
from tests.conftest import random_patches, seeded_network


@pytest.mark.slow
def test_every_way_to_run_the_network_is_measured_and_compared_with_torch():
    rows = {
        row.name: row
        for row in rates("hrnet18s_128", random_patches(4), threads=1, repetitions=1, seconds=0, checked=4)
    }
    assert {REFERENCE, BASE, "torch bf16"} <= rows.keys()
    assert rows[BASE].ratio == 1
    assert all(row.patches_per_s > 0 and row.patches_per_core_s > 0 for row in rows.values())
    assert rows[REFERENCE].flipped < 1e-3
    assert 0 < rows["torch bf16"].largest < 0.3
    lines = table(list(rows.values())).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == list(rows)


def test_the_rate_of_a_refiner_counts_patches_and_not_batches():
    class Slow(Refiner):
        def probabilities(self, patches):
            taken.append(len(patches))
            return patches[..., 0].astype("uint16")

    taken = []
    refiner = Slow(seeded_network(), device="cpu", backend="torch", batch_size=3, threads=1)
    assert rate(refiner, random_patches(2), seconds=0) > 0
    assert all(count >= 2 * 3 for count in taken)
