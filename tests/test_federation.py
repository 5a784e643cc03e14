"""Real processes: a SuperLink with TLS and SuperNodes with keys, the faults that they meet, and what is left behind."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import fedlab_kit as fk
from fedlab_kit import runs

pytest.importorskip("flwr", reason='needs Flower: pip install -c constraints.txt -e ".[scale]"')

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlab_kit.scale.processes import Federation, write_certificates, write_key

ROOT = Path(__file__).resolve().parents[1]


def test_certificates_and_keys_fit_together_and_are_private(tmp_path):
    write_certificates(tmp_path)
    write_key(tmp_path / "key-0")
    ca, server = (x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.crt"))
    server.verify_directly_issued_by(ca)
    assert "127.0.0.1" in str(server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    private = load_ssh_private_key((tmp_path / "key-0").read_bytes(), None)
    assert private.public_key() == load_ssh_public_key((tmp_path / "key-0.pub").read_bytes())
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("server.key", "key-0")} == {0o600}
    assert {path.name for path in tmp_path.iterdir()} == {"ca.crt", "server.crt", "server.key", "key-0", "key-0.pub"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_faults_are_in_the_records_and_the_run_goes_on(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
    __import__("saboteur")
    experiment = fk.Experiment(
        dataset="sabotaged", partition="dirichlet", model="mlp", clients=4, clients_per_round=4, rounds=6, lr=0.05
    )
    with Federation(3, patience=25.0) as federation:
        federation.register(3)  # known, but late
        stranger = federation.join(7)

        def interfere(record):
            if record.round == 1:
                federation.join(3)
            if record.round == 2:
                federation.kill(1)
            if record.round == 5:
                federation.join(1)

        run = federation.train(experiment, interfere)
        assert stranger.poll() == 1
        assert "No SuperNode found with the given public key" in federation.log("server")
    assert federation.processes() == [] and not federation.folder.exists()
    why = [dict(record.refused) for record in run.records]
    assert len(run.records) == 6 and run.status == "finished"
    assert all("truncated" in refused[2] for refused in why)  # 7 bytes are no payload
    assert why[0][3] == "not connected" and 3 in run.records[2].answered
    assert 1 in run.records[1].answered and 1 in why[2] and why[2][1]
    assert all(0 in record.answered for record in run.records)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("after", [6, 40])
def test_an_interrupted_federation_leaves_nothing_behind(tmp_path, after):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, ROOT / "tools/federation.py"], env=environment, start_new_session=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert left_in(tmp_path) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ray_gives_the_same_weights_and_is_gone_afterwards(tmp_path):
    experiment = fk.Experiment(
        dataset="digits",
        partition="dirichlet",
        model="mlp",
        clients=6,
        clients_per_round=4,
        rounds=3,
        uplink="stc",
        downlink="int4",
    )
    before = {process.pid for process in psutil.process_iter()}
    there = fk.train(experiment, engine="flower")
    here = runs.execute(experiment, store=tmp_path / "here")
    assert torch.equal(here.weights, there.weights)
    assert [r.uplink_bytes for r in here.records] == [r.uplink_bytes for r in there.records]
    children = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert [process for process in children if process.pid not in before] == []


def left_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.environ().get("FLWR_HOME", ""):
                found.append(process)
        except psutil.Error:
            continue
    return found
