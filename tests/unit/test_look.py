import sys

import pytest

from jobs import look as job
from tests.unit.test_training import write_edges


@pytest.fixture
def look(tmp_path, monkeypatch):
    """The exit status of the job on a small data set; the picture goes to `sheet.png` below tmp_path."""
    data = write_edges(tmp_path / "data")

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["look", "--data", data, "--output", str(tmp_path / "sheet.png"), *flags])
        return job.main()

    return call


def test_a_contact_sheet_shows_the_patches_that_the_seed_draws(look, tmp_path):
    sheets = []
    for seed in ("0", "0", "1"):
        assert look("--count", "3", "--seed", seed, "--split", "val") == 0
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_the_job_says_which_contour_is_which(look, capsys):
    assert look() == 0
    assert "image, coarse contour (yellow), target's contour (pink)" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [(("--seed", "-1"), "seed is -1"), (("--count", "0"), "count is 0")])
def test_settings_without_meaning_are_named(look, capsys, flags, message):
    with pytest.raises(SystemExit):
        look(*flags)
    assert f"{message}: expected at least" in capsys.readouterr().err
