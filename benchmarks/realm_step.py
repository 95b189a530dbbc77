"""One REALM training step beside that of transformers 4.40.2, the last release with a PyTorch REALM.

    python benchmarks/realm_step.py [--precision fp32 bf16] [--rounds 5] [--port-folder DIR]

Size of MiniLM-L6 (6 layers, hidden 384), 4 queries x 8 candidates, query 64, document 128, joint 192 wordpieces, all of them
real, 8 masked wordpieces a query, dropout on: forward, backward, clipping and update. The port runs as its users ran it:
RealmScorer + RealmKnowledgeAugEncoder + AdamW, under autocast for bf16. Each side is a process of its own; rounds alternate,
so that both meet the same machine, and the fastest step of each side counts; seconds of processor time, which other work on the
machine disturbs less, are shown beside it. DIR receives transformers 4.40.2 and what it
needs (installed with pip on first use); torch is the same for both.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

QUERIES, CANDIDATES, QUERY, DOCUMENT, MASKS = 4, 8, 64, 128, 8
JOINT = QUERY + DOCUMENT
SHAPE = {"vocab": 30_522, "hidden": 384, "layers": 6, "heads": 12, "intermediate": 1536, "projection": 128}
PORT = ["transformers==4.40.2", "numpy>=1.26"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port-folder", type=Path, default=Path(tempfile.gettempdir(), "transformers-4.40.2"))
    parser.add_argument("--worker", choices=["ours", "port"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(arguments.worker, arguments.precision[0])
        return
    if not (arguments.port_folder / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(arguments.port_folder), *PORT]
        subprocess.run(command, check=True)
    for precision in arguments.precision:
        print(json.dumps(compare(precision, arguments.rounds, arguments.port_folder)), flush=True)


def compare(precision: str, rounds: int, port_folder: Path) -> dict[str, object]:
    """Fastest step and peak memory of both sides, and the ratios port / ours."""
    sides = {name: Side(name, precision, port_folder) for name in ("ours", "port")}
    for _ in range(rounds):
        for side in sides.values():
            side.step()
    for side in sides.values():
        side.finish()
    seconds = {name: min(side.seconds) for name, side in sides.items()}
    busy = {name: min(side.cpu_seconds) for name, side in sides.items()}
    memory = {name: side.mib for name, side in sides.items()}
    return {
        "precision": precision,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "speed_ratio": round(seconds["port"] / seconds["ours"], 2),
        "cpu_seconds": {name: round(value, 2) for name, value in busy.items()},
        "cpu_ratio": round(busy["port"] / busy["ours"], 2),
        "peak_mib": memory,
        "memory_ratio": round(memory["port"] / memory["ours"], 2),
        "load": round(os.getloadavg()[0], 1),
    }


class Side:
    """A worker process that makes one step whenever it is told to."""

    def __init__(self, name: str, precision: str, port_folder: Path) -> None:
        path = [str(port_folder)] if name == "port" else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, "--precision", precision],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.mib = 0.0
        self._ask("warm up")

    def step(self) -> None:
        wall, cpu = self._ask("step")
        self.seconds.append(wall)
        self.cpu_seconds.append(cpu)

    def finish(self) -> None:
        self.mib = self._ask("end")[0]
        self.process.wait()

    def _ask(self, what: str) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        return [float(number) for number in answer.split()]


def serve(name: str, precision: str) -> None:
    """Body of a worker: a line with seconds, by the clock and of the processor, for every line read; at the end MiB of peak
    memory."""
    step = {"ours": ours, "port": port}[name](precision == "bf16")
    for line in sys.stdin:
        if line.strip() == "end":
            print(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1), flush=True)
            return
        began, busy = time.perf_counter(), time.process_time()
        step()
        print(time.perf_counter() - began, time.process_time() - busy, flush=True)


def inputs() -> dict:
    """The same random wordpieces for both sides."""
    import torch

    drawn = torch.Generator().manual_seed(0)

    def ids(*shape: int):
        return torch.randint(1000, SHAPE["vocab"], shape, generator=drawn)

    positions = torch.stack([torch.randperm(QUERY - 2, generator=drawn)[:MASKS] + 1 for _ in range(QUERIES)])
    return {
        "query": ids(QUERIES, QUERY),
        "documents": ids(QUERIES * CANDIDATES, DOCUMENT),
        "joint": ids(QUERIES * CANDIDATES, JOINT),
        "positions": positions,
        "targets": ids(QUERIES, MASKS),
    }


def ours(bf16: bool) -> Callable[[], None]:
    """The project's own step: `realm_step` and `Updater`."""
    import numpy as np
    import torch

    from realm_core.config import OptimizerConfig, RuntimeConfig
    from realm_core.model.bundle import RealmModel
    from realm_core.model.device import resolve
    from realm_core.model.embedder import Retriever
    from realm_core.model.encoder import EncoderShape
    from realm_core.model.knowledge_encoder import KnowledgeEncoder
    from realm_core.text.tokenizer import Tokenizer
    from realm_core.train.features import RealmBatch
    from realm_core.train.step import Whole, realm_step
    from realm_core.train.update import Updater

    shape = EncoderShape(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["hidden"],
        layers=SHAPE["layers"],
        heads=SHAPE["heads"],
        intermediate_size=SHAPE["intermediate"],
        max_positions=512,
        dropout=0.1,
    )
    generator = torch.Generator().manual_seed(0)
    retriever, encoder = Retriever(shape, SHAPE["projection"], 1e-12), KnowledgeEncoder(shape)
    retriever.initialise(generator)
    encoder.initialise(generator)
    model = RealmModel(retriever, encoder, Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    model.train()
    device = resolve(RuntimeConfig(precision="bf16" if bf16 else "fp32", device="cpu"))
    given = inputs()

    def triple(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return ids, torch.zeros_like(ids), torch.ones_like(ids)

    batch = RealmBatch(
        query=triple(given["query"]),
        documents=triple(given["documents"]),
        joint=triple(given["joint"]),
        positions=given["positions"],
        targets=given["targets"],
        real=torch.ones(QUERIES, MASKS, dtype=torch.bool),
        present=torch.ones(QUERIES, CANDIDATES, dtype=torch.bool),
        rows=np.zeros((QUERIES, CANDIDATES), dtype=np.int64),
    )
    rates = {"retriever": 3e-5, "encoder": 3e-5}
    updater = Updater({"retriever": retriever, "encoder": encoder}, rates, 1000, OptimizerConfig())
    steps = iter(range(1, 1000))
    whole = Whole(examples=QUERIES, masks=QUERIES * MASKS)
    return lambda: bool(updater.apply(realm_step(model, batch, "token", device, whole).loss, next(steps)))


def port(bf16: bool) -> Callable[[], None]:
    """The step of transformers 4.40.2 with AdamW and clipping."""
    import torch
    from transformers import RealmConfig, RealmKnowledgeAugEncoder, RealmScorer

    config = RealmConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["intermediate"],
        retriever_proj_size=SHAPE["projection"],
        num_candidates=CANDIDATES,
    )
    torch.manual_seed(0)
    scorer, encoder = RealmScorer(config).train(), RealmKnowledgeAugEncoder(config).train()
    parameters = [*scorer.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-5)
    given = inputs()
    documents = given["documents"].view(QUERIES, CANDIDATES, DOCUMENT)
    joint = given["joint"].view(QUERIES, CANDIDATES, JOINT)
    rows = torch.arange(QUERIES)[:, None]
    labels, masked = torch.zeros(QUERIES, JOINT, dtype=torch.long), torch.zeros(QUERIES, JOINT)
    labels[rows, given["positions"]] = given["targets"]
    masked[rows, given["positions"]] = 1.0

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            relevance = scorer(input_ids=given["query"], candidate_input_ids=documents).relevance_score
            loss = encoder(joint, relevance_score=relevance, labels=labels, mlm_mask=masked).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
