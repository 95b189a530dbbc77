"""What the operation decided and what went wrong, as lines of JSON in the home: readable with every service down.

home/
  decisions.jsonl  for every checkpoint: refreshed, passed over, refused, given up, and why
  alerts.jsonl     what somebody should look at
"""

import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realm_core.artifacts.publish import append_durably, read_json_lines
from realm_core.artifacts.store import Store

DECISIONS, ALERTS = "decisions.jsonl", "alerts.jsonl"
_HOOK_SECONDS = 30.0


def decide(
    store: Store, checkpoint: str, digest: str | None, decision: str, reason: str, **facts: Any
) -> dict[str, Any]:
    """Append one decision about a checkpoint; returns the row."""
    row = {
        "time": time.time(),
        "checkpoint": checkpoint,
        "digest": digest,
        "policy": store.config().refresh.policy,
        "decision": decision,
        "reason": reason,
        **facts,
    }
    append_durably(store.home / DECISIONS, row)
    return row


def decisions(store: Store) -> list[dict[str, Any]]:
    """Every decision, oldest first."""
    return read_json_lines(store.home / DECISIONS)


def alert(store: Store, kind: str, about: str, message: str, **facts: Any) -> dict[str, Any]:
    """Note something that needs a person, and tell `supervise.alert_command` if there is one; returns the row.

    The command gets the row as JSON on its standard input, and REALM_HOME, REALM_ALERT_KIND, REALM_ALERT_ABOUT and
    REALM_ALERT_MESSAGE in its environment. What it prints is in logs/alerts.log. If it fails, the row says so.
    """
    row = {"time": time.time(), "kind": kind, "about": about, "message": message, **facts}
    if command := store.config().supervise.alert_command:
        row["command"] = _tell(store.home, command, row)
    append_durably(store.home / ALERTS, row)
    return row


def alerts(store: Store) -> list[dict[str, Any]]:
    """Every alert, oldest first."""
    return read_json_lines(store.home / ALERTS)


def _tell(home: Path, command: str, row: Mapping[str, Any]) -> str:
    """Run the command; says how it went."""
    log = home / "logs" / "alerts.log"
    names = {f"REALM_ALERT_{key.upper()}": str(row[key]) for key in ("kind", "about", "message")}
    try:
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            done = subprocess.run(
                shlex.split(command),
                input=json.dumps(dict(row)).encode(),
                env={**os.environ, "REALM_HOME": str(home.resolve()), **names},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_HOOK_SECONDS,
                check=False,
            )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"failed: {error}"
    return "ran" if done.returncode == 0 else f"failed with code {done.returncode}"
