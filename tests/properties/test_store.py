"""Properties of manifests, logs, retention, lineage, settings and follower over many small worlds."""

import itertools
import json
import shutil
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm_core.artifacts.lineage import render, to_json, walk
from realm_core.artifacts.manifest import MANIFEST, Manifest, Plan, read_manifest
from realm_core.artifacts.publish import append_durably, building, read_json_lines
from realm_core.artifacts.store import Store, checkpoint_key, parse_key
from realm_core.config import Config
from realm_core.errors import ArtifactError, ConfigError
from realm_core.params import config_from, load_config

FEW = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
TINY = load_config(None, "tiny")

scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner), max_leaves=6
)
names = st.text("abcdefgh", min_size=1, max_size=6)
digests = st.dictionaries(names, st.text("0123456789abcdef", min_size=8, max_size=8), max_size=3)
manifests = st.builds(
    Manifest,
    stage=names,
    code=names,
    config_digest=names,
    parents=digests,
    sources=digests,
    files=digests,
    facts=st.dictionaries(st.text(max_size=5), values, max_size=4),
    record=st.dictionaries(st.text(max_size=5), values, max_size=4),
)


class Scratch:
    """A new empty folder for every example."""

    def __enter__(self) -> Path:
        self.folder = Path(tempfile.mkdtemp())
        return self.folder

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)


# --- manifests -------------------------------------------------------------------------------------------------------


