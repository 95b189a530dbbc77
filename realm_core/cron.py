"""Crontab expressions, as strict as the scheduler: what is accepted here Dagster does not refuse later."""

from datetime import UTC, datetime

from croniter import CroniterError, croniter

# Minute, hour, day of the month, month, day of the week; a sixth would be seconds, which no schedule here has.
_FIELDS = 5


def problem_with(expression: str) -> str | None:
    """What is wrong with a crontab expression, in words; None if it names times that come."""
    fields = expression.lower().split()
    if len(fields) != _FIELDS:
        return f"{len(fields)} fields, expected minute, hour, day, month, day of the week"
    if fields[2] in ("30", "31") and fields[3] in ("2", "feb"):  # Dagster does not look at the day of the week then
        return f"day {fields[2]} of February never comes"
    try:
        croniter(expression, datetime.now(UTC)).get_next(datetime)
    except CroniterError as error:
        return str(error)
    return None
