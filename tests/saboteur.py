"""A data set whose module makes one client of a federation answer garbage: the processes of client 2."""

import os

import worlds

import fedlab_kit as fk
from fedlab_kit.scale import client


@fk.dataset
def sabotaged() -> fk.Dataset:
    return worlds.blobs()


if os.environ.get("FLWR_HOME", "").endswith("client-2"):
    client.client_step = lambda *_: (b"garbage", {})
