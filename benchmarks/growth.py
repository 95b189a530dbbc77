"""What growth costs beside a full pass: documents are added to a corpus whose blocks have vectors already.

    python benchmarks/growth.py DOCUMENTS.jsonl.gz --share 0.01 --documents 4000

Every (1 / share)-th document is added later. Printed are blocks embedded and CPU seconds of this process for the full
pass, for the version with the new documents, for the same version embedded in full, for a removal of as many
documents, and for a compaction.
"""

import argparse
import gzip
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from realm_core.artifacts.manifest import Manifest
from realm_core.corpus.sources import Source
from realm_core.params import load_config
from realm_core.ports import NullSink
from realm_core.stages import corpus, grow, ict, index, reembed

SINK = NullSink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents_file", type=Path, help="JSON lines with id, title and text")
    parser.add_argument("--share", type=float, default=0.01, help="of the documents that are added later")
    parser.add_argument("--documents", type=int, default=4000, help="how many lines are read")
    parser.add_argument("--profile", default="demo")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), chosen), indent=1))


def measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    with gzip.open(chosen.documents_file, "rt", encoding="utf-8") as file:
        lines = list(itertools.islice(file, chosen.documents))
    every = round(1 / chosen.share)
    later = lines[::every]
    base, new = folder / "base.jsonl", folder / "new.jsonl"
    base.write_text("".join(line for number, line in enumerate(lines) if number % every), encoding="utf-8")
    new.write_text("".join(later), encoding="utf-8")
    settings = ["ict.steps=1", "ict.batch=8", "warmup.steps=0", "corpus.on_error=skip", "runtime.threads=1"]
    config = load_config(None, chosen.profile, [*settings, "runtime.shared_threads=1"])
    first, grown, less, small = (folder / f"corpus-{number}" for number in range(4))
    checkpoint = folder / "checkpoint"
    corpus.run(config, source=base, out=first, sink=SINK)
    ict.run(config, corpus=first, out=checkpoint, sink=SINK)
    made: dict[str, Any] = {"documents": len(lines), "added": len(later)}

    def embed(name: str, of: Path, *earlier: tuple[Path, Path]) -> None:
        out = folder / f"snapshot-{name}"
        manifest, seconds = timed(
            lambda: reembed.run(config, checkpoint=checkpoint, corpus=of, out=out, sink=SINK, earlier=earlier)
        )
        record = manifest.record
        made[name] = {
            "blocks": manifest.facts["vectors"],
            "embedded": record["embedded_blocks"],
            "cpu_seconds": seconds,
            "index_cpu_seconds": timed(
                lambda: index.run(
                    config, snapshot=out, checkpoint=checkpoint, corpus=of, out=folder / f"index-{name}", sink=SINK
                )
            )[1],
        }

    def change(what: grow.Change, of: Path, out: Path) -> float:
        shards = config.corpus.shards
        return timed(lambda: grow.run(config, base=of, change=what, out=out, sink=SINK, shards=shards))[1]

    embed("full_pass", first)
    made["add_cpu_seconds"] = change(grow.Add(source=Source.find(new)), first, grown)
    embed("after_add", grown, (folder / "snapshot-full_pass", first))
    embed("after_add_in_full", grown)
    ids = [json.loads(line)["id"] for line in lines[1::every]]
    made["remove_cpu_seconds"] = change(grow.Remove(ids=ids), grown, less)
    embed("after_removal", less, (folder / "snapshot-after_add", grown))
    made["compact_cpu_seconds"] = change(grow.Compact(), less, small)
    embed("after_compaction", small, (folder / "snapshot-after_removal", less))
    return made


def timed(act: Callable[[], Manifest]) -> tuple[Manifest, float]:
    began = time.process_time()
    made = act()
    return made, round(time.process_time() - began, 2)


if __name__ == "__main__":
    main()
