"""A corpus as a whole: same bytes with any number of workers, resumed after a kill, reported, shown."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import realm_core.corpus.writer as writer
from realm_core.artifacts.manifest import read_manifest
from realm_core.cli import app
from realm_core.config import Config
from realm_core.corpus.documents import Document, Tally
from realm_core.corpus.report import length_plot, markdown
from realm_core.corpus.shards import Corpus, write_shards
from realm_core.errors import ArtifactError, DataError
from realm_core.params import config_from
from realm_core.ports import NullSink
from realm_core.stages import corpus as stage
from realm_core.text.tokenizer import Tokenizer, build_vocabulary

TEXT = "The [[Tiber]] is a river in [[Italy]]. It is old. Rome stands there since 1000 years.\n== Past ==\nIt was wild."
DUMP = '<mediawiki version="0.11"><siteinfo/>%s</mediawiki>'
PAGE = "<page><title>%s</title><ns>0</ns><id>%d</id><revision><text>%s</text></revision></page>"


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    pages = [PAGE % (f"River {n}", n, f"Number {n}. " + TEXT) for n in range(40)]
    pages += [PAGE % ("Old river", 98, "#REDIRECT [[River 1]]"), PAGE % ("Bare", 99, "{{infobox}}")]
    path = tmp_path / "d.xml"
    path.write_text(DUMP % "".join(pages))
    return path


@pytest.fixture
def config() -> Config:
    return config_from(
        {
            "corpus": {"shards": 3, "block_wordpieces": 32, "splitter": "simple", "tagger": "links"},
            "model": {
                "weights": "random",
                "vocabulary_size": 400,
                "hidden_size": 8,
                "heads": 1,
                "intermediate_size": 8,
            },
        },
        where="test",
    )


def test_the_digest_is_the_same_with_any_number_of_workers(dump: Path, config: Config, tmp_path: Path) -> None:
    one = stage.run(config, source=dump, out=tmp_path / "one", sink=NullSink(), workers=1)
    two = stage.run(config, source=dump, out=tmp_path / "two", sink=NullSink(), workers=2)
    assert one.digest == two.digest
    assert one.files == two.files
    assert (one.record["workers"], two.record["workers"]) == (1, 2)
    assert stage.run(config, source=dump, out=tmp_path / "one", sink=NullSink()).record == one.record  # not built again


def test_every_page_is_an_article_a_redirect_or_dropped(dump: Path, config: Config, tmp_path: Path) -> None:
    facts = stage.run(config, source=dump, out=tmp_path / "c", sink=NullSink()).facts
    assert facts["pages"] == facts["articles"] + facts["redirects"] + sum(facts["dropped"].values()) == 42
    assert (facts["redirects"], facts["dropped"]) == (1, {"empty_text": 1})
    assert facts["span_labels"]["LINK"] == 80
    assert (facts["source"], facts["input"]) == ("mediawiki", {"export": "0.11"})


def test_the_report_lies_in_the_folder_and_holds_no_time(dump: Path, config: Config, tmp_path: Path) -> None:
    manifest = stage.run(config, source=dump, out=tmp_path / "c", sink=NullSink())
    assert {"report.json", "report.md", "lengths.svg"} <= set(manifest.files)
    report = json.loads((tmp_path / "c" / "report.json").read_text())
    assert report["blocks"] == sum(report["block_lengths"].values()) == sum(report["shards"].values())
    assert not any("second" in key for key in report)
    ElementTree.parse(tmp_path / "c" / "lengths.svg")
    assert f"| articles | {manifest.facts['articles']} |" in (tmp_path / "c" / "report.md").read_text()
    record = manifest.record
    assert {"reading_seconds", "packing_seconds", "tagging_seconds", "sentences_per_second", "peak_mib"} <= set(record)
    assert {"tagged_sentences_per_second", "tagged_sentences_per_cpu_second"} <= set(record)


def test_names_from_the_input_cannot_break_the_report() -> None:
    report: dict[str, Any] = {
        "pages": 1, "redirects": 0, "dropped": {}, "articles": 1, "blocks": 1, "duplicate_blocks": 0, "sentences": 1,
        "spans": 0, "blocks_without_span": 1, "shards": {"shard-000": 1}, "tagger": {"name": "x", "version": "1"},
        "block_lengths": {"32": 1}, "input": {"cut": "inside page '<script>|\n[x](y)'"},
    }  # fmt: skip
    text = markdown(report)
    assert "<script>" not in text
    assert "&lt;script&gt;&#124; [x](y)" in text
    ElementTree.fromstring(length_plot({"0": 5, "320": 1}))


class Killed(BaseException):
    pass


def test_a_killed_build_is_taken_up_at_the_first_unfinished_shard(
    dump: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stage.run(config, source=dump, out=tmp_path / "whole", sink=NullSink())
    plain = writer._write_shard
    written: list[int] = []

    def dying(spool: Any, number: int, *rest: Any) -> Any:
        if number == 2:
            raise Killed
        written.append(number)
        return plain(spool, number, *rest)

    monkeypatch.setattr(writer, "_write_shard", dying)
    with pytest.raises(Killed):
        stage.run(config, source=dump, out=tmp_path / "c", sink=NullSink())
    assert not (tmp_path / "c").exists()
    scratch = tmp_path / ".c.partial"
    tokens = scratch / "shard-001" / "tokens.safetensors"
    tokens.write_bytes(tokens.read_bytes()[:-4])  # torn by a power cut: not to be trusted
    written.clear()
    monkeypatch.setattr(
        writer, "_write_shard", lambda spool, number, *rest: written.append(number) or plain(spool, number, *rest)
    )
    again = stage.run(config, source=dump, out=tmp_path / "c", sink=NullSink(), workers=2)
    assert written == [1, 2]
    assert again.digest == whole.digest
    assert again.record["resumed_blocks"] == Corpus.open(tmp_path / "c").shards["shard-000"].blocks
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted(
        ["lengths.svg", "manifest.json", "report.json", "report.md", "shard-000", "shard-001", "shard-002", "vocab.txt"]
    )


def test_the_remains_of_another_build_are_not_taken_up(
    dump: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", dying)
        with pytest.raises(Killed):
            stage.run(config, source=dump, out=tmp_path / "c", sink=NullSink())
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "1", "title": "T", "text": "Only this."}\n')
    assert stage.run(config, source=other, out=tmp_path / "c", sink=NullSink()).facts["articles"] == 1


def test_bad_data_publishes_nothing_and_leaves_nothing(config: Config, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text('{"id": "1", "title": "T", "text": "x"}\n{"id": "1", "title": "U", "text": "y"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl:2: document id '1' occurs more than once, before at .*d\.jsonl:1"):
        stage.run(config, source=source, out=tmp_path / "c", sink=NullSink())
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    skipping = config.model_copy(update={"corpus": config.corpus.model_copy(update={"on_error": "skip"})})
    manifest = stage.run(skipping, source=source, out=tmp_path / "c", sink=NullSink())
    assert (manifest.facts["dropped"], manifest.facts["articles"]) == ({"duplicate_id": 1}, 1)
    assert Corpus.open(tmp_path / "c").block(0).title == "T"  # the first one stays


def test_the_same_lines_read_as_something_else_are_another_corpus(config: Config, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text('{"id": "1", "title": "T", "text": "x &amp; y"}\n')
    stage.run(config, source=source, out=tmp_path / "c", sink=NullSink())
    with pytest.raises(ArtifactError, match="other inputs"):
        stage.run(config, source=source, out=tmp_path / "c", sink=NullSink(), source_format="wikiextractor")


def test_a_worker_that_dies_is_explained_and_finished_shards_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    def broken(*_: Any, **__: Any) -> Any:
        raise BrokenProcessPool

    monkeypatch.setattr("realm_core.corpus.packing._in_order", broken)
    documents = [Document(str(n), "t", "The river.") for n in range(4)]
    tokenizer = Tokenizer(build_vocabulary(["the river"], 60))
    with pytest.raises(ArtifactError, match="fewer --workers"):
        write_shards(documents, tmp_path / "c", tokenizer, workers=2)
    assert (tmp_path / "c" / writer.SPOOL).is_dir()


def test_the_token_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    documents = [Document(str(n), "t", "The river. " * n) for n in range(1, 9)]
    write_shards(documents, tmp_path / "c", Tokenizer(build_vocabulary(["the river."], 60)), shards=2)
    for name, shard in Corpus.open(tmp_path / "c").shards.items():
        arrays = load_file(tmp_path / "c" / name / "tokens.safetensors")
        assert {key: value.tolist() for key, value in arrays.items()} == {
            key: value.tolist() for key, value in shard.arrays.items()
        }


def test_duplicates_are_counted_across_shards(tmp_path: Path) -> None:
    documents = [Document(str(n), "t", f"The river {n % 5}.") for n in range(50)]
    report = write_shards(documents, tmp_path / "c", Tokenizer(build_vocabulary(["the river 01234."], 60)), shards=7)
    assert (report["blocks"], report["duplicate_blocks"]) == (50, 45)


def test_documents_are_read_one_at_a_time(tmp_path: Path) -> None:
    tally = Tally()

    def documents() -> Iterator[Document]:
        for number in range(3):
            yield Document(str(number), "t", "The river.")
        assert not (tmp_path / "c" / "shard-000").exists()  # packing begins when all are dealt out

    write_shards(documents(), tmp_path / "c", Tokenizer(build_vocabulary(["the river."], 60)), tally=tally)
    assert tally.documents == 3


@pytest.mark.slow
@pytest.mark.parametrize("text", ["word " * 200_000, "x" * 1_000_000, "é" * 30_000, "中" * 30_000])
def test_a_megabyte_without_a_sentence_break_is_cut_into_blocks_that_fit(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer(build_vocabulary(["word x é 中"], 60))
    report = write_shards(
        [Document("1", "t", text)], tmp_path / "c", tokenizer, limit=64, splitter="simple", tagger="none"
    )
    assert report["articles"] == 1
    assert max(map(int, report["block_lengths"])) <= 64
    corpus = Corpus.open(tmp_path / "c")
    assert "".join("".join(corpus.text(row).split()) for row in range(len(corpus))) == "".join(text.split())


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_line_builds_reports_and_shows(dump: Path, tmp_path: Path) -> None:
    arguments = ["corpus", "build", "--source", "mediawiki", "--input", dump, "--out", tmp_path / "c", "--workers", 2]
    result = run(*arguments, "--profile", "tiny", "--set", "corpus.tagger=rules+links", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {"pages", "articles", "redirects", "dropped", "blocks", "shards", "seconds", "digest"} <= set(said)
    assert (said["pages"], said["shards"]) == (42, 2)
    assert said["digest"] == read_manifest(tmp_path / "c").digest
    shown = run("corpus", "show", tmp_path / "c", "--title", "River 7")
    assert "Number 7. The Tiber is a river in Italy." in shown.stdout
    assert "Tiber; Italy" in shown.stdout
    rows = json.loads(run("corpus", "show", tmp_path / "c", "--title", "River 7", "--json").stdout)
    assert {row["doc_id"] for row in rows} == {"7"}
    with pytest.raises(DataError, match="no document titled 'river 7'"):
        CliRunner().invoke(app, ["corpus", "show", str(tmp_path / "c"), "--title", "river 7"], catch_exceptions=False)


def test_the_command_line_skips_bad_lines_when_told(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text('{"title": "T", "text": "The river."}\nnot json\n')
    arguments = ["corpus", "build", "--input", source, "--out", tmp_path / "c", "--profile", "tiny", "--json"]
    with pytest.raises(DataError, match=r"d\.jsonl:2: not JSON .*--set corpus.on_error=skip"):
        CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert json.loads(run(*arguments, "--on-error", "skip").stdout)["dropped"] == {"bad_json": 1}
