"""The commands that carry published checkpoints in and out, and that check the code against reference vectors."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from realm_core.artifacts.manifest import Manifest
from realm_core.params import settings_for_command

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Option(help="Folder to create; it must not exist with another content.")]
Params = Annotated[Path | None, typer.Option(help="Settings file; ./params.yaml or the packaged one by default.")]
Profile = Annotated[str, typer.Option(help="Which profile of the settings file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override: section.key=value. May be repeated.")]
Vocab = Annotated[Path | None, typer.Option(help="Vocabulary file; by default the one beside the weights.")]
Checkpoint = Annotated[Path | None, typer.Option(help="For a reader alone: the checkpoint that retrieves for it.")]

import_app = typer.Typer(help="Published REALM checkpoints to artifacts of this project.", no_args_is_help=True)
export_app = typer.Typer(
    help="A checkpoint of this project to folders that other libraries load.", no_args_is_help=True
)
verify_app = typer.Typer(help="Check the code against reference vectors.", no_args_is_help=True)


def mount(app: typer.Typer) -> None:
    """Add `import`, `export` and `verify` to a command line."""
    app.add_typer(import_app, name="import")
    app.add_typer(export_app, name="export")
    app.add_typer(verify_app, name="verify")


@import_app.command("hf")
def import_hf(
    folders: Annotated[
        list[Path], typer.Argument(help="transformers folders, for example those of an embedder and of an encoder.")
    ],
    out: Out,
    vocab: Vocab = None,
    blocks: Annotated[Path | None, typer.Option(help="Texts of block_emb; by default block_records.npy.")] = None,
    checkpoint: Checkpoint = None,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Import RealmEmbedder, RealmScorer, RealmKnowledgeAugEncoder, RealmReader or RealmForOpenQA.

    Example: realm import hf realm-cc-news-pretrained-embedder realm-cc-news-pretrained-encoder --out build/start
    """
    from realm_core.compat.foreign import combined
    from realm_core.compat.hf import read_hf
    from realm_core.compat.importing import import_checkpoint

    found = combined([read_hf(folder, vocab, blocks) for folder in folders])
    config = settings_for_command(params, profile, set_)
    _show_all(import_checkpoint(found, config=config, out=out, checkpoint=checkpoint), as_json)


@import_app.command("tf")
def import_tf(
    paths: Annotated[
        list[Path], typer.Argument(help="TF-Hub modules, folders of fine-tuned models, or prefixes of checkpoints.")
    ],
    out: Out,
    vocab: Vocab = None,
    blocks: Annotated[
        Path | None, typer.Option(help="Texts of block_emb: a TFRecord file or block_records.npy.")
    ] = None,
    titles: Annotated[Path | None, typer.Option(help="Titles of the blocks, in the same order.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; hidden size / 64 by default.", min=1)] = None,
    max_span_width: Annotated[int, typer.Option(help="Longest answer of a reader, in wordpieces.", min=1)] = 10,
    checkpoint: Checkpoint = None,
    params: Params = None,
    profile: Profile = "demo",
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Import what the original code published; TensorFlow is not needed.

    Example: realm import tf cc_news_pretrained/embedder cc_news_pretrained/bert --out build/start
    """
    from realm_core.compat.foreign import combined
    from realm_core.compat.importing import import_checkpoint
    from realm_core.compat.tf import read_tf

    found = combined([read_tf(path, vocab, blocks, titles, heads, max_span_width) for path in paths])
    config = settings_for_command(params, profile, set_)
    _show_all(import_checkpoint(found, config=config, out=out, checkpoint=checkpoint), as_json)


@export_app.command("hf")
def export_hf(
    checkpoint: Annotated[Path, typer.Argument(help="An ICT, REALM or imported checkpoint folder.")],
    out: Out,
    reader: Annotated[Path | None, typer.Option(help="A reader fine-tuned from it.")] = None,
    index: Annotated[Path | None, typer.Option(help="An index made from it.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="The corpus of the index.")] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(help="The vectors of the index, for a RealmForOpenQA; an exact index has them itself."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write folders for transformers, sentence-transformers and FAISS, with a model card.

    Example: realm export hf .realm/checkpoints/r1-s0000120 --out build/export
    """
    from realm_core.compat.export import export_hf as export

    manifest = export(checkpoint=checkpoint, out=out, reader=reader, index=index, corpus=corpus, snapshot=snapshot)
    _show_all({out: manifest}, as_json)


@verify_app.command("golden")
def verify_golden(
    folder: Annotated[Path, typer.Argument(help="A folder of reference vectors.")],
    as_json: AsJson = False,
) -> None:
    """Run every reference case; exit code 1 if one misses or cannot run."""
    from realm_core.compat.golden import run_golden, summarise

    lines = summarise(run_golden(folder))
    passed = all(line.ok for line in lines)
    if as_json:
        rows = [
            {
                "case": line.case,
                "precision": line.precision,
                "ok": line.ok,
                "largest_error": line.error if math.isfinite(line.error) else None,
                "message": line.message,
            }
            for line in lines
        ]
        print(json.dumps({"passed": passed, "cases": rows}, ensure_ascii=False))
    else:
        width = max(len(line.case) for line in lines)
        for line in lines:
            verdict = "ok  " if line.ok else "MISS"
            print(f"{verdict} {line.case:{width}} {line.precision:8} {line.error:9.2e}  {line.message}")
    if not passed:
        raise typer.Exit(1)


def _show_all(made: Mapping[Path, Manifest], as_json: bool) -> None:
    """Print what was made, folder by folder."""
    if as_json:
        print(json.dumps({str(folder): _summary(manifest) for folder, manifest in made.items()}, ensure_ascii=False))
        return
    for folder, manifest in made.items():
        print(folder)
        for key, value in _summary(manifest).items():
            print(f"  {key}: {value}")


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {"stage": manifest.stage, "digest": manifest.digest, **manifest.facts}
