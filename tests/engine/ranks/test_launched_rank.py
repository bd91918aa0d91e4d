from __future__ import annotations

import pytest

from nybble.engine.errors import OptionError
from nybble.engine.ranks.launched_rank import LaunchedRank, is_launched

VARIABLES = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_of_its_own_is_the_only_rank() -> None:
    assert LaunchedRank.from_environment() == LaunchedRank(0, 1, 0, 1)
    assert not is_launched()


def test_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert LaunchedRank.from_environment() == LaunchedRank(
        rank=5, num_ranks=8, local_rank=1, num_local_ranks=4
    )
    assert is_launched()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_one_variable_is_no_launcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """WORLD_SIZE alone is set by schedulers, too."""
    monkeypatch.setenv(name, "4")
    assert not is_launched()
    assert LaunchedRank.from_environment() == LaunchedRank()


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["", "-1", "1.0", "two", " 1"])
def test_what_is_not_a_number_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other, number in (VARIABLES | {name: value}).items():
        monkeypatch.setenv(other, number)
    with pytest.raises(OptionError, match=f"environment variable {name} is '{value}', expected a number"):
        LaunchedRank.from_environment()


@pytest.mark.parametrize("contradiction", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "0"}])
def test_contradictions_are_refused(contradiction: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (VARIABLES | contradiction).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="contradict"):
        LaunchedRank.from_environment()


def test_as_many_ranks_as_the_options_call_for() -> None:
    LaunchedRank().check_num_ranks(1)
    LaunchedRank(rank=3, num_ranks=4).check_num_ranks(4)


@pytest.mark.parametrize(("started", "called_for"), [(1, 2), (4, 2), (2, 1)])
def test_another_number_of_ranks_is_refused(started: int, called_for: int) -> None:
    with pytest.raises(OptionError, match=f"calls for {called_for} ranks, but {started} were started"):
        LaunchedRank(num_ranks=started).check_num_ranks(called_for)
