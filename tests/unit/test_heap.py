import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys
import numpy as np
from model.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(3_000_000, np.uint8) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults() + faults())
"""


def _faults(how):
    done = subprocess.run([sys.executable, "-c", ROUNDS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_arrays_of_one_block_are_where_those_of_the_last_one_were():
    pages = 2 * 40 * 3_000_000 / 4096
    assert _faults("as it is") > pages / 2
    assert _faults("kept") < pages / 20
