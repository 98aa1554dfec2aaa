import json
import re

import numpy as np
import pytest

from jobs import evaluate as job
from pipeline.evaluation import SHIFT_EDGES, EvaluateConfig, evaluate
from pipeline.evaluation_report import report
from pipeline.evaluation_results import results
from tests.truths import encode, make_truth, predict, true_mask


@pytest.fixture
def dumps(tmp_path):
    """Ground truth, coarse results, and a refined dump with its ledger; the last instance got worse."""
    truth = make_truth(tmp_path / "data", frames=4)
    coarse = predict(truth)
    entries = json.loads(coarse.read_text())
    for number, entry in enumerate(entries):
        shift = 12 if entry["image_id"] == 4 else 1
        if number % 2 == 0:
            entry["segmentation"] = encode(np.roll(true_mask(truth, entry["image_id"]), shift, axis=1))
    folder = tmp_path / "refined"
    (folder / "_ledger").mkdir(parents=True)
    (folder / "refined.json").write_text(json.dumps(entries))
    (folder / "_ledger" / "run.json").write_text("{}")
    receipt = {"frame_id": "1", "error": "", "patches": 40, "refined": 7, "seconds": {"extract": 0.2, "refine": 1.0}}
    lost = {"frame_id": "9", "error": "nine.jpg: no such file", "patches": 0, "seconds": {"extract": 0.1}}
    lines = [json.dumps(one | {"reasons": {"uncertain": 2, "far_pieces": 1}}) for one in (receipt, lost)]
    (folder / "_ledger" / "1.jsonl").write_text("\n".join(lines))
    return {
        "images": str(truth.parent / "images"),
        "coarse": str(coarse),
        "refined": str(folder / "refined.json"),
        "ground_truth": str(truth),
    }


def _report(**settings):
    config = EvaluateConfig(local=True, **settings)
    outcome = evaluate(config, log=lambda line: None)
    return report(config, outcome, results(outcome))


def test_the_page_tells_the_numbers_and_shows_gains_and_losses(dumps):
    page = _report(**dumps)
    assert [one.name for one in page.headline] == ["AP", "AP50", "boundary AP", "AF"]
    assert page.headline[3].after > page.headline[3].before
    galleries = {one.title: one for one in page.galleries}
    assert len(galleries["Largest gains"].cards) == 3
    assert len(galleries["Largest losses"].cards) == 1
    assert galleries["Largest losses"].cards[0].overview.truth
    assert "raised boundary AP" in page.lead
    assert sum(page.histograms[0].counts) == 4


def test_a_gain_of_nothing_is_called_neither_raised_nor_lowered(dumps):
    assert _report(**dumps | {"refined": dumps["coarse"]}).lead == "Refinement left boundary AP as it was."


def test_the_ledger_beside_the_refined_dump_gives_time_reasons_and_what_was_set_aside(dumps):
    tables = {one.title: one for one in _report(**dumps).tables}
    assert ["refine", 1.0, 500.0, pytest.approx(100 / 1.3)] in [list(row) for row in tables["Time by stage"].rows]
    decided = [[row[0], row[1], row[3]] for row in tables["What the guard decided"].rows]
    assert decided == [["refined", "", 5], ["refined", "far_pieces", 2], ["rejected", "uncertain", 4]]
    assert tables["Set aside"].rows == [["9", "nine.jpg: no such file"]]


def test_without_ground_truth_the_largest_changes_are_shown(dumps):
    truth = dumps.pop("ground_truth")
    page = _report(**dumps, image_list=truth)
    assert not page.headline
    assert "of the masks' pixels" in page.lead
    assert "times as strong" in page.lead
    assert [len(one.cards) for one in page.galleries if one.title == "Largest changes"] == [4]
    (changed,) = [one for one in page.tables if one.title == "What changed"]
    assert changed.columns[2:4] == ["changed instances, %", "changed pixels, %"]
    assert changed.rows[-1][2] == 50


def test_upper_bounds_are_marked_as_bounds(dumps):
    groups = _report(**dumps, oracle=True).bars
    assert [one.title for one in groups if one.bound] == ["AP, upper bound", "Boundary AP, upper bound"]


def test_the_job_writes_table_json_and_page(dumps, tmp_path, monkeypatch, capsys):
    flags = [text for name, value in dumps.items() for text in (f"--{name.replace('_', '-')}", value)]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags, "--local", "--output", f"{tmp_path}/out/"])
    assert job.main() == 0
    printed = capsys.readouterr().out
    assert "boundary AP" in printed
    assert f"{tmp_path}/out/report.html" in printed
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["frames"] == 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Largest losses" in page
    axis = re.search(r'class="axis".*?</div>', page)[0].replace("\u2212", "-")
    assert [float(edge) for edge in re.findall(r">([^<]+)</span>", axis)] == list(SHIFT_EDGES)
    assert "delta" in (tmp_path / "out" / "evaluation.txt").read_text()


def test_the_job_ends_with_one_line_for_a_missing_dump(dumps, tmp_path, monkeypatch, capsys):
    arguments = ["--images", dumps["images"], "--coarse", "nowhere.json", "--ground-truth", dumps["ground_truth"]]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments, "--local"])
    assert job.main() == 1
    assert capsys.readouterr().err.startswith("error: ")
