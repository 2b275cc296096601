"""Every test file belongs to one suite."""

from pathlib import Path

from shipped import shipped
from suites import LONGEST, SUITE_OF, SUITES, TESTS, place_of, suite_of


def test_every_file_has_a_suite():
    files = shipped(TESTS, "**/test_*.py")
    without_suite = [file for file in files if suite_of(file) is None]
    assert without_suite == [], "add an entry to tests/suites.py"


def test_every_entry_names_an_existing_file_or_folder_and_a_suite():
    assert set(SUITE_OF.values()) == set(SUITES)
    assert [entry for entry in SUITE_OF if not (TESTS / entry).exists()] == []


def test_the_longest_files_exist_and_run_first(request):
    places = [place_of(item.path) for item in request.session.items]
    assert places == sorted(places)
    assert [file for file in LONGEST if not (TESTS / file).exists()] == []
    assert place_of(TESTS / LONGEST[1]) == 1
    assert place_of(Path("/elsewhere/test_sweep.py")) == len(LONGEST)


def test_the_longest_matching_entry_gives_the_suite():
    assert suite_of(TESTS / "tuning/sweep/test_sweep.py") == "system"
    assert suite_of(TESTS / "tuning/vectorized/test_stacked_trainer.py") == "training"
    assert suite_of(TESTS / "elsewhere/test_sweep.py") is None
    assert suite_of(Path("/elsewhere/tuning/sweep/test_sweep.py")) is None


def test_a_test_is_marked_with_the_suite_of_its_file(request):
    assert {mark.name for mark in request.node.iter_markers()} & set(SUITES) == {"system"}
