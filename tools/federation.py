"""Run the hospitals on Flower as processes of their own, over TLS: one server, four clients, all on this machine.

`make federation` calls it. Everything is started on free loopback ports with a temporary FLWR_HOME and certificates
made on the spot, and stopped at the end, whatever happens.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time

import torch

import fedlab_kit as fk
from fedlab_kit.scale.client import line
from fedlab_kit.scale.processes import Federation

HOSPITALS = fk.Experiment(
    dataset="hospitals", partition="site", clients=4, clients_per_round=4, model="mlp", rounds=3, lr=0.05
)


def main() -> int:
    """Print a line per round; return 1 when the weights are not those of the same experiment in this process."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedlab-runs-") as store:
        os.environ["FEDLAB_RUNS"] = store  # an empty store: what is shown has just happened
        here = list(fk.rounds(HOSPITALS))
        print("federation: making certificates and keys, starting the server and four hospitals", flush=True)
        with Federation(HOSPITALS.clients) as federation:
            print(f"federation: {len(federation.processes())} processes on {federation.address}, TLS", flush=True)
            run = federation.train(HOSPITALS, lambda record: print(line(record), flush=True))
        weights = run.weights
    print(
        f"federation: stopped; {len(federation.processes())} processes left, {time.perf_counter() - began:.0f} s in all"
    )
    same = [r.accuracy for r in here] == [r.accuracy for r in run.records] and bool(torch.isfinite(weights).all())
    print(f"federation: the same accuracy in every round as in one process: {same}")
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("federation: interrupted; everything that was started is stopped", file=sys.stderr)
        sys.exit(130)
