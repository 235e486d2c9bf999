"""Fixed cases of `fuzz_export.py`, one or more for every kind of corruption and outcome."""

import pytest
from conftest import weights_of
from fuzz_export import lead_elsewhere_and_export, spoil_and_change, spoil_and_export, spoil_and_load

CASES = {
    "change_tensors": {"refused": [0, 9, 11, 24, 25], "identical": [12], "faithful": [65]},
    "flip": {"refused": [14, 19, 28, 68, 728], "faithful": [2]},
    "flip_in_the_head": {"refused": [1, 3, 4], "identical": [114], "faithful": [15]},
    "splice": {"refused": [5, 29, 30, 33], "identical": [17], "faithful": [6]},
    "truncate": {"refused": [7, 13, 8, 88]},
}

ELSEWHERE = [("index", "refused"), ("link", "refused"), ("link within", "identical")]


@pytest.mark.parametrize(
    "corruption, outcome, seed",
    [
        (kind, outcome, seed)
        for kind, outcomes in CASES.items()
        for outcome, seeds in outcomes.items()
        for seed in seeds
    ],
)
def test_a_spoilt_file_is_refused_or_provably_right(checkpoints, corruption, outcome, seed):
    assert spoil_and_export(seed, weights_of(checkpoints("m3").folder)) == (corruption, outcome)


@pytest.mark.parametrize("seed", range(8))
def test_sources_that_lead_elsewhere_are_refused(checkpoints, seed):
    assert lead_elsewhere_and_export(seed, weights_of(checkpoints("m3").folder)) in ELSEWHERE


@pytest.mark.parametrize("seed", range(12))
def test_plugin_commands_on_what_is_spoilt_touch_nothing_else(checkpoints, seed):
    spoil_and_change(seed, checkpoints("m3").folder)


@pytest.mark.parametrize("seed, outcome", [(3, "refused"), (4, "loaded"), (7, "refused"), (10, "refused")])
def test_a_spoilt_setting_is_refused_or_does_no_harm(checkpoints, seed, outcome):
    assert spoil_and_load(seed, checkpoints("m3").folder) == ("setting", outcome)
