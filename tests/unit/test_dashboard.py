import json
import re
from pathlib import Path

import pytest

from pipeline.flow.metrics import COUNTERS, FRAMES_LEFT

DASHBOARD = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "refinement.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
SERVED = {*(f"ray_{name}_total" for name in COUNTERS), f"ray_{FRAMES_LEFT}"}


def test_the_dashboard_shows_every_metric_of_a_run_and_no_other():
    assert set(re.findall(r"\bray_bpr_\w+", " ".join(EXPRESSIONS))) == SERVED


def test_every_query_of_a_run_can_be_narrowed_to_outputs_and_runs():
    for expression in EXPRESSIONS:
        for selector in re.findall(r"ray_bpr_\w+(\{[^}]*\})?", expression):
            assert 'output=~"$output", run_id=~"$run"' in selector
    variables = {variable["name"]: variable["query"] for variable in DASHBOARD["templating"]["list"]}
    assert {*variables} == {"datasource", "output", "run"}
    asked = set(re.findall(r"\bray_bpr_\w+", f"{variables}"))
    assert asked
    assert asked <= SERVED


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_its_query_is_balanced(panel):
    assert panel["description"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        for opening, closing in ("()", "{}", "[]"):
            assert target["expr"].count(opening) == target["expr"].count(closing)


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
