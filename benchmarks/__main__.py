"""Run the benchmarks: `python -m benchmarks [name ...] [--quick] [--again]`.

Each benchmark writes `benchmarks/results/<name>.json` with its rows, the machine and the versions, and is not run
again while that file is there, so that an interrupted `make bench` goes on where it was. All tables together are in
`benchmarks/results/report.md`.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks import architectures, compress, drift, harness, hospitals, rounds, scale, task, wire

BENCHMARKS = {
    "speed": rounds.speed,
    "default": rounds.default,
    "growth": rounds.growth,
    "mcmahan": rounds.mcmahan,
    "import": rounds.import_time,
    "answer": compress.answer,
    "latency": compress.latency,
    "small": compress.small,
    "architectures": architectures.architectures,
    "masks": compress.masks,
    "bits": compress.bits,
    "wire": wire.bytes_to_target,
    "synthetic": wire.synthetic,
    "codecs": wire.cost,
    "scale": scale.scale,
    "heart": hospitals.heart,
    "weakest": hospitals.weakest,
    "drift": drift.drift,
    "task": task.fitness,
    "temperature": task.temperature,
}
QUICK = ("speed", "default", "growth", "mcmahan", "import", "answer", "codecs", "heart")


def main() -> int:
    """Run what was asked for and print each table; return 1 when something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}: within 10 minutes")
    parser.add_argument("--again", action="store_true", help="measure again what has a result already")
    wanted = parser.parse_args()
    if unknown := set(wanted.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    missing = 0
    for name in wanted.names or (QUICK if wanted.quick else BENCHMARKS):
        stored = None if wanted.again else harness.stored(name)
        began = time.perf_counter()
        try:
            result = stored or harness.keep(name, BENCHMARKS[name], began)
        except harness.DataMissing as error:
            print(f"\n{name}: not measured. {error}", flush=True)
            missing += 1
            continue
        print(harness.table(name, result, from_store=stored is not None), flush=True)
        harness.report(BENCHMARKS)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
