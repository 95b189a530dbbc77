"""Crontab expressions: what is accepted comes, and what is not is told in words."""

import random

import dagster as dg
import pytest
from dagster._utils.schedules import schedule_execution_time_iterator

from realm_core.artifacts import settings
from realm_core.artifacts.store import Store
from realm_core.cron import problem_with
from realm_core.errors import ConfigError

PIECES = (
    "* 0 5 12 23 31 59 60 99 1-5 5-1 */5 3/7 1-10/3 mon sun-sat jan jan-dec/2 0,30 1,,2 l ? */0 feb 30 007 -1".split()
)


@pytest.mark.parametrize(
    "expression",
    ["0 3 * * 0", "*/15 * * * *", "0 0 1,15 jan-jun mon", "5/10 0-23/2 31 * 7", " 0  3 * * SUN ", "0 0 29 2 *"],
)
def test_what_a_crontab_may_hold_is_accepted(expression: str) -> None:
    assert problem_with(expression) is None


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("99 99 * * *", "out of range"),
        ("0 24 * * *", "out of range"),
        ("0 0 0 * *", "out of range"),
        ("0 0 * 13 *", "out of range"),
        ("0 0 * * 8", "out of range"),
        ("0 3 * * L", "not acceptable"),
        ("*/0 * * * *", "step '0' in field 0 is not acceptable"),
        ("weekly", "1 fields, expected minute, hour"),
        ("@daily", "1 fields"),
        ("0 0 30 2 *", "day 30 of February never comes"),
        ("0 0 31 4,6 *", "failed to find next date"),
        ("", "0 fields"),
    ],
)
def test_what_no_clock_ever_shows_is_refused(expression: str, problem: str) -> None:
    assert problem in (problem_with(expression) or "")


def test_what_is_accepted_the_scheduler_accepts_and_finds_a_time_for() -> None:
    chance, accepted = random.Random(7), 0
    for _ in range(1500):
        expression = " ".join(chance.choice(PIECES) if chance.random() < 0.6 else "*" for _ in range(5))
        if problem_with(expression) is None:
            dg.ScheduleDefinition(job_name="any", cron_schedule=expression)
            assert next(schedule_execution_time_iterator(1.7e9, expression, "UTC", ascending=True))
            accepted += 1
    assert accepted > 100


def test_a_home_takes_no_expression_that_never_comes_and_can_lose_one_it_has(home: Store) -> None:
    with pytest.raises(ConfigError, match=r"retrain\.cron='99 99 \* \* \*': .*out of range"):
        settings.change(home, ["retrain.cron=99 99 * * *"])
    assert home.config().retrain.cron is None
    values = home.settings()
    values["config"]["retrain"]["cron"] = "99 99 * * *"
    home.write_settings(values)
    assert settings.change(home, ["refresh.sensor_seconds=2"]).refresh.sensor_seconds == 2
    assert settings.change(home, ["retrain.cron=null"]).retrain.cron is None
