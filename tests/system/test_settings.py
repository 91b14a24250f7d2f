"""What public functions are given becomes the options that everything below takes."""

from pathlib import Path
from typing import Any

from secateur.system.settings import CalibrationDraws, CalibrationText, taken


def test_a_path_is_the_name_that_it_has():
    given: dict[str, Any] = dict(calibration=Path("texts/a.jsonl"), data_dir=Path("data"), samples=4, other=1)
    text = taken(CalibrationText, given)
    assert (text.calibration, text.data_dir, text.samples) == ("texts/a.jsonl", Path("data"), 4)
    draws = taken(CalibrationDraws, dict(calibration=[Path("a.txt"), "c4"]))
    assert list(draws.calibration or []) == ["a.txt", "c4"]
