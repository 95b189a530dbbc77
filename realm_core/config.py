"""Settings as one frozen, validated `Config`. Unknown keys and impossible values are refused; `params` reads them from files.

The defaults are the constants of the paper and of the original code; a profile names what it changes. Every stage declares
the sections it reads, and the digest over exactly those goes into its manifest.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from realm_core.errors import ConfigError

# How the loop is run, not what it computes: these sections may change under a home that trains. They touch no digest of a
# checkpoint, snapshot, index or score; a verdict under another gate is given again (realm qualify --again).
OPERATION = ("gate", "refresh", "retention", "supervise", "retrain")
SAVING = {"ict", "warmup", "reader"}  # sections whose checkpoint_every is that of interim states
RANDOM_MASK_RATE = 0.15  # share of a sentence's wordpieces that the random schemes mask, as in BERT


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class RuntimeConfig(Section):
    """Where and how numbers are computed."""

    device: Literal["auto", "cpu", "cuda", "xla"] = "auto"  # xla: through torch_xla, where that is installed
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the processor computes in it, else fp32
    threads: int = Field(0, ge=0)  # torch threads of a stage that has the machine for itself; 0 leaves torch's choice
    shared_threads: int = Field(0, ge=0)  # the same while trainer and refresh run side by side
    # Processes of this machine that ICT and pre-training share their batches among; torchrun's own number goes before it.
    # Not part of any digest: a run may go on with another number.
    processes: PositiveInt = 1
    static_shapes: bool = False  # pad every training batch to its longest possible size instead of trimming it


class CorpusConfig(Section):
    """How documents become tokenised blocks."""

    shards: int = Field(64, ge=1, le=4096)
    block_wordpieces: int = Field(288, ge=16)  # title and three special tokens included
    splitter: Literal["syntok", "simple"] = "syntok"
    tagger: str = "rules"  # finds the salient spans
    on_error: Literal["fail", "skip"] = "fail"  # what a malformed line does


class ModelConfig(Section):
    """The transformer behind the retriever, the knowledge-augmented encoder and the reader."""

    weights: str = "hub:google-bert/bert-base-uncased"  # hub:NAME[@REVISION], package:NAME, folder:PATH or random
    weights_sha256: str | None = None  # of model.safetensors; checked before the file is opened
    vocabulary_sha256: str | None = None
    layers: PositiveInt | None = None  # use only the first layers of the weights; None keeps all
    encoder_layers: PositiveInt | None = None  # the same for encoder and reader alone; None: as many as the retriever
    vocabulary_size: PositiveInt = 4000  # the next five describe random weights and their own small vocabulary
    hidden_size: PositiveInt = 768
    heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    max_positions: PositiveInt = 512
    dropout: float = Field(0.1, ge=0, lt=1)
    projection_size: PositiveInt = 128
    projection_eps: float = Field(1e-12, gt=0)  # 1e-12: released weights; 1e-3: the public ICT code
    share_embedders: bool = True  # one tower for queries and documents, as released


class LengthsConfig(Section):
    """Sequence lengths in wordpieces, special tokens included. The joint input is query + document."""

    ict_query: int = Field(64, ge=8)
    query: int = Field(96, ge=8)
    document: int = Field(288, ge=16)
    reader: int = Field(320, ge=24)

    @property
    def joint(self) -> int:
        return self.query + self.document


class OptimizerConfig(Section):
    """Which update rule all training stages use."""

    kind: Literal["bert_adam", "adamw"] = "bert_adam"
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)


class Scheduled(Section):
    """Of a stage that trains: its rate rises from 0 over the warm-up and falls to 0 at the last step."""

    steps: PositiveInt
    # Updates of the warm-up. None: the original's min(10000, max(100, steps / 10)), longer than a run of 100 steps.
    warmup_steps: PositiveInt | None = None


class InParts(Scheduled):
    """Of a stage whose steps can be computed in parts: in micro-batches, one after another or in several processes."""

    batch: PositiveInt
    micro_batch: PositiveInt | None = None  # examples in one forward pass; None: a process's whole share of the batch


class IctConfig(InParts):
    """Inverse cloze task: a sentence finds the block it came from."""

    steps: PositiveInt = 100_000
    batch: PositiveInt = 4096
    lr: float = Field(1e-4, gt=0)
    mask_rate: float = Field(0.9, ge=0, le=1)  # share of pairs whose sentence is taken out of the block
    checkpoint_every: PositiveInt = 1000  # steps between two interim states, which a killed stage goes on from


class WarmupConfig(InParts):
    """Masked-LM warm-up of the encoder on (masked sentence + a document that helps, or the null document)."""

    steps: int = Field(0, ge=0)  # 0: the weights bring a trained MLM head
    batch: PositiveInt = 32
    lr: float = Field(1e-4, gt=0)
    null_rate: float = Field(0.25, ge=0, le=1)  # share of examples read beside the null document
    span_rate: float = Field(0.5, ge=0, le=1)  # share of examples with salient spans; the rest mask random tokens
    probe_queries: PositiveInt = 128  # held-out sentences that show whether a document helps
    probe_every: int = Field(0, ge=0)  # steps between two looks; 0 looks at the end only
    # Nats a masked wordpiece gained from the right document that end the warm-up early; joint training wants as many.
    ready_gain: float | None = None
    checkpoint_every: PositiveInt = 1000  # steps between two interim states


class PretrainConfig(InParts):
    """REALM pre-training: retriever and encoder learn together."""

    steps: PositiveInt = 200_000
    batch: PositiveInt = 512
    lr: float = Field(3e-5, gt=0)  # knowledge-augmented encoder
    embedder_lr: float = Field(3e-5, gt=0)  # retriever; keep it at or below lr
    candidates: int = Field(8, ge=2)  # the null document included
    # Wordpieces to predict in one query. None: 10, or the share that a random scheme masks of the longest query.
    max_masks: PositiveInt | None = None
    masking: Literal["salient", "random_token", "random_span"] = "salient"
    marginal: Literal["token", "joint"] = "token"  # token: released code; joint: the paper's equation
    checkpoint_every: PositiveInt = 500
    keep: int = Field(5, ge=2)  # newest checkpoints kept beside the best and what an index or a reader still uses
    checkpointing: bool = False  # gradient checkpointing
    max_nan_steps: PositiveInt = 3  # non-finite losses in a row that end the run
    guard_window: PositiveInt = 50  # steps over which p(null) is averaged to notice a collapse
    max_null_probability: float = Field(0.95, gt=0, le=1)  # a higher mean ends the run; 1 switches the guard off
    guard_utility_steps: int = Field(0, ge=0)  # the run ends when mean utility over so many is not above 0; 0: never
    trivial: Literal["uid", "near_duplicate"] = "uid"  # candidates dropped as too easy; uid: released code
    near_duplicate_share: float = Field(
        0.5, gt=0, le=1
    )  # of the shorter text's 8-wordpiece shingles that both texts hold
    require_ready: bool = False  # refuse a run whose encoder the probe does not find ready; false: warn
    # Steps; the trainer waits while a younger index may still come. None: it never waits, as in the original code.
    max_index_age: PositiveInt | None = None
    index_wait_seconds: float = Field(3600, gt=0)  # how long it waits for each, and at step 0 for a first live index

    @model_validator(mode="after")
    def _some_index_is_young_enough(self) -> "PretrainConfig":
        if self.max_index_age is not None and self.max_index_age < self.checkpoint_every:
            raise ValueError(
                f"max_index_age={self.max_index_age} under checkpoint_every={self.checkpoint_every}: "
                "no index is that young at every step; raise the first or lower the second"
            )
        return self


class ReembedConfig(Section):
    """Embedding every block with one checkpoint."""

    batch: PositiveInt = 64


class IndexConfig(Section):
    """Maximum inner product search and how it is proven against exact search."""

    backend: Literal["exact", "faiss_flat", "faiss_ivf", "faiss_hnsw", "faiss_sq8", "alsh"] = "exact"
    params: dict[str, Any] = {}
    probe_queries: PositiveInt = 256
    probe_k: PositiveInt = 8


class GateConfig(Section):
    """What an index version must show before it goes live."""

    min_recall_vs_exact: float = Field(0.95, ge=0, le=1)
    max_null_probability: float = Field(0.95, gt=0, le=1)  # above it the retriever has collapsed onto the null document
    # Against the live version, on the dev questions; None: not asked. About two standard errors of the difference between
    # two scores of evaluate.dev_questions=2000: less is chance. With fewer questions allow more, as 1 over their root.
    max_recall_drop: float | None = Field(0.03, ge=0, le=1)  # recall@5
    max_em_drop: float | None = Field(0.03, ge=0, le=1)  # exact match


class RefreshConfig(Section):
    """When a checkpoint is embedded and indexed. May be changed in a home that trains already."""

    sensor_seconds: PositiveInt = 30
    backlog: Literal["newest", "all"] = "newest"
    # every_steps: not before so many steps lie between a checkpoint and the last one refreshed. drift: only if a cheap
    # estimate finds another top-k. A run's first and last checkpoint are refreshed under every policy.
    policy: Literal["every_checkpoint", "every_steps", "drift"] = "every_checkpoint"
    every_steps: PositiveInt = 500
    drift_threshold: float = Field(0.1, gt=0, le=1)  # share of the estimate's top-k that must have changed
    drift_blocks: PositiveInt = 1000  # blocks that the estimate embeds again
    drift_queries: PositiveInt = 64  # dev questions that it searches them with
    drift_k: PositiveInt = 8
    supersede: bool = False  # cancel a refresh for a newer checkpoint while the mean age of the index gains by it
    max_attempts: PositiveInt = 3  # of a refresh that fails and is not refused
    max_age_hours: float | None = Field(24.0, ge=0.02)  # an older promotion is shown as not fresh; None: never


class SuperviseConfig(Section):
    """Who trains, and what looks after it. May be changed in a home that trains already."""

    mode: Literal["detached", "segments"] = "detached"  # one long process, or a Dagster run for every checkpoint
    max_restarts: int = Field(3, ge=0)  # of a trainer or segment that died, without a new checkpoint in between
    heartbeat_seconds: float = Field(10.0, gt=0)
    stale_seconds: float = Field(120.0, gt=0)  # a heartbeat of another machine that is older counts for nothing
    alert_command: str | None = None  # run for every alert, without a shell; see docs/loop.md

    @model_validator(mode="after")
    def _beats_in_time(self) -> "SuperviseConfig":
        if self.stale_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"stale_seconds={self.stale_seconds:g} under three times heartbeat_seconds={self.heartbeat_seconds:g}: "
                "a late beat would count as a death; raise it"
            )
        return self


class RetrainConfig(Section):
    """When the next training run starts by itself. May be changed in a home that trains already."""

    # Such as "0 3 * * 0"; None: never. Checked where it is set (see params): one that got into a home all the same stops
    # the schedule and nothing else.
    cron: str | None = None
    timezone: str = "UTC"

    @model_validator(mode="after")
    def _timezone_exists(self) -> "RetrainConfig":
        try:
            ZoneInfo(self.timezone)
        except (ValueError, OSError, KeyError):
            raise ValueError(f"timezone={self.timezone!r} is not known here; such as Europe/Zurich") from None
        return self


class RetentionConfig(Section):
    """What of the past is kept in bytes. Manifests are kept for ever."""

    keep_indexes: int = Field(10, ge=2)  # newest snapshots and indexes of a run, beside everything still in use
    grace_seconds: float = Field(3600, ge=0)  # a version that was live a moment ago may just be being opened


class ReaderConfig(InParts):
    """Open-domain QA fine-tuning of question tower and reader, in one process."""

    steps: PositiveInt = 158_336  # two epochs of NaturalQuestions
    batch: PositiveInt = 1
    lr: float = Field(1e-5, gt=0)
    tower_lr: float = Field(1e-5, gt=0)  # question tower; too high a rate tears it from the frozen document vectors
    searcher_beam: PositiveInt = 5000
    reader_beam: PositiveInt = 5
    max_span_width: PositiveInt = 10
    span_hidden: PositiveInt = 256
    checkpointing: bool = False  # gradient checkpointing
    checkpoint_every: PositiveInt = 1000  # steps between two interim states


class EvaluateConfig(Section):
    """How answers and retrieval are scored."""

    ks: tuple[PositiveInt, ...] = Field((1, 5, 20), min_length=1)
    rule: Literal["tokens", "substring"] = "tokens"  # what counts as "this passage contains the answer"
    dev_questions: PositiveInt = 2000  # at most so many dev questions score an index version


class Config(Section):
    """Everything a stage may ask for."""

    seed: int = Field(0, ge=0, lt=2**63)
    runtime: RuntimeConfig = RuntimeConfig()
    corpus: CorpusConfig = CorpusConfig()
    model: ModelConfig = ModelConfig()
    lengths: LengthsConfig = LengthsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ict: IctConfig = IctConfig()
    warmup: WarmupConfig = WarmupConfig()
    pretrain: PretrainConfig = PretrainConfig()
    reembed: ReembedConfig = ReembedConfig()
    index: IndexConfig = IndexConfig()
    gate: GateConfig = GateConfig()
    refresh: RefreshConfig = RefreshConfig()
    retention: RetentionConfig = RetentionConfig()
    supervise: SuperviseConfig = SuperviseConfig()
    retrain: RetrainConfig = RetrainConfig()
    reader: ReaderConfig = ReaderConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        positions = self.model.max_positions
        for name in ("ict_query", "query", "document", "joint", "reader"):
            if getattr(self.lengths, name) > positions:
                found = getattr(self.lengths, name)
                raise ValueError(f"lengths.{name}={found} exceeds model.max_positions={positions}; shorten it")
        if self.corpus.block_wordpieces > self.lengths.document:
            raise ValueError(
                f"corpus.block_wordpieces={self.corpus.block_wordpieces} exceeds lengths.document="
                f"{self.lengths.document}: blocks would be cut; lower the first or raise the second"
            )
        if self.pretrain.max_index_age is not None and self.refresh.policy != "every_checkpoint":
            raise ValueError(
                f"pretrain.max_index_age={self.pretrain.max_index_age} with refresh.policy={self.refresh.policy}: the trainer "
                "would wait for a checkpoint that is not refreshed; set refresh.policy=every_checkpoint, or no limit"
            )
        if (self.model.encoder_layers or 0) > (self.model.layers or 10**6):
            raise ValueError(
                f"model.encoder_layers={self.model.encoder_layers} exceeds model.layers={self.model.layers}: "
                "the encoder starts from the same weights; lower it"
            )
        if self.reader.reader_beam > self.reader.searcher_beam:
            raise ValueError(
                f"reader.reader_beam={self.reader.reader_beam} exceeds reader.searcher_beam={self.reader.searcher_beam}: "
                "no more blocks can be read than are retrieved; lower it"
            )
        if self.model.weights == "random" and self.model.hidden_size % self.model.heads:
            raise ValueError(
                f"model.hidden_size={self.model.hidden_size} is not a multiple of model.heads={self.model.heads}; change one"
            )
        for section in ("ict", "warmup", "pretrain"):
            micro_batches(getattr(self, section), section, self.runtime.processes)
        micro_batches(self.reader, "reader", 1)
        if self.runtime.device == "xla" and self.runtime.processes > 1:
            raise ValueError(
                f"runtime.processes={self.runtime.processes} with runtime.device=xla: XLA trains in one process; "
                "set it to 1, or choose cpu or cuda"
            )
        return self

    @property
    def max_masks(self) -> int:
        """Wordpieces to predict in one query at most: `pretrain.max_masks`, or what the masking asks for."""
        settings = self.pretrain
        if settings.max_masks is not None:
            return settings.max_masks
        share = round(RANDOM_MASK_RATE * (self.lengths.query - 2))  # two special tokens are never masked
        return 10 if settings.masking == "salient" else max(10, share)

    def require_fits(self, blocks: int, *settings: str) -> None:
        """Raise ConfigError if one of `settings` (all that count blocks by default) asks for more blocks than there are."""
        wanted = {
            "pretrain.candidates": self.pretrain.candidates,
            "index.probe_k": self.index.probe_k,
            "reader.searcher_beam": self.reader.searcher_beam,
            "evaluate.ks": max(self.evaluate.ks),
        }
        excess = {name: k for name, k in wanted.items() if k > blocks and name in (settings or wanted)}
        if not excess:
            return
        found = ", ".join(f"{name}={k}" for name, k in excess.items())
        if "pretrain.candidates" in excess and blocks < 2:
            raise ConfigError(
                f"{found}: more than the {blocks} block of the corpus; add documents, two blocks are the least"
            )
        if "reader.searcher_beam" in excess and self.reader.reader_beam > blocks:
            excess["reader.reader_beam"] = self.reader.reader_beam  # may not be larger than the other
        remedy = " ".join(f"--set {name}={f'[{blocks}]' if name == 'evaluate.ks' else blocks}" for name in excess)
        raise ConfigError(f"{found}: more than the {blocks} blocks of the corpus; add documents, or pass {remedy}")

    def digest(self, *sections: str) -> str:
        """sha256 of the named sections and the seed: what a stage's result depends on."""
        return digest_of(self.model_dump(mode="json"), *sections)


