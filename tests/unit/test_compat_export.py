"""Exported folders in the hands of the libraries they are for, and back again."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from realm_core.artifacts.manifest import Plan, read_manifest
from realm_core.artifacts.publish import building
from realm_core.compat.export import export_hf
from realm_core.compat.foreign import combined
from realm_core.compat.hf import read_hf
from realm_core.compat.importing import import_checkpoint
from realm_core.compat.projection import rescaled
from realm_core.compat.tf import read_tf
from realm_core.corpus.shards import Corpus
from realm_core.data.formats import Inputs, document_inputs, query_inputs
from realm_core.errors import ArtifactError, DataError
from realm_core.index.backends import load_index
from realm_core.model.bundle import RealmModel, load_retriever
from realm_core.model.embedder import Embedder, Retriever
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.params import load_config
from realm_core.stages.finetune import load_reader
from realm_core.text.tokenizer import Tokenizer
from tests.published import (
    PROJECTION,
    SHAPE,
    SPAN_WIDTH,
    TEXTS,
    VOCABULARY,
    open_qa_state,
    port_folder,
    scorer_state,
    tf_embedder,
    tf_reader,
    weights,
    write_bundle,
    write_tf_records,
)

QUERIES = ["who is the king of rome?", "a text with [SEP] and [CLS] in it", "b\u00f6rn IN Paris, 12", "x"]
DOCUMENTS = [("paris", "the river of the city."), ("newton", "curie"), ("", "moon")]


def imported(out: Path, folders: list[Path], **options: Any) -> Path:
    import_checkpoint(
        combined([read_hf(folder) for folder in folders]), config=load_config(None, "tiny"), out=out, **options
    )
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    names = ("RealmEmbedder", "RealmKnowledgeAugEncoder")
    return imported(folder / "checkpoint", [port_folder(folder / name, name) for name in names])


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    export_hf(checkpoint=checkpoint, out=checkpoint.parent / "export")
    return checkpoint.parent / "export"


def own_checkpoint(folder: Path, eps: float, share: bool = True) -> Path:
    """A checkpoint as the stages write it, with any epsilon in the projection."""
    retriever = Retriever(SHAPE, PROJECTION, eps, share=share)
    retriever.load_state_dict(weights(retriever, seed=7))
    encoder = KnowledgeEncoder(SHAPE)
    encoder.load_state_dict(weights(encoder, seed=8))
    with building(folder, Plan(stage="ict", code="1", config_digest="")) as build:
        RealmModel(retriever, encoder, Tokenizer(VOCABULARY)).save(build.folder)
        build.commit({"step": 0, "metrics": {"ict/accuracy": 0.75}})
    return folder


def embedded(tower: Embedder, inputs: list[Inputs]) -> np.ndarray:
    with torch.inference_mode():
        rows = [
            tower.eval()(*(torch.from_numpy(array)[None] for array in (x.token_ids, x.segment_ids, x.mask)))
            for x in inputs
        ]
    return torch.cat(rows).numpy()


def assert_encodes_like(folder: Path, tower: Embedder, tokenizer: Tokenizer) -> None:
    library = pytest.importorskip("sentence_transformers")
    encode = library.SentenceTransformer(str(folder), device="cpu").encode
    queries = [query_inputs(tokenizer.ids(text), None, tokenizer) for text in QUERIES]
    np.testing.assert_allclose(encode(QUERIES), embedded(tower, queries), atol=1e-5)
    documents = [
        document_inputs(tokenizer.ids(a), tokenizer.ids(b), SHAPE.max_positions, tokenizer) for a, b in DOCUMENTS
    ]
    np.testing.assert_allclose(encode(DOCUMENTS), embedded(tower, documents), atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_gives_the_vectors_of_the_embedder(checkpoint: Path, exported: Path) -> None:
    retriever, tokenizer = load_retriever(checkpoint)
    assert_encodes_like(exported / "embedder", retriever.embedder, tokenizer)


def test_a_projection_with_the_epsilon_of_the_ict_code_gives_the_same_vectors_too(tmp_path: Path) -> None:
    export_hf(checkpoint=own_checkpoint(tmp_path / "c", eps=1e-3, share=False), out=tmp_path / "out")
    retriever, tokenizer = load_retriever(tmp_path / "c")
    assert_encodes_like(tmp_path / "out" / "embedder", retriever.document_tower, tokenizer)
    assert_encodes_like(tmp_path / "out" / "query_embedder", retriever.query_tower, tokenizer)


@pytest.mark.parametrize(("eps", "new_eps"), [(1e-12, 1e-5), (1e-3, 1e-12), (1e-3, 1e-5), (1e-5, 1e-5)])
def test_a_scaled_layer_does_to_a_norm_what_another_epsilon_does(eps: float, new_eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = weight * 0.01, torch.randn(5, generator=generator, dtype=torch.float64) * 0.01
    new_weight, new_bias = rescaled(weight, bias, eps, new_eps)
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(
        norm(inputs @ new_weight.T + new_bias, (5,), eps=new_eps), norm(inputs @ weight.T + bias, (5,), eps=eps)
    )


def test_transformers_gives_the_hidden_states_of_the_backbone_and_the_logits_of_the_encoder(
    checkpoint: Path, exported: Path
) -> None:
    import transformers

    model = RealmModel.load(checkpoint)
    model.train(False)
    ids = torch.randint(5, len(VOCABULARY), (3, 9), generator=torch.Generator().manual_seed(0))
    segments = (torch.arange(9) > 4).long().expand(3, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "token_type_ids": segments, "attention_mask": mask}
    real = mask.bool()
    with torch.inference_mode():
        backbone = transformers.AutoModel.from_pretrained(exported / "embedder")
        assert type(backbone) is transformers.BertModel
        found = backbone(**inputs)
        hidden = model.retriever.embedder.realm(ids, segments, mask)
        torch.testing.assert_close(found.last_hidden_state[real], hidden[real], atol=1e-5, rtol=0)
        torch.testing.assert_close(found.pooler_output, model.retriever.embedder.realm.pool(hidden), atol=1e-5, rtol=0)
        masked_lm = transformers.AutoModelForMaskedLM.from_pretrained(exported / "encoder")
        assert type(masked_lm) is transformers.BertForMaskedLM
        logits = model.encoder(ids, segments, mask, torch.arange(9).expand(3, 9))
        torch.testing.assert_close(masked_lm(**inputs).logits[real], logits[real], atol=1e-5, rtol=0)


def test_the_exported_tokenizer_gives_the_ids_of_the_projects_own(checkpoint: Path, exported: Path) -> None:
    import transformers

    _, ours = load_retriever(checkpoint)
    theirs = transformers.AutoTokenizer.from_pretrained(exported / "encoder")
    assert theirs.model_max_length == SHAPE.max_positions
    for text in QUERIES:
        assert theirs(text)["input_ids"] == [ours.cls_id, *ours.ids(text), ours.sep_id]


def test_import_export_import_changes_no_bit(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    again = imported(tmp_path / "again", [exported / "realm" / "retriever", exported / "realm" / "encoder"])
    assert read_manifest(again).files == read_manifest(checkpoint).files


@pytest.mark.parametrize("share", [True, False])
def test_a_projection_with_another_epsilon_comes_back_unchanged(tmp_path: Path, share: bool) -> None:
    first = own_checkpoint(tmp_path / "c", eps=1e-3, share=share)
    export_hf(checkpoint=first, out=tmp_path / "out")
    parts = [tmp_path / "out" / "realm" / name for name in ("retriever", "encoder")]
    again = imported(tmp_path / "again", parts)
    assert read_manifest(again).files == read_manifest(first).files
    assert load_retriever(again)[0].embedder.projection_eps == 1e-3


def test_a_tensorflow_module_with_keras_norm_comes_back_unchanged(tmp_path: Path) -> None:
    variables = {name.replace("module/LayerNorm", "module/layer_normalization"): v for name, v in tf_embedder().items()}
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    found = read_tf(write_bundle(tmp_path / "m", variables), tmp_path / "vocab.txt", heads=SHAPE.heads)
    import_checkpoint(found, config=load_config(None, "tiny"), out=tmp_path / "first")
    export_hf(checkpoint=tmp_path / "first", out=tmp_path / "out")
    again = imported(tmp_path / "again", [tmp_path / "out" / "realm" / "retriever"])
    assert read_manifest(again).files == read_manifest(tmp_path / "first").files


def test_a_reader_of_the_port_without_the_exact_projection_reads_the_scaled_one(tmp_path: Path) -> None:
    export_hf(checkpoint=own_checkpoint(tmp_path / "c", eps=1e-3), out=tmp_path / "out")
    folder = tmp_path / "out" / "realm" / "retriever"
    exact = read_hf(folder).retriever
    (folder / "projection.safetensors").unlink()
    scaled = read_hf(folder).retriever
    assert exact is not None and scaled is not None and scaled.projection_eps == SHAPE.layer_norm_eps
    towers = [Retriever(SHAPE, PROJECTION, part.projection_eps) for part in (exact, scaled)]
    for tower, part in zip(towers, (exact, scaled), strict=True):
        tower.load_state_dict(part.tensors)
    inputs = [query_inputs([5, 6, 7], None, Tokenizer(VOCABULARY))]
    first, second = (embedded(tower.embedder, inputs) for tower in towers)
    np.testing.assert_allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("change", ["dense trained on", "no epsilon", "one layer only", "unknown layer"])
def test_an_exact_projection_that_does_not_belong_to_the_weights_is_refused(tmp_path: Path, change: str) -> None:
    export_hf(checkpoint=own_checkpoint(tmp_path / "c", eps=1e-3), out=tmp_path / "out")
    folder = tmp_path / "out" / "realm" / "retriever"
    name = "model.safetensors" if change == "dense trained on" else "projection.safetensors"
    tensors = load_file(folder / name)
    if change == "dense trained on":
        tensors["cls.dense.weight"] += 1
    elif change == "unknown layer":
        tensors["other.cls.dense.bias"] = torch.zeros(1)
    else:
        del tensors["projection_eps" if change == "no epsilon" else "cls.dense.bias"]
    save_file(tensors, folder / name)
    with pytest.raises(DataError, match=r"projection\.safetensors: no"):
        read_hf(folder)


def test_a_reader_with_another_epsilon_comes_back_unchanged(tmp_path: Path) -> None:
    first = own_checkpoint(tmp_path / "c", eps=1e-12)
    port = port_folder(tmp_path / "r", "RealmReader", reader_layer_norm_eps=1e-5)
    reader = imported(tmp_path / "reader", [port], checkpoint=first)
    assert load_reader(reader).qa_outputs.layer_normalization.eps == 1e-5
    export_hf(checkpoint=first, out=tmp_path / "out", reader=reader)
    back = imported(tmp_path / "back", [tmp_path / "out" / "realm" / "reader"], checkpoint=first)
    assert read_manifest(back).files == read_manifest(reader).files


def test_two_towers_and_a_reader_come_back_unchanged_too(tmp_path: Path) -> None:
    first = imported(tmp_path / "first", [port_folder(tmp_path / "s", "RealmScorer", scorer_state(query_seed=5))])
    reader = imported(tmp_path / "reader", [port_folder(tmp_path / "r", "RealmReader")], checkpoint=first)
    out = tmp_path / "out"
    made = export_hf(checkpoint=first, out=out, reader=reader)
    assert made.facts["classes"] == {"retriever": "RealmScorer", "reader": "RealmReader"}
    assert not (out / "encoder").exists()
    second = imported(tmp_path / "second", [out / "realm" / "retriever"])
    assert read_manifest(second).files == read_manifest(first).files
    back = imported(tmp_path / "back", [out / "realm" / "reader"], checkpoint=second)
    assert read_manifest(back).files == read_manifest(reader).files


PARTS = ("checkpoint", "corpus", "snapshot", "index", "reader")


def exported_parts(folder: Path, out: Path, *left_out: str) -> Path:
    """An export of all parts of an imported RealmForOpenQA."""
    export_hf(**{name: folder / name for name in PARTS if name not in left_out}, out=out)
    return out / "realm" / "open_qa"


@pytest.mark.parametrize("settings", [{}, {"layer_norm_eps": 1e-6, "reader_layer_norm_eps": 1e-5}])
@pytest.mark.parametrize("given", ["a snapshot", "an exact index"])
def test_an_open_qa_model_comes_back_unchanged_with_its_vectors_and_texts(
    tmp_path: Path, settings: dict[str, float], given: str
) -> None:
    config = load_config(None, "tiny", ["corpus.shards=3", "index.backend=exact"])
    import_checkpoint(
        read_hf(port_folder(tmp_path / "hf", "RealmForOpenQA", **settings)), config=config, out=tmp_path / "first"
    )
    left_out = () if given == "a snapshot" else ("snapshot",)
    folder = exported_parts(tmp_path / "first", tmp_path / "out", *left_out)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".txt", ".tfr"}
    import_checkpoint(read_hf(folder), config=config, out=tmp_path / "again")
    for name in PARTS:
        assert read_manifest(tmp_path / "again" / name).files == read_manifest(tmp_path / "first" / name).files, name


def test_titles_of_blocks_come_back_too(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    write_tf_records(tmp_path / "blocks.tfr", [text.encode() for text in TEXTS])
    write_tf_records(tmp_path / "titles.tfr", [text[:3].encode() for text in TEXTS])
    variables = {**tf_embedder(depth=4), **tf_reader(), "block_emb": open_qa_state()["block_emb"].numpy()}
    files = [tmp_path / name for name in ("vocab.txt", "blocks.tfr", "titles.tfr")]
    found = read_tf(write_bundle(tmp_path / "m", variables), *files, heads=SHAPE.heads, max_span_width=SPAN_WIDTH)
    config = load_config(None, "tiny")
    import_checkpoint(found, config=config, out=tmp_path / "first")
    folder = exported_parts(tmp_path / "first", tmp_path / "out")
    import_checkpoint(read_hf(folder), config=config, out=tmp_path / "again")
    for name in PARTS:
        assert read_manifest(tmp_path / "again" / name).files == read_manifest(tmp_path / "first" / name).files, name


def test_an_index_that_may_have_rounded_its_vectors_makes_no_open_qa_model(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    config = load_config(None, "tiny", ["index.backend=faiss_flat"])
    import_checkpoint(read_hf(port_folder(tmp_path / "hf", "RealmForOpenQA")), config=config, out=tmp_path / "qa")
    assert not exported_parts(tmp_path / "qa", tmp_path / "out", "snapshot").exists()
    assert exported_parts(tmp_path / "qa", tmp_path / "whole").is_dir()


@pytest.mark.parametrize("backend", ["exact", "faiss_flat", "alsh"])
def test_faiss_finds_the_rows_of_the_table(tmp_path: Path, backend: str) -> None:
    faiss = pytest.importorskip("faiss")
    config = load_config(None, "tiny", [f"index.backend={backend}"])
    import_checkpoint(read_hf(port_folder(tmp_path / "hf", "RealmForOpenQA")), config=config, out=tmp_path / "qa")
    parts = {name: tmp_path / "qa" / name for name in ("checkpoint", "reader", "index", "corpus")}
    export_hf(**parts, out=tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "passages" / "passages.parquet").to_pylist()
    blocks = Corpus.open(parts["corpus"])
    assert [row["text"] for row in table] == blocks.texts(range(len(blocks)))
    assert [row["row"] for row in table] == list(range(len(TEXTS)))
    assert [row["block_id"] for row in table] == blocks.block_ids.tolist()
    queries = torch.randn(6, PROJECTION, generator=torch.Generator().manual_seed(1))
    exact = load_index(parts["index"]).search(queries, len(TEXTS))[1]
    found = faiss.read_index(str(tmp_path / "out" / "passages" / "index.faiss")).search(queries.numpy(), len(TEXTS))[1]
    np.testing.assert_array_equal(found, exact.numpy())


def test_a_question_tower_that_was_fine_tuned_is_exported_beside_the_embedder(tmp_path: Path) -> None:
    first = own_checkpoint(tmp_path / "c", eps=1e-12)
    reader = imported(tmp_path / "r", [port_folder(tmp_path / "hf", "RealmReader")], checkpoint=first)
    tuned = Embedder(SHAPE, PROJECTION)
    tuned.load_state_dict(weights(tuned, seed=11))
    plan = Plan(stage="finetune", code="1", config_digest="", parents={"checkpoint": read_manifest(first)})
    with building(tmp_path / "tuned", plan) as build:
        for name in ("reader.safetensors", "reader.json"):
            (build.folder / name).write_bytes((reader / name).read_bytes())
        save_file(tuned.state_dict(), build.folder / "question_tower.safetensors")
        build.commit({"metrics": {}})
    export_hf(checkpoint=first, reader=tmp_path / "tuned", out=tmp_path / "out")
    _, tokenizer = load_retriever(first)
    assert_encodes_like(tmp_path / "out" / "question_embedder", tuned, tokenizer)
    assert 'SentenceTransformer("question_embedder")' in (tmp_path / "out" / "README.md").read_text()


def test_a_question_tower_that_was_fine_tuned_comes_back_alone_and_in_an_open_qa_model(tmp_path: Path) -> None:
    config = load_config(None, "tiny", ["index.backend=exact"])
    import_checkpoint(read_hf(port_folder(tmp_path / "q", "RealmForOpenQA")), config=config, out=tmp_path / "qa")
    tuned = Embedder(SHAPE, PROJECTION)
    tuned.load_state_dict(weights(tuned, seed=11))
    parents = {"checkpoint": read_manifest(tmp_path / "qa" / "checkpoint")}
    with building(tmp_path / "tuned", Plan(stage="finetune", code="1", config_digest="", parents=parents)) as build:
        for name in ("reader.safetensors", "reader.json"):
            (build.folder / name).write_bytes((tmp_path / "qa" / "reader" / name).read_bytes())
        save_file(tuned.state_dict(), build.folder / "question_tower.safetensors")
        build.commit({"metrics": {}})
    parts = {name: tmp_path / "qa" / name for name in PARTS} | {"reader": tmp_path / "tuned"}
    export_hf(**parts, out=tmp_path / "out")
    for name in ("question_embedder", "open_qa"):
        part = read_hf(tmp_path / "out" / "realm" / name).retriever
        assert part is not None
        for key, tensor in tuned.state_dict().items():
            assert torch.equal(part.tensors[f"embedder.{key}"], tensor)


def test_the_model_card_says_what_is_there_and_where_it_comes_from(tmp_path: Path) -> None:
    checkpoint = own_checkpoint(tmp_path / "c", eps=1e-12)
    made = export_hf(checkpoint=checkpoint, out=tmp_path / "out")
    _, header, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    manifest = read_manifest(checkpoint)
    assert yaml.safe_load(header)["realm"] == {"checkpoint": manifest.digest}
    for told in (manifest.digest, manifest.record["git"][:20], "| checkpoint | ict/accuracy | 0.75 |"):
        assert told in body
    folders = {line.split("`")[1] for line in body.splitlines() if line.startswith("- `")}
    assert folders == {"embedder/", "encoder/", "realm/retriever/", "realm/encoder/"}
    assert all((tmp_path / "out" / folder).is_dir() for folder in folders)
    assert made.parents == {"checkpoint": manifest.digest}


def test_no_exported_file_is_a_pickle(exported: Path) -> None:
    kinds = {path.suffix for path in exported.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt", ".md"}


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    other = own_checkpoint(tmp_path / "c", eps=1e-12)
    reader = imported(tmp_path / "r", [port_folder(tmp_path / "hf", "RealmReader")], checkpoint=other)
    import_checkpoint(
        read_hf(port_folder(tmp_path / "q", "RealmForOpenQA")), config=load_config(None, "tiny"), out=tmp_path / "qa"
    )
    corpus, index = tmp_path / "qa" / "corpus", tmp_path / "qa" / "index"
    cases: dict[str, dict[str, Path]] = {
        "made from checkpoint": {"reader": reader},
        "made from checkpoint .*pass the checkpoint": {"index": index, "corpus": corpus},
        "both --index and --corpus": {"index": index},
        "this is not a fine-tuned reader": {"reader": corpus},
        "this is not an index": {"index": corpus, "corpus": corpus},
    }
    for message, parts in cases.items():
        with pytest.raises(ArtifactError, match=message):
            export_hf(checkpoint=checkpoint, out=tmp_path / "out", **parts)
    with pytest.raises(ArtifactError, match="this is not a checkpoint"):
        export_hf(checkpoint=corpus, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_checkpoint_is_not_exported(tmp_path: Path) -> None:
    checkpoint = own_checkpoint(tmp_path / "c", eps=1e-12)
    path = checkpoint / "embedder.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"embedder\.safetensors: sha256"):
        export_hf(checkpoint=checkpoint, out=tmp_path / "out")
