"""What `realm train status` shows of a training run."""

import time
from typing import Any

from orchestration import journal, report, supervisor, trainer
from realm_core.artifacts.lease import UNSIGNED
from realm_core.artifacts.store import Store

_SHOWN = 3  # alerts
STALLED_LIMIT = 0.02  # share of its time that a trainer may wait for refreshes and swaps


def of(store: Store, run: str) -> dict[str, Any]:
    """Plain values: who trains, how it is looked after, how far it came. Times in seconds since the epoch."""
    holder, found = trainer.state(store.home, run), supervisor.look(store, run)
    steps = report.steps_of(store, run)
    timing = report.training(store, run)
    return {
        "run": run,
        "state": found.state,
        "process": None if holder is None or holder.pid == UNSIGNED else holder.pid,
        "host": holder.host if holder else None,
        "by": holder.by if holder else None,
        "since": holder.since if holder else None,
        "heartbeat": holder.heartbeat if holder else None,
        "heartbeat_age_seconds": round(holder.age(time.time()), 1) if holder and holder.heartbeat else None,
        "token": store.training_lease(run).token(),
        "restarts": found.restarts,
        "message": found.message,
        "last_step": steps[-1] if steps else None,
        "stalled_share": timing["stalled_share"],
        "stalled_too_long": (timing["stalled_share"] or 0.0) > STALLED_LIMIT,
        "checkpoints": store.checkpoints(run),
        "foreign": store.foreign(),
        "alerts": [row for row in journal.alerts(store) if row.get("about", "").split("-s")[0] == run][-_SHOWN:],
    }


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"run         {found['run']}: {found['state']}, {found['message']}"]
    if found["process"]:
        beat = found["heartbeat_age_seconds"]
        shown = "no heartbeat" if beat is None else f"heartbeat {beat:.0f} s ago"
        lines.append(f"process     {found['process']} on {found['host']}, {shown}")
    lines.append(f"token       {found['token']}, restarts since the last checkpoint {found['restarts']}")
    row = found["last_step"] or {}
    loss = f", loss {row['loss']:.3f}" if row.get("loss") is not None else ""
    age = f", index {row['index_age']:.0f} steps old" if row.get("index_age") is not None else ""
    lines.append(f"last step   {row.get('step', 'none')}{loss}{age}")
    if found["stalled_share"] is not None:
        lines.append(f"stalled     {found['stalled_share']:.2%} of its time for index swaps")
    if found["stalled_too_long"]:
        lines.append(
            f"warning     stalled for more than {STALLED_LIMIT:.0%} of its time; is the disk of the indexes slow?"
        )
    kept = found["checkpoints"]
    lines.append(f"checkpoints {len(kept)} kept" + (f", newest {kept[-1]}" if kept else ""))
    if found["foreign"]:
        lines.append(f"passed over {', '.join(found['foreign'])}: not names of ours; move them out of the home")
    for alert in found["alerts"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(alert["time"]))
        lines.append(f"alert       {when} {alert['message']}")
    return "\n".join(lines)