def micro_batches(settings: InParts, section: str, processes: int) -> int:
    """In how many forward and backward passes a step is computed, all processes together.

    Raises ValueError unless the batch is a whole number of micro-batches and every process gets equally many.
    """
    batch, micro = settings.batch, settings.micro_batch
    if batch % processes:
        raise ValueError(f"{section}.batch={batch} is not a multiple of {processes} processes; change one of them")
    if micro is None:
        return processes
    if batch % micro:
        raise ValueError(
            f"{section}.batch={batch} is not a multiple of {section}.micro_batch={micro}; change one of them"
        )
    if batch // micro % processes:
        raise ValueError(
            f"{section}.batch={batch} makes {batch // micro} micro-batches of {micro}, which {processes} processes "
            f"cannot share evenly; lower {section}.micro_batch"
        )
    return batch // micro


def digest_of(values: Mapping[str, Any], *sections: str) -> str:
    """`Config.digest` of plain values, also of those that a version with fewer or other settings wrote down."""
    chosen = {name: values[name] for name in ("seed", *sections)}
    if "runtime" in chosen:  # who computes a micro-batch changes the rounding of sums and nothing else
        chosen["runtime"] = {key: value for key, value in chosen["runtime"].items() if key != "processes"}
    for name in SAVING & chosen.keys():  # how often a state is saved changes nothing of the result
        chosen[name] = {key: value for key, value in chosen[name].items() if key != "checkpoint_every"}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
