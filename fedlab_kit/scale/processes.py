"""A federation of real processes on this machine: a SuperLink and one SuperNode per client, over TLS, with keys."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedlab_kit.experiment import Experiment
from fedlab_kit.federation.server import RoundRecord
from fedlab_kit.files import ROOT
from fedlab_kit.run import Run
from fedlab_kit.runs import find, path_of, runs_folder
from fedlab_kit.scale.client import modules_of, write
from fedlab_kit.store import RunFolder

BIN = Path(sys.executable).parent
DAYS = 30
Key = ec.EllipticCurvePrivateKey


class Federation:
    """Servers and clients as processes of their own on loopback ports; leaving the `with` block stops them all.

    Everything they write lies in a temporary folder: certificates, keys, logs, and a FLWR_HOME for each, as if they
    were machines apart. Runs land in this project's store. Every process carries the folder's name in its environment,
    by which it is found again, also those that Flower starts. Raises TimeoutError when the server does not come up.
    """

    def __init__(self, clients: int, patience: float = 60.0) -> None:
        self.clients, self.patience = clients, patience
        self._folder = tempfile.TemporaryDirectory(prefix="fedlab-", ignore_cleanup_errors=True)
        self.folder = Path(self._folder.name)
        self.address = f"127.0.0.1:{_free_port()}"
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self._start_server()
            for client in range(self.clients):
                self.register(client)
            for client in range(self.clients):
                self.join(client)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def register(self, client: int) -> None:
        """Make a key pair for a client and enter its public half at the server, under the client's number."""
        write_key(self._key(client))
        self._flwr("supernode", "register", f"{self._key(client)}.pub", "federation", "--name", str(client))

    def join(self, client: int) -> subprocess.Popen[bytes]:
        """Start a client's SuperNode. Without `register` before it, it has a key that the server does not know."""
        if not self._key(client).exists():
            write_key(self._key(client))
        return self._start(
            f"client-{client}",
            "flower-supernode",
            *("--superlink", self.address, "--root-certificates", str(self.folder / "ca.crt")),
            *("--auth-supernode-private-key", str(self._key(client))),
            *("--host", "127.0.0.1", "--port", str(_free_port())),
        )

    def kill(self, client: int) -> None:
        """End a client's processes at once, as a power cut would."""
        for process in self.processes(f"client-{client}"):
            with suppress(psutil.Error):
                process.kill()

    def train(self, experiment: Experiment, progress: Callable[[RoundRecord], None] | None = None) -> Run:
        """Run an experiment with `flwr run`; `progress` is called with each record as it lands in the store.

        Raises RuntimeError with the end of the server's log when the run fails.
        """
        settings = self.folder / "run.toml"
        values = {**write(experiment), "patience": self.patience, "modules": " ".join(modules_of(experiment))}
        settings.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        command = ("run", str(ROOT), "federation", "--stream", "--run-config", str(settings))
        told, tell = 0, progress or (lambda record: None)
        running = self._start("run", "flwr", *command)
        while True:
            over = running.poll() is not None
            for record in _records(experiment)[told:]:
                tell(record)
                told += 1
            if over:
                break
            time.sleep(0.2)
        run = find(experiment)
        if run is None:
            raise RuntimeError(f"the run failed:\n{self.log('run')[-3000:]}")
        return run

    def log(self, name: str) -> str:
        """Return what a process has written: "server", "run" or "client-0"."""
        return (self.folder / name / "log").read_text(errors="replace")

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Return the processes of this federation that still run, or those of one name."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                home = Path(process.environ().get("FLWR_HOME", "/"))
                mine = home == self.folder / name if name else home.parent == self.folder
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def stop(self) -> None:
        """End every process of the federation and remove its folder."""
        with _uninterrupted():
            end = time.monotonic() + 5  # seconds to leave in peace
            while left := self.processes():
                for process in left:
                    with suppress(psutil.Error):
                        process.terminate() if time.monotonic() < end else process.kill()
                psutil.wait_procs(left, timeout=1)
            for started in self._started:
                started.wait()
            self._folder.cleanup()

    def _start_server(self) -> None:
        write_certificates(self.folder)
        home = self.folder / "operator"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "federation"\n\n[superlink.federation]\naddress = "{self.address}"\n'
            f'root-certificates = "{self.folder / "ca.crt"}"\n'
        )
        host, port = self.address.split(":")
        server = self._start(
            "server",
            "flower-superlink",
            *("--host", host, "--port", port, "--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--ssl-ca-certfile", str(self.folder / "ca.crt")),
            *("--ssl-certfile", str(self.folder / "server.crt"), "--ssl-keyfile", str(self.folder / "server.key")),
        )
        trust = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        end = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"https://{self.address}/health", context=trust, timeout=2).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"the server did not come up:\n{self.log('server')[-3000:]}")

    def _key(self, client: int) -> Path:
        return self.folder / f"key-{client}"

    def _flwr(self, *arguments: str) -> None:
        done = self._start("operator", "flwr", *arguments)
        if done.wait():
            raise RuntimeError(f"flwr {' '.join(arguments)} failed:\n{self.log('operator')[-3000:]}")

    def _start(self, name: str, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        home = self.folder / ("operator" if name == "run" else name)
        (self.folder / name).mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FEDLAB_RUNS": str(runs_folder()),
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / name / "log").open("ab") as log:
            started = subprocess.Popen(
                [str(BIN / program), *arguments],
                env=environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then stops the others in order
            )
        self._started.append(started)
        return started


def _records(experiment: Experiment) -> list[RoundRecord]:
    folder = RunFolder(path_of(experiment))
    return folder.records() if (folder.path / "records.jsonl").exists() else []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let nobody interrupt the tidying up: a second Ctrl-C waits for nothing and would leave processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_certificates(folder: Path) -> None:
    """Write ca.crt, server.crt and server.key (PEM) for a server on this machine, valid for 30 days.

    The authority's own key is never written: nobody can sign a second certificate with it.
    """
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    name, host = _name("fedlab-kit authority"), _name("localhost")
    ca = _certificate(name, name, authority).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = _certificate(host, name, server).add_extension(names, critical=False)
    (folder / "ca.crt").write_bytes(_pem(ca.sign(authority, hashes.SHA384())))
    (folder / "server.crt").write_bytes(_pem(certificate.sign(authority, hashes.SHA384())))
    _write_private(folder / "server.key", server, serialization.PrivateFormat.PKCS8)


def write_key(path: Path) -> None:
    """Write a P-384 key pair in OpenSSH's format: the private half at `path`, the public one beside it as .pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(subject: x509.Name, issuer: x509.Name, key: Key) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=DAYS))
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write_private(path: Path, key: Key, form: serialization.PrivateFormat) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
