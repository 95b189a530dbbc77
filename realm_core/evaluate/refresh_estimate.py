"""What a refresh would change, for a fraction of its price: a fixed sample of blocks and questions, embedded by the checkpoint
behind the live index and by the new one, and searched by exact search."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from realm_core.artifacts.manifest import read_manifest, verify_files
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.data.formats import Ids
from realm_core.evaluate.drift import index_drift
from realm_core.index.embed import embed_blocks, embed_queries
from realm_core.index.exact import exact_search
from realm_core.index.version import require_parent
from realm_core.model.bundle import EMBEDDER, load_retriever
from realm_core.model.device import resolve
from realm_core.train.update import seed_of


def estimate_refresh(
    config: Config,
    *,
    checkpoint: Path,
    live_index: Path,
    live_checkpoint: Path,
    corpus: Path,
    questions: Sequence[str] = (),
) -> dict[str, int | float]:
    """`top_k_overlap` and the measures of `displacement` between `checkpoint` and the live version, on the sample.

    The sample is the same for every checkpoint of a corpus: `refresh.drift_blocks` blocks drawn by the seed, and the first
    `refresh.drift_queries` questions, or the titles of sampled blocks where there is no question. The vectors of the live
    version are embedded again as well: that costs less than to read and verify a whole snapshot.
    Raises ArtifactError if a weight changed or the live parts do not belong together.
    """
    settings = config.refresh
    require_parent(live_index, read_manifest(live_index), "checkpoint", live_checkpoint)
    require_parent(live_index, read_manifest(live_index), "corpus", corpus)
    blocks = Corpus.open(corpus)
    rng = np.random.default_rng(seed_of(config.seed, "refresh estimate"))
    rows = np.sort(rng.choice(len(blocks), size=min(settings.drift_blocks, len(blocks)), replace=False)).tolist()
    asked = blocks.tokenizer.batch_ids(list(questions[: settings.drift_queries]))
    asked = asked or [blocks.title_ids(row).tolist() for row in rows[: settings.drift_queries]]
    old, new = (_embed(config, folder, blocks, rows, asked) for folder in (live_checkpoint, checkpoint))
    k = min(settings.drift_k, len(rows))
    found = [
        exact_search(torch.from_numpy(queries), torch.from_numpy(vectors), k)[1] for queries, vectors in (old, new)
    ]
    return index_drift(old_rows=found[0], new_rows=found[1], old_vectors=old[1], new_vectors=new[1])


def _embed(
    config: Config, checkpoint: Path, blocks: Corpus, rows: Sequence[int], asked: Sequence[Ids]
) -> tuple[Float[np.ndarray, "Q D"], Float[np.ndarray, "N D"]]:
    """(query vectors, block vectors) of the sample."""
    verify_files(checkpoint, read_manifest(checkpoint), only=EMBEDDER)
    device = resolve(config.runtime, shared=True)
    retriever, tokenizer = load_retriever(checkpoint)
    retriever.to(device.torch_device)
    longest = retriever.query_tower.shape.max_positions - 2
    queries = embed_queries(
        retriever, [ids[:longest] for ids in asked], tokenizer=tokenizer, length=None, device=device
    )
    length, batch = config.lengths.document, config.reembed.batch
    return queries, embed_blocks(
        retriever, blocks, rows, tokenizer=tokenizer, length=length, batch=batch, device=device
    )
