"""A minute of the soak, to see that it can be trusted when it is run for longer."""

import json

import pytest

from tests.faults import soak

pytestmark = pytest.mark.slow


def test_a_minute_of_faults_leaves_the_right_output_and_nothing_else(tmp_path):
    arguments = ["--minutes=1", "--frames=80", "--forms", "parquet", "--pause", "4", "8", f"--output={tmp_path}"]
    status = soak.main(arguments)
    result = json.loads((tmp_path / "soak.json").read_text())
    assert status == 0, result["outputs"]
    assert sum(result["injected"].values()) >= 2
    assert (tmp_path / "soak.png").stat().st_size > 1000
