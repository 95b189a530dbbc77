"""Settings: what is refused, and in which words."""

import json
from pathlib import Path

import pytest
import yaml

from realm_core.config import Config
from realm_core.errors import ConfigError
from realm_core.params import DEFAULT_PARAMS, config_from, load_config


def params(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("profile", ["base", "demo", "tiny"])
def test_every_shipped_profile_is_valid(profile: str) -> None:
    assert load_config(DEFAULT_PARAMS, profile)


def test_the_defaults_are_the_constants_of_the_paper() -> None:
    base = load_config(DEFAULT_PARAMS, "base")
    assert base == Config()
    assert (base.pretrain.steps, base.pretrain.batch, base.pretrain.lr, base.pretrain.candidates) == (
        200_000,
        512,
        3e-5,
        8,
    )
    assert base.corpus.block_wordpieces == 288 and base.lengths.joint == 96 + 288


def test_the_packaged_settings_are_read_where_the_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(None, "tiny").seed == 7
    params(tmp_path, "profiles: {tiny: {seed: 99}}")
    assert load_config(None, "tiny").seed == 99


def test_an_override_replaces_one_value_and_nothing_else() -> None:
    plain, changed = load_config(None, "tiny"), load_config(None, "tiny", ["pretrain.lr=1e-5", "index.params.nlist=4"])
    assert changed.pretrain.lr == 1e-5  # YAML reads 1e-5 as text; the field makes it a number
    assert changed.index.params == {"nlist": 4}
    assert changed.model_copy(update={"pretrain": plain.pretrain, "index": plain.index}) == plain


def test_an_override_never_leaks_into_the_next_reading() -> None:
    load_config(None, "tiny", ["index.params.nlist=4"])
    assert load_config(None, "tiny").index.params == {}


def test_settings_cannot_be_changed_after_birth() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None, "tiny").pretrain.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "no 'profiles' mapping; see the params.yaml of the repository"),
        ("profiles: 3", "no 'profiles' mapping"),
        ("profiles: {tiny: {a: [}", "not YAML .*; mend the file"),
        ("profiles: {other: {}}", "no profile 'tiny'; it has other"),
        ("profiles: {tiny: [1]}", "tiny: a list, expected sections; mend the file"),
        ("profiles: {tiny: {pretrain: {stepz: 3}}}", r"unknown key pretrain\.stepz; known keys here: batch, .*steps"),
        ("profiles: {tiny: {training: {}}}", "unknown key training; known keys here: corpus, evaluate, .*warmup"),
        ("profiles: {tiny: {seed: 2020-01-01}}", "tiny: seed: .*found datetime.date"),
        ("profiles: {tiny: {pretrain: 3}}", r"pretrain: .*\(found 3\)"),
        ("profiles: {tiny: {pretrain: {lr: .inf}}}", r"pretrain\.lr: .*finite number.*\(found inf\)"),
        ("profiles: {tiny: {pretrain: {lr: .nan}}}", r"pretrain\.lr: .*\(found nan\)"),
        ("profiles: {tiny: {pretrain: {lr: 0}}}", r"pretrain\.lr: .*greater than 0.*\(found 0\)"),
        ("profiles: {tiny: {pretrain: {candidates: 1}}}", r"pretrain\.candidates: .*\(found 1\)"),
        ("profiles: {tiny: {index: {backend: magic}}}", r"index\.backend: .*'exact'.*'alsh' \(found 'magic'\)"),
        ("profiles: {tiny: {evaluate: {ks: [1, 0]}}}", r"evaluate\.ks\.1: .*\(found 0\)"),
    ],
)
def test_a_wrong_file_is_one_line_with_the_place_the_finding_and_the_next_move(
    tmp_path: Path, text: str, message: str
) -> None:
    path = params(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, "tiny")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .*; pass --params FILE"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("profiles: {tiny: {seed: 1}} # é".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 at byte 30; mend the file"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize("refresh", ["policy=drift", "policy=every_steps"])
