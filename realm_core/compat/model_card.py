"""The model card of an exported folder: what lies where, how to load it, and what it was made from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from realm_core import __version__
from realm_core.artifacts.manifest import Manifest

_HOW = {
    "embedder": "vectors of documents (pass pairs of title and text) and, where it stands alone, of questions",
    "query_embedder": "vectors of queries; this model has two towers",
    "question_embedder": "vectors of questions after fine-tuning; only for the index it was tuned on",
}


@dataclass(kw_only=True)
class Contents:
    """What was written."""

    width: int  # of the vectors
    length: int  # longest input in wordpieces
    towers: list[str] = field(default_factory=list)  # folders
    classes: dict[str, str] = field(default_factory=dict)  # folder below realm/ -> class of transformers
    passages: int = 0  # rows of the table and of the index

    def with_passages(self, rows: int) -> "Contents":
        return replace(self, passages=rows)


def model_card(manifests: Mapping[str, Manifest], contents: Contents) -> str:
    """README.md with a YAML header. `manifests` are the exported artifacts by role, the checkpoint among them."""
    header = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["realm", "retrieval-augmented", "open-domain-question-answering", "bert"],
        "realm": {role: manifest.digest for role, manifest in manifests.items()},
    }
    sections = [*_folders(contents), *_use(contents), *_provenance(manifests), *_metrics(manifests)]
    title = "# REALM checkpoint\n\nRetriever and knowledge-augmented encoder after Guu et al. 2020, "
    body = f"{title}exported by realm-ops {__version__}.\n\n" + "\n".join(sections)
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{body}\n"


def _folders(contents: Contents) -> Iterator[str]:
    yield "## Folders\n"
    for name in contents.towers:
        yield f"- `{name}/`: {_HOW[name]}; {contents.width} numbers, inner product, not normalised"
    if "encoder" in contents.classes:
        yield "- `encoder/`: the knowledge-augmented encoder as BertForMaskedLM; its input is `query [SEP] document`"
    for name, architecture in contents.classes.items():
        yield f"- `realm/{name}/`: the layout of transformers' {architecture} (version 4.40)"
    if "open_qa" in contents.classes:
        yield "  with `block_emb`, and the texts of its rows as TFRecord files: the object array of the port is a pickle"
    if contents.passages:
        yield f"- `passages/`: FAISS index over {contents.passages} passages, and their texts in the order of its rows"


def _use(contents: Contents) -> Iterator[str]:
    yield "\n## Use\n\n```python"
    yield "from sentence_transformers import SentenceTransformer\n"
    yield 'documents = SentenceTransformer("embedder").encode([("Title", "Text of the passage.")])'
    asking = contents.towers[-1]
    yield f'questions = SentenceTransformer("{asking}").encode(["a question"])'
    yield "scores = questions @ documents.T"
    if contents.passages:
        yield "\nimport faiss, pandas\n"
        yield 'index = faiss.read_index("passages/index.faiss")'
        yield 'table = pandas.read_parquet("passages/passages.parquet")'
        yield "_, rows = index.search(questions, 5)\nprint(table.iloc[rows[0]])"
    yield "```\n"
    yield "The masked-LM heads that the Realm classes of embedder and reader carry unused are not part of the files; those"
    yield f"classes report them as newly initialised. Inputs longer than {contents.length} wordpieces are cut."


def _provenance(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    yield "\n## Provenance\n"
    yield "| part | stage | digest | made from | code |"
    yield "| --- | --- | --- | --- | --- |"
    for role, manifest in manifests.items():
        origins = {**manifest.parents, **manifest.sources}
        made_from = ", ".join(f"{name} {digest[:12]}" for name, digest in origins.items()) or "nothing recorded"
        code = f"{manifest.stage} {manifest.code}, git {str(manifest.record.get('git', 'unknown'))[:20]}"
        yield f"| {role} | {_stage(manifest)} | `{manifest.digest}` | {made_from} | {code} |"
    listed = [manifest.facts.get("notes") for manifest in manifests.values()]
    notes = [note for each in listed if isinstance(each, list) for note in each]
    yield from (f"\nNote: {note}." for note in dict.fromkeys(notes))


def _stage(manifest: Manifest) -> str:
    step = manifest.facts.get("step")
    return manifest.stage if step is None else f"{manifest.stage}, step {step}"


def _metrics(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    rows = [
        f"| {role} | {name} | {value:.6g} |"
        for role, manifest in manifests.items()
        for name, value in _numbers(manifest.facts.get("metrics")).items()
    ]
    yield "\n## Metrics\n"
    if rows:
        yield "As recorded by the stage that made each part.\n\n| part | metric | value |\n| --- | --- | --- |"
        yield from rows
    else:
        yield "None were recorded by the stages that made these parts."


def _numbers(metrics: Any) -> dict[str, float]:
    found = metrics if isinstance(metrics, dict) else {}
    return {str(name): value for name, value in found.items() if isinstance(value, int | float)}
