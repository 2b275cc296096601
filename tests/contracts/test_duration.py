"""Durations in settings."""

import pytest

from framework.contracts.duration import duration_seconds
from framework.errors import SettingError


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("90s", 90.0), ("90 sec", 90.0), (" 30min ", 1800.0), ("1.5h", 5400.0)],
)
def test_a_duration_is_a_number_and_a_unit(duration, seconds):
    assert duration_seconds(duration) == seconds


@pytest.mark.parametrize("duration", ["90", "min", "1 week", "-1s", ""])
def test_another_text_is_an_error(duration):
    with pytest.raises(SettingError, match="a duration like 90s"):
        duration_seconds(duration)