def test_a_limit_of_age_needs_a_policy_that_refreshes_in_time(refresh: str) -> None:
    limits = ["pretrain.max_index_age=8"]
    with pytest.raises(
        ConfigError, match=r"max_index_age=8 with refresh\.policy=.*: the trainer would wait for a checkpoint"
    ):
        load_config(None, "tiny", [*limits, f"refresh.{refresh}"])
    assert load_config(None, "tiny", limits).pretrain.max_index_age == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.steps", "--set pretrain.steps: no '='; write --set section.key=value"),
        ("seed.x=3", "--set seed.x=3: seed is a value, not a section"),
        ("pretrain.steps=[", r"--set pretrain.steps=\[: the value is not YAML; quote it"),
        ("pretrain.stepz=3", "unknown key pretrain.stepz; known keys here"),
        ("=3", "unknown key "),
        ("pretrain.steps=many", r"pretrain\.steps: .*\(found 'many'\)"),
        ("lengths.document=32", "corpus.block_wordpieces=64 exceeds lengths.document=32: blocks would be cut; lower"),
        (
            "pretrain.max_index_age=3",
            "max_index_age=3 under checkpoint_every=4: no index is that young at every step; raise the first or lower",
        ),
        ("lengths.reader=512", "lengths.reader=512 exceeds model.max_positions=128; shorten it"),
        ("lengths.query=100", "lengths.joint=164 exceeds model.max_positions=128; shorten it"),
        (
            "reader.reader_beam=21",
            "reader.reader_beam=21 exceeds reader.searcher_beam=20: no more blocks can be read than are retrieved; lower it",
        ),
        ("evaluate.ks=[]", r"evaluate\.ks: .*at least 1 item"),
        ("model.heads=3", "model.hidden_size=32 is not a multiple of model.heads=3; change one"),
        (
            "model.encoder_layers=2",
            "model.encoder_layers=2 exceeds model.layers=1: the encoder starts from the same weights; lower it",
        ),
    ],
)
def test_a_wrong_override_is_one_line_with_the_next_move(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(None, "tiny", [override])
    assert "\n" not in str(caught.value)


def test_short_profiles_name_their_warm_up_and_the_papers_run_follows_the_rule() -> None:
    def named(profile: str) -> list[int | None]:
        config = load_config(None, profile)
        return [section.warmup_steps for section in (config.ict, config.warmup, config.pretrain, config.reader)]

    assert named("base") == [None] * 4
    assert named("demo") == [1, 4, 4, 3]
    assert named("tiny") == [1, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"ict\.warmup_steps: .*greater than 0"):
        load_config(None, "tiny", ["ict.warmup_steps=0"])


def test_the_digest_covers_the_named_sections_and_the_seed_alone() -> None:
    plain = load_config(None, "tiny")
    assert plain.digest("ict") == load_config(None, "tiny", ["pretrain.steps=99"]).digest("ict")
    for override in ("ict.steps=9", "seed=8"):
        assert plain.digest("ict") != load_config(None, "tiny", [override]).digest("ict")


def test_stored_settings_are_read_back_equal() -> None:
    config = load_config(None, "demo")
    assert config_from(json.loads(json.dumps(config.model_dump(mode="json"))), "home.json") == config


def test_every_key_of_the_shipped_file_is_a_setting() -> None:
    profiles = yaml.safe_load(DEFAULT_PARAMS.read_text("utf-8"))["profiles"]
    for sections in profiles.values():
        assert set(sections) <= set(Config.model_fields)


def test_a_digest_of_digits_alone_stays_text() -> None:
    digest = "1234567890" * 6 + "1234"
    assert load_config(None, "tiny", [f"model.weights_sha256={digest}"]).model.weights_sha256 == digest


def test_whatever_asks_for_more_blocks_than_there_are_is_named_with_what_would_do() -> None:
    config = load_config(None, "tiny")  # searcher_beam and the largest k are 20
    config.require_fits(20)
    config.require_fits(3, "pretrain.candidates")
    with pytest.raises(ConfigError) as caught:
        config.require_fits(19)
    assert str(caught.value) == (
        "reader.searcher_beam=20, evaluate.ks=20: more than the 19 blocks of the corpus; add documents, "
        "or pass --set reader.searcher_beam=19 --set evaluate.ks=[19]"
    )
    with pytest.raises(ConfigError, match=r"pretrain\.candidates=3: more than the 2 blocks"):
        config.require_fits(2, "pretrain.candidates")


@pytest.mark.parametrize("blocks", [2, 3, 7, 19])
def test_the_remedy_for_a_corpus_that_is_too_small_is_one(blocks: int) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, "demo").require_fits(blocks)
    remedy = [word for word in str(caught.value).split("or pass ")[1].split() if word != "--set"]
    load_config(None, "demo", remedy).require_fits(blocks)


def test_one_block_is_too_few_for_any_setting() -> None:
    with pytest.raises(ConfigError, match="two blocks are the least"):
        load_config(None, "tiny").require_fits(1)


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed"):
        load_config(None, "tiny", [f"seed={2**63}"])


def test_the_demo_makes_an_index_version_of_at_least_three_checkpoints_after_the_first() -> None:
    config = load_config(DEFAULT_PARAMS, "demo")
    assert config.refresh.backlog == "all"
    assert config.pretrain.steps // config.pretrain.checkpoint_every >= 3
