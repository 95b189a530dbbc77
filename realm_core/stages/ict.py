"""Stage `ict`: start weights -> a retriever that finds blocks, and an encoder that can use them."""

from contextlib import nullcontext
from pathlib import Path

from realm_core.artifacts.manifest import Manifest, Plan, open_artifact, read_manifest
from realm_core.artifacts.publish import building, finished
from realm_core.config import Config
from realm_core.corpus.shards import Corpus
from realm_core.errors import ConfigError
from realm_core.model.bundle import RealmModel, new_model
from realm_core.model.device import resolve
from realm_core.model.weight_files import weights_sha256
from realm_core.model.weights import load_start_weights
from realm_core.ports import MetricSink
from realm_core.stages import CODE
from realm_core.stages.processes import world_of
from realm_core.train.ict import train_ict
from realm_core.train.interim import Interim
from realm_core.train.parts import require_lengths
from realm_core.train.warmup import warm_up

SECTIONS = ("runtime", "model", "lengths", "optimizer", "ict", "warmup")


def plan(config: Config, *, corpus: Path) -> Plan:
    """What `run` would make from `corpus`."""
    sources = {}
    if config.model.weights != "random":
        sources["weights"] = weights_sha256(config.model)
    return Plan(
        stage="ict",
        code=CODE["ict"],
        config_digest=config.digest(*SECTIONS),
        parents={"corpus": read_manifest(corpus)},
        sources=sources,
    )


def run(config: Config, *, corpus: Path, out: Path, sink: MetricSink) -> Manifest:
    """Inverse cloze task for the retriever, then the masked-LM warm-up of the encoder.

    Both save interim states on the way, from which a killed attempt is taken up. Several processes (see `stages.processes`)
    share every batch; the first one publishes and logs.
    """
    doing = plan(config, corpus=corpus)
    if done := finished(out, doing):
        return done
    open_artifact(corpus, "corpus")
    blocks = Corpus.open(corpus)
    with world_of(config, "ict", corpus=str(corpus), out=str(out)) as world:
        device = resolve(config.runtime, world=world)
        with building(out, doing, interim=True) if world.leads else nullcontext() as build:
            model = _start(config, blocks).to(device.torch_device)
            interim = Interim(out, doing, device.precision, world)
            with interim.named_if_diverged("ict.lr"):
                metrics = train_ict(model, blocks, config, device, sink, world, interim)
            with interim.named_if_diverged("warmup.lr"):
                metrics |= warm_up(model, blocks, config, device, sink, world, interim)
            if build is not None:
                model.save(build.folder)
                facts = {"step": 0, "metrics": metrics, "precision": device.precision}
                build.commit(facts, record={"resumed": interim.resumed})
        world.exchange("published")
    return read_manifest(out)


def _start(config: Config, blocks: Corpus) -> RealmModel:
    start = load_start_weights(config.model, blocks.tokenizer.vocab_size)
    if not start.has_mlm_head and config.model.weights != "random" and config.warmup.steps == 0:
        raise ConfigError(
            f"model.weights={config.model.weights}: no masked-LM head, and with warmup.steps=0 it would stay untrained; "
            "set warmup.steps"
        )
    model = new_model(config.model, start, blocks.tokenizer, config.seed)
    require_lengths(model, config)  # now, and not after hours of the first of three stages
    return model
