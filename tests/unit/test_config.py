import pytest

from pipeline.config import RefineConfig, parse, with_absolute
from pipeline.guard import GuardConfig
from pipeline.records import InputError

NEEDED = ["--predictions", "p", "--images", "i", "--output", "o"]


def test_flags_override_the_yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("predictions: a\nimages: b\noutput: c\nnms_threshold: 0.3\nlocal: true\nlimit: null\n")
    config = parse(RefineConfig, [str(path), "--nms-threshold", "0.4", "--output", "d"])
    assert (config.predictions, config.images, config.output) == ("a", "b", "d")
    assert config.nms_threshold == 0.4
    assert config.local
    assert config.limit is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nms: 0.3", "unknown setting 'nms'; known are predictions, images, output, "),
        ("nms-treshold: 0.3", r"unknown setting 'nms-treshold'; did you mean nms_threshold\?"),
        ("guard: {min_aera: 3}", r"unknown setting 'guard\.min_aera'; did you mean guard\.min_area\?"),
        ("- a", "expected a mapping of settings"),
        ("a: [", r"not YAML .*\)$"),
        ("image_pattern: {image_id}.jpg", "not YAML .*; a value with braces needs quotes around it$"),
        ("limit: 09", "not YAML .*09"),
        ("output: 2024-99-99", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("output: {a: 1}", "output is {'a': 1}: expected a plain value"),
        ("output: [[a]]", r"output is \[\['a'\]\]: expected a plain value"),
        ("limit: 1\nlocal: true\nlimit: 2", "limit is given twice, again in line 3"),
        ("batch_size: 1\nbatch-size: 2", "batch-size is given twice"),
        ("strict: 1", "strict is 1: expected true or false"),
        ("guard: {min_iou: 0, min_iou: 1}", "min_iou is given twice"),
        ("guard.min-area: 100", "unknown setting 'guard.min-area'; write guard: with min_area: below it"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"run\.yaml: .*{message}"):
        parse(RefineConfig, [str(path), *NEEDED])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "0"], "limit is 0: expected at least 1"),
        (["--nms-threshold", "2"], "nms_threshold is 2.0: expected a number between 0 and 1"),
        (["--padding", "-1"], "padding is -1: expected at least 0"),
        (["--padding", "100000"], "patch_size is 64 and padding 100000: expected at most 4096 px"),
        (["--patch-size", "100000"], "patch_size is 100000 and padding 0: expected at most 4096 px"),
        (["--batch-size", "100000000"], "batch_size is 100000000: expected at least 1, at most 65536"),
        (["--frames-per-block", "513"], "frames_per_block is 513: expected at least 1, at most 512"),
        (["--gpus-per-worker", "inf"], "gpus_per_worker is inf: expected a number above 0"),
        (["--gpus-per-worker", "1.5"], "gpus_per_worker is 1.5: expected a number above 0, whole above 1"),
        (["--gpus-per-worker", "0"], "gpus_per_worker is 0.0: expected a number above 0"),
        (["--limits.seconds", "inf"], "limits.seconds is inf: expected a number above 0, at most 3600"),
        (["--guard.min-iou", "2"], "guard.min_iou is 2.0: expected a number from 0 to 1"),
        (["--guard.max-area-ratio", "0.5"], "guard.max_area_ratio is 0.5: expected at least 1"),
    ],
)
def test_a_setting_out_of_range_is_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse(RefineConfig, [*NEEDED, *flags])
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown


@pytest.mark.parametrize("name", ["predictions", "images", "output", "image_list"])
def test_an_empty_path_is_named_and_not_taken_for_the_root(name):
    settings = {"predictions": "p", "images": "i", "output": "o", name: ""}
    with pytest.raises(InputError, match=f"{name} is empty: expected a path or URL"):
        with_absolute(RefineConfig(**settings), *settings)


def test_the_guard_is_a_group_of_settings_in_flags_and_yaml(tmp_path):
    assert parse(RefineConfig, NEEDED).guard == GuardConfig()
    flags = ["--guard.no-enabled", "--guard.min-iou", "0.6"]
    assert parse(RefineConfig, [*NEEDED, *flags]).guard == GuardConfig(enabled=False, min_iou=0.6)
    path = tmp_path / "run.yaml"
    path.write_text("guard:\n  enabled: false\n  min_iou: 0.6\n")
    assert parse(RefineConfig, [str(path), *NEEDED]).guard == GuardConfig(enabled=False, min_iou=0.6)
    path.write_text("guard: {min_area_ration: 1}\n")
    with pytest.raises(InputError, match=r"run\.yaml: unknown setting 'guard\.min_area_ration'"):
        parse(RefineConfig, [str(path), *NEEDED])


def test_help_describes_every_setting(capsys):
    with pytest.raises(SystemExit) as left:
        parse(RefineConfig, ["--help"])
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "The coarse masks: a Cityscapes folder, a COCO results json, or Parquet" in shown
    assert "by default as `quality` says" in shown


def test_quality_decides_the_threshold_unless_one_is_given():
    places = {"predictions": "p", "images": "i", "output": "o"}
    found = [RefineConfig(**places, quality=quality).threshold("coco") for quality in ("fast", "default", "best")]
    assert found == sorted(found)
    assert RefineConfig(**places).threshold("cityscapes") == 0.55
    assert RefineConfig(**places, quality="best", nms_threshold=0.4).threshold("coco") == 0.4


def test_parity_has_no_guard_and_fp32_unless_another_precision_is_asked_for():
    def settled(*flags):
        config = parse(RefineConfig, [*NEEDED, *flags]).settled()
        return config.guard.enabled, config.precision

    assert settled() == (True, "auto")
    assert settled("--parity") == (False, "fp32")
    assert settled("--parity", "--precision", "bf16") == (False, "bf16")
