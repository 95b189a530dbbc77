"""One look of the checkpoint sensor: which checkpoints to refresh now, and why the others not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from orchestration import journal, refreshes
from orchestration.refreshes import Refresh
from realm_core.artifacts.keys import checkpoint_of, parse_key
from realm_core.artifacts.publish import read_json_lines
from realm_core.artifacts.store import Store
from realm_core.errors import RealmError
from realm_core.train.refresh_policy import decide

ESTIMATE_JOB, ESTIMATES = "estimate_refresh", "estimates.jsonl"
_ROWS_A_TURN = 50  # lines of the journal written at once


@dataclass
class Turn:
    """What one look at the store and at Dagster's runs comes to. `take` fills the lists below."""

    store: Store
    instance: dg.DagsterInstance
    by_run: Mapping[str, Sequence[str]]  # training run -> keys of its checkpoints, oldest first
    asked: Mapping[str, str]  # training run -> newest key a refresh was asked for
    warn: Callable[[str], None]
    requests: list[dg.RunRequest] = field(default_factory=list)
    events: list[dg.AssetObservation] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def take(self) -> "Turn":
        """Decide about every training run."""
        self.settings = self.store.config().refresh
        self.last_step = self.store.config().pretrain.steps
        self.live = self.store.live()
        self.runs = refreshes.history(self.instance)
        self.logged = {(row.get("checkpoint"), row.get("digest")): row for row in journal.decisions(self.store)}
        refreshes.drop_partial_snapshots(self.store, refreshes.superseded(self.runs))
        for run, keys in self.by_run.items():
            self._backlog(run, keys) if self.settings.backlog == "all" else self._newest(run, keys)
        self._keep_what_waits()
        return self

    def _keep_what_waits(self) -> None:
        """Checkpoints may come so fast that retention would take one between the request and the start of its refresh."""
        waiting = [key for key, runs in self.runs.items() if any(refreshes.goes_on(run) for run in runs)]
        asked = [request.partition_key or "" for request in self.requests]
        self.store.note_refreshing({checkpoint_of(key) for key in (*waiting, *asked)})

    def _newest(self, run: str, keys: Sequence[str]) -> None:
        """The newest checkpoint of a run, unless a refresh of that run is under way. One that is set aside does not hide
        the one before it, as long as that may still go live."""
        last, live_step = keys[-1], self._live_step(run)
        while len(keys) > 1 and self.store.is_quarantined(keys[-1]):
            keys = keys[:-1]
        newest = keys[-1]
        if newest != last:
            self.reasons.append(f"{last}: it is set aside")
            if live_step is not None and parse_key(newest)[1] <= live_step:
                return
        # Over a grown corpus too: the loop refreshes one version of a run at a time.
        under_way = sorted(
            key
            for key, found in self.runs.items()
            if parse_key(key)[0] == run and any(refreshes.goes_on(each) for each in found)
        )
        if not under_way:
            self._consider(run, newest)
            if newest in self._requested():
                self._pass_over(keys[:-1], newest)
        elif under_way[-1] in keys[:-1] and self.settings.supersede and self._supersede(under_way[-1], newest):
            self.reasons.append(f"{under_way[-1]} was cancelled for {newest}")
        elif under_way[-1] != newest:
            self.reasons.append(f"{newest} waits for the refresh of {under_way[-1]}")
        else:
            self.reasons.append(f"{newest} is being refreshed")

    def _backlog(self, run: str, keys: Sequence[str]) -> None:
        """Every checkpoint of a run that was not asked for yet, and those that failed and may still go live."""
        live_step = self._live_step(run)
        for key in keys:
            failed = key in self.runs and self.runs[key][0].status == dg.DagsterRunStatus.FAILURE
            if key > self.asked.get(run, "") or (
                failed and parse_key(key)[1] > (-1 if live_step is None else live_step)
            ):
                self._consider(run, key)
        if not self.requests and not self.reasons:
            self.reasons.append(f"{keys[-1]} and all before it are asked for")

    def _consider(self, run: str, key: str) -> None:
        if self.store.is_pruned(key) or self.store.is_quarantined(key):
            gone = "its weights were dropped by retention" if self.store.is_pruned(key) else "it is set aside"
            self.reasons.append(f"{key}: {gone}")
            return
        try:
            digest = self.store.manifest("checkpoints", key).digest
        except RealmError as problem:
            self.warn(f"cannot be refreshed: {problem}")
            self.reasons.append(f"{key}: damaged")
            return
        stands = refreshes.stands(self.store, self.instance, key, self.runs.get(key, []))
        if stands.state == "failed":
            self._request(
                key, digest, stands, f"try {stands.attempts + 1} of {self.settings.max_attempts}: {stands.why}"
            )
        elif stands.state == "new":
            self._by_policy(run, key, digest, stands)
        else:
            self.reasons.append(f"{key}: {stands.state}" + (f" ({stands.why})" if stands.why else ""))
            if stands.state in ("refused", "given up") and self._log(key, digest, stands.state, stands.why):
                live = self.live.index if self.live else "nothing"
                said = f"{key} does not go live, {stands.state}: {stands.why}; {live} stays live"
                journal.alert(self.store, "refresh", key, said, attempts=stands.attempts)

    def _by_policy(self, run: str, key: str, digest: str, stands: Refresh) -> None:
        step = parse_key(key)[1]
        estimate = self._estimate(run, step) if self.settings.policy == "drift" else None
        decision = decide(
            self.settings,
            step=step,
            last_step=self.last_step,
            refreshed_step=self._refreshed_step(run),
            estimate=estimate,
        )
        facts = {} if estimate is None else {"estimate": estimate}
        if decision.what == "refresh":
            self._request(key, digest, stands, decision.reason, **facts)
        elif decision.what == "pass over":
            self._log(key, digest, "passed over", decision.reason, **facts)
            self.reasons.append(f"{key} is passed over: {decision.reason}")
        else:
            self._ask_for_estimate(key, digest, stands)

    def _request(self, key: str, digest: str, stands: Refresh, reason: str, **facts: Any) -> None:
        attempt = stands.attempts + 1
        self._log(key, digest, "refresh", reason, attempt=attempt, **facts)
        self.requests.append(
            dg.RunRequest(
                run_key=f"refresh:{key}:{digest}" + (f":try{attempt}" if attempt > 1 else ""),
                job_name=refreshes.JOB,
                partition_key=key,
                tags={refreshes.TAG: key, "realm/reason": reason[:200]},
            )
        )

    def _ask_for_estimate(self, key: str, digest: str, stands: Refresh) -> None:
        """One estimate of a run at a time; one that fails must not keep an index from being refreshed."""
        run, live = parse_key(key)[0], self.live
        assert live is not None, "the first checkpoint of a run is refreshed without an estimate"
        filters = dg.RunsFilter(job_name=ESTIMATE_JOB, tags={"realm/run": run, "realm/live": live.index_digest[:60]})
        found = self.instance.get_runs(filters, limit=1)
        if found and not found[0].is_finished:
            self.reasons.append(f"{key}: the drift of {found[0].tags.get(refreshes.TAG)} is being estimated")
        elif found and found[0].status == dg.DagsterRunStatus.FAILURE and found[0].tags.get(refreshes.TAG) == key:
            self._request(key, digest, stands, f"its drift could not be estimated, see run {found[0].run_id}")
        else:
            self.reasons.append(f"{key}: its drift is estimated first")
            tags = {refreshes.TAG: key, "realm/run": run, "realm/live": live.index_digest[:60]}
            run_key = f"estimate:{key}:{digest}:{live.index_digest}"
            self.requests.append(dg.RunRequest(run_key=run_key, job_name=ESTIMATE_JOB, partition_key=key, tags=tags))

    def _estimate(self, run: str, step: int) -> Mapping[str, Any] | None:
        """The newest estimate against what is live now, of this checkpoint or an earlier one of its run."""
        rows = read_json_lines(self.store.trainer(run) / ESTIMATES)
        live = self.live.index_digest if self.live else None
        return next((row for row in reversed(rows) if row["live_digest"] == live and row["step"] <= step), None)

    def _supersede(self, running: str, newest: str) -> bool:
        if not refreshes.pays_to_supersede(self.store, running, newest):
            return False
        for run in self.runs[running]:
            if not run.is_finished:
                self.instance.add_run_tags(run.run_id, {refreshes.SUPERSEDED_BY: newest})
                if self.instance.run_coordinator.cancel_run(run.run_id):
                    digest = self.store.manifest("checkpoints", running).digest
                    self._log(running, digest, "superseded", f"{newest} is newer, and the index younger without it")
        return True

    def _pass_over(self, keys: Sequence[str], newest: str) -> None:
        """Checkpoints that nobody asked for before a newer one came."""
        decided = {key for key, _ in self.logged}
        for key in keys[-_ROWS_A_TURN:]:
            if key not in decided and key not in self.runs and not self.store.has("snapshots", key):
                self._log(key, None, "passed over", f"{newest} is newer")

    def _log(self, key: str, digest: str | None, decision: str, reason: str, **facts: Any) -> bool:
        """Write a decision down, once; whether it is new."""
        before = self.logged.get((key, digest))
        if before and (before["decision"], before.get("attempt")) == (decision, facts.get("attempt")):
            return False
        self.logged[(key, digest)] = journal.decide(self.store, key, digest, decision, reason, **facts)
        if decision != "refresh":  # the run of a refresh says by itself why there is one
            metadata = {"decision": decision, "reason": reason, "policy": self.settings.policy}
            self.events.append(dg.AssetObservation(asset_key="realm_checkpoint", partition=key, metadata=metadata))
        return True

    def _refreshed_step(self, run: str) -> int | None:
        """Step of the run's newest checkpoint that is refreshed, or about to be."""
        keys = [key for key, found in self.runs.items() if parse_key(key)[0] == run]
        steps = [
            parse_key(key)[1]
            for key in keys
            if any(found.is_success or refreshes.goes_on(found) for found in self.runs[key])
        ]
        steps += [step for step in [self._live_step(run)] if step is not None]
        steps += [parse_key(key)[1] for key in self._requested() if parse_key(key)[0] == run]
        return max(steps, default=None)

    def _requested(self) -> list[str]:
        """Keys a refresh was asked for in this turn."""
        return [request.partition_key or "" for request in self.requests if request.job_name == refreshes.JOB]

    def _live_step(self, run: str) -> int | None:
        if self.live is None or parse_key(self.live.index)[0] != run:
            return None
        return parse_key(self.live.index)[1]