@FEW
@given(manifests)
def test_a_manifest_survives_writing_and_reading(made: Manifest) -> None:
    with Scratch() as folder:
        (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")
        read = read_manifest(folder)
    assert read == made and read.digest == made.digest


@FEW
@given(manifests, st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_only_the_record_is_free(made: Manifest, record: dict[str, Any]) -> None:
    assert replace(made, record=record).digest == made.digest
    for change in (
        {"code": made.code + "x"},
        {"facts": {**made.facts, "one more": 1}},
        {"files": {**made.files, "z": "0"}},
    ):
        assert replace(made, **change).digest != made.digest


@FEW
@given(manifests, st.data())
def test_a_manifest_with_any_value_edited_is_refused_or_tells_the_same(made: Manifest, data: st.DataObject) -> None:
    document = json.loads(made.to_json())
    key = data.draw(st.sampled_from(sorted(set(document) - {"record"})))
    document[key] = data.draw(values)
    with Scratch() as folder:
        (folder / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
        with suppress(ArtifactError):
            assert read_manifest(folder).digest == made.digest


# --- logs ------------------------------------------------------------------------------------------------------------

rows = st.lists(st.dictionaries(st.text(max_size=4), scalars, min_size=1, max_size=3), min_size=1, max_size=5)


@FEW
@given(rows, rows, st.data())
def test_a_log_cut_at_any_byte_loses_the_torn_row_and_no_other(
    first: list[dict[str, Any]], then: list[dict[str, Any]], data: st.DataObject
) -> None:
    with Scratch() as folder:
        path, ends = folder / "log.jsonl", [0]
        for row in first:
            append_durably(path, row)
            ends.append(path.stat().st_size)
        cut = data.draw(st.integers(0, ends[-1]))
        path.write_bytes(path.read_bytes()[:cut])
        # A row is there as soon as its last character is; only the line's end may be missing.
        whole = [row for row, end in zip(first, ends[1:], strict=True) if end - 1 <= cut]
        assert read_json_lines(path) == whole
        for row in then:
            append_durably(path, row)
        assert read_json_lines(path) == whole + then


# --- keys and retention ----------------------------------------------------------------------------------------------

steps = st.integers(0, 9_999_999)
runs = st.from_regex(r"[a-z0-9][a-z0-9_]{0,8}", fullmatch=True)


@given(runs, steps)
def test_a_key_is_read_back(run: str, step: int) -> None:
    assert parse_key(checkpoint_key(run, step)) == (run, step)


@given(runs, st.lists(steps, min_size=1))
def test_keys_of_a_run_sort_by_step(run: str, several: list[int]) -> None:
    assert sorted(checkpoint_key(run, step) for step in several) == [
        checkpoint_key(run, step) for step in sorted(several)
    ]


@settings(FEW, max_examples=8)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True), st.integers(1, 3), st.data())
def test_retention_spares_what_it_must_and_drops_the_rest(several: list[int], keep: int, data: st.DataObject) -> None:
    keys = [checkpoint_key("r1", step) for step in sorted(several)]
    spare = data.draw(st.sets(st.sampled_from(keys)))
    live = data.draw(st.none() | st.sampled_from(keys))
    started, indexed = data.draw(st.sets(st.sampled_from(keys))), data.draw(st.sets(st.sampled_from(keys)))
    with Scratch() as folder:
        store = Store.create(folder / "home", TINY, {}, "tiny")
        for kind, names in (("checkpoints", keys), ("indexes", sorted(indexed))):
            for key in names:
                with building(store.path(kind, key), Plan(stage=kind, code=key, config_digest="c")) as build:
                    (build.folder / "weights").touch()
                    build.commit({})
        if live is not None:
            store.move_live(live, "digest", "checkpoint", "x", None)
        for key in started:
            (store.home / "snapshots" / f".{key}.partial").mkdir(parents=True)
        overtaken = {key for key in started if live is not None and key <= live}
        kept = {*keys[-keep:], *spare, *indexed, *(started - overtaken), *({live} if live else ())}
        assert set(store.prune_checkpoints("r1", keep, spare)) == set(keys) - kept
        assert set(store.checkpoints("r1")) == kept
        assert store.names("checkpoints") == keys
        assert store.prune_checkpoints("r1", keep, spare) == []
        for key in keys:
            assert (store.path("checkpoints", key) / "weights").exists() == (key in kept)


# --- lineage ---------------------------------------------------------------------------------------------------------


@settings(FEW, max_examples=8)
@given(st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=6))
def test_the_walk_visits_exactly_the_ancestors_and_each_once(links: list[set[int]]) -> None:
    """Any acyclic world: artifact i may be made from artifacts below i."""
    parents = [sorted(parent for parent in link if parent < child) for child, link in enumerate(links)]

    def ancestors(child: int) -> set[int]:
        return {child}.union(*(ancestors(parent) for parent in parents[child]))

    with Scratch() as folder:
        store = Store.create(folder / "home", TINY, {}, "tiny")
        made: list[Manifest] = []
        for child, of in enumerate(parents):
            plan = Plan(
                stage="corpus",
                code=str(child),
                config_digest="c",
                parents={f"role{parent}": made[parent] for parent in of},
            )
            with building(store.path("corpus", f"v{child:04d}"), plan) as build:
                made.append(build.commit({}))
        for child in range(len(parents)):
            nodes = walk(store, "corpus", f"v{child:04d}")
            assert next(iter(nodes)) == made[child].digest
            assert {node.name for node in nodes.values()} == {f"v{number:04d}" for number in ancestors(child)}
            assert len(to_json(nodes)["nodes"]) == len(nodes)
            assert render(nodes).count("stage corpus") == len(nodes)


# --- settings --------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
sections = sorted(Config.model_fields)
keys = st.sampled_from(sections).flatmap(
    lambda section: st.tuples(
        st.just(section),
        st.sampled_from(sorted(getattr(Config.model_fields[section].annotation, "model_fields", {"": 0})))
        | st.text(max_size=4),
    )
)


@settings(FEW, max_examples=60)
@given(keys, plain)
def test_any_value_anywhere_is_either_a_setting_or_an_operators_error(key: tuple[str, str], value: Any) -> None:
    section, name = key
    content = {**TINY.model_dump(mode="json")}
    content[section] = {**content[section], name: value} if isinstance(content[section], dict) else value
    with suppress(ConfigError):
        config = config_from(content, "params.yaml")
        assert config_from(json.loads(json.dumps(config.model_dump(mode="json"))), "home.json") == config


@settings(FEW, max_examples=50)
@given(st.text(max_size=20))
def test_any_override_is_either_applied_or_an_operators_error(override: str) -> None:
    with suppress(ConfigError):
        load_config(None, "tiny", [override])


@given(st.sets(st.sampled_from(sections)))
def test_the_digest_of_sections_does_not_depend_on_their_order(chosen: set[str]) -> None:
    orders = itertools.islice(itertools.permutations(chosen), 4)
    assert len({TINY.digest(*order) for order in orders}) == 1
