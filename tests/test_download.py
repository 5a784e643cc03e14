from __future__ import annotations

import gzip
import hashlib
import struct
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from fedlab_kit import data, download
from fedlab_kit.data import Preprocess
from fedlab_kit.download import FASHION_MNIST, IDX_FILES, MNIST, DataError, Source, fetch, read_idx


def idx(values: np.ndarray, magic: int | None = None) -> bytes:
    """Encode an array of bytes as a compressed idx file."""
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim if magic is None else magic, *values.shape)
    return gzip.compress(header + values.astype(np.uint8).tobytes(), mtime=0)


def small_files(labels: int = 30) -> dict[str, bytes]:
    """Four files of 30 training and 8 test images of 4x4 pixels, with 3 classes."""
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (30, 4, 4)), rng.integers(0, 256, (8, 4, 4))
    contents = idx(train), idx(np.arange(labels) % 3), idx(test), idx(np.arange(8) % 3)
    return dict(zip(IDX_FILES, contents, strict=True))


def source_of(files: dict[str, bytes], mirrors: tuple[str, ...] = ()) -> Source:
    return Source("small", mirrors, {name: hashlib.md5(content).hexdigest() for name, content in files.items()})


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's root for this test, with no data in it."""
    monkeypatch.setattr(download, "ROOT", tmp_path)
    monkeypatch.delenv("FEDLAB_DATA", raising=False)
    return tmp_path


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and logs nothing."""

    def log_message(self, *_: object) -> None: ...


class Broken(Quiet):
    """Promises more than it sends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half")


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server for a folder on this machine and return its address."""
    servers = []

    def start(folder: Path, handler: type[Quiet] = Quiet) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def nothing_left(root: Path) -> bool:
    cache = root / "data" / "cache"
    return not cache.exists() or not [path for path in cache.rglob("*") if path.is_file()]


# FEDLAB_DATA


@pytest.mark.parametrize("relative", [True, False])
def test_images_from_a_folder(root: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    files = small_files()
    put(root / "mine" / "small", files)
    monkeypatch.setenv("FEDLAB_DATA", "mine" if relative else str(root / "mine"))
    built = data.images(source_of(files), ("a", "b", "c"), Preprocess(0.0, 255.0), validation=6, public=4)
    assert [len(getattr(built, name)) for name in data.SPLITS] == [20, 6, 4, 8]
    assert built.shape == (1, 4, 4) and built.train.x.dtype == torch.uint8
    original = np.random.default_rng(0).integers(0, 256, (30, 4, 4)).astype(np.uint8)
    number = {image.tobytes(): position for position, image in enumerate(original)}
    seen = []
    for name in ("train", "validation", "public"):
        split = getattr(built, name)
        positions = [number[image.numpy().tobytes()] for image in split.x]
        assert split.y.tolist() == [position % 3 for position in positions]
        seen += positions
    assert sorted(seen) == list(range(30))
    assert nothing_left(root)


def test_another_digest_in_the_folder_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_files()
    source = source_of(files)
    path = put(root / "small", files) / IDX_FILES[0]
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    monkeypatch.setenv("FEDLAB_DATA", str(root))
    with pytest.raises(DataError) as error:
        fetch(source, IDX_FILES[0])
    expected, found = source.md5[IDX_FILES[0]], hashlib.md5(content).hexdigest()
    assert str(error.value) == f"{path} must have the MD5 {expected}, found {found}: replace it with the published file"


def test_what_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "small" / IDX_FILES[0]).mkdir(parents=True)
    monkeypatch.setenv("FEDLAB_DATA", str(root))
    with pytest.raises(DataError, match=f"{IDX_FILES[0]} cannot be read"):
        fetch(source_of(small_files()), IDX_FILES[0])


def test_numbers_of_images_and_labels_must_agree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = small_files(labels=29)
    put(root / "small", files)
    monkeypatch.setenv("FEDLAB_DATA", str(root))
    with pytest.raises(DataError, match="small must have a label for each of its 30 images, found 29 labels"):
        data.images(source_of(files), ("a", "b", "c"), Preprocess(0.0, 1.0), validation=6, public=4)


# downloads


def test_download_once_then_from_the_cache(root: Path, serve: Callable[..., str]) -> None:
    files = small_files()
    folder = put(root / "mirror", files)
    source = source_of(files, (serve(folder),))
    path = fetch(source, IDX_FILES[1])
    assert path == root / "data" / "cache" / "small" / IDX_FILES[1]
    assert path.read_bytes() == files[IDX_FILES[1]]
    (folder / IDX_FILES[1]).unlink()
    assert fetch(source, IDX_FILES[1]) == path


def test_the_next_mirror_is_tried(root: Path, serve: Callable[..., str]) -> None:
    files = small_files()
    empty, full = put(root / "empty", {}), put(root / "full", files)
    assert fetch(source_of(files, (serve(empty), serve(full))), IDX_FILES[0]).exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(root: Path, serve: Callable[..., str]) -> None:
    files = small_files()
    put(root / "data" / "cache" / "small", {IDX_FILES[0]: b"half"})
    path = fetch(source_of(files, (serve(put(root / "mirror", files)),)), IDX_FILES[0])
    assert path.read_bytes() == files[IDX_FILES[0]]


def test_a_download_with_another_digest_leaves_nothing(root: Path, serve: Callable[..., str]) -> None:
    mirror = serve(put(root / "mirror", {IDX_FILES[0]: b"something else"}))
    with pytest.raises(DataError, match=f"small: {IDX_FILES[0]} could not be downloaded .*{mirror}.*hash"):
        fetch(source_of(small_files(), (mirror,)), IDX_FILES[0])
    assert nothing_left(root)


def test_a_broken_download_leaves_nothing(root: Path, serve: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch(source_of(small_files(), (serve(root, Broken),)), IDX_FILES[0])
    assert nothing_left(root)


def test_offline_says_which_files_to_put_where(root: Path) -> None:
    source = source_of(small_files(), ("http://127.0.0.1:9/",))
    with pytest.raises(DataError) as error:
        fetch(source, IDX_FILES[0])
    message = str(error.value)
    assert all(name in message for name in IDX_FILES) and "\n" not in message
    assert str(root / "data" / "cache" / "small") in message and "FEDLAB_DATA" in message


# idx


def test_idx_round_trip(tmp_path: Path) -> None:
    values = np.arange(24).reshape(2, 3, 4)
    path = tmp_path / "file.gz"
    path.write_bytes(idx(values))
    assert np.array_equal(read_idx(path, 3), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain", "cannot be read as gzip"),
        (b"", "must begin with an idx header of 16 bytes, found 0 bytes"),
        (idx(np.zeros((9, 9, 9)))[:-12], "cannot be read as gzip"),
        (gzip.compress(b"\0\0\x08\x03\0\0", mtime=0), "must begin with an idx header of 16 bytes, found 6 bytes"),
        (idx(np.zeros((2, 3, 4)), magic=0x0D03), "must begin with the idx magic number 2051, found 3331"),
        (idx(np.zeros(9)), r"must begin with .*2051, found 2049|must begin with an idx header of 16 bytes"),
        (
            gzip.compress(struct.pack(">4I", 2051, 2, 3, 4) + bytes(23), mtime=0),
            r"must hold 24 values for \[2, 3, 4\], found 23",
        ),
        (
            gzip.compress(struct.pack(">4I", 2051, 2, 3, 4) + bytes(25), mtime=0),
            r"must hold 24 values for \[2, 3, 4\], found 25",
        ),
    ],
)
def test_an_idx_file_that_is_not_right_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, 3)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere cannot be read"):
        read_idx(tmp_path / "nowhere", 3)


# the real files


@pytest.mark.slow
@pytest.mark.parametrize(("source", "maker"), [(MNIST, data.mnist), (FASHION_MNIST, data.fashion_mnist)])
def test_published_images(source: Source, maker: Callable[[], data.Dataset], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real root and FEDLAB_DATA
    monkeypatch.setattr(download, "_download", _no_download)
    try:
        built = maker()
    except FileNotFoundError as error:
        pytest.skip(f"{error}: set FEDLAB_DATA, or load {source.name} once while online")
    assert [len(getattr(built, name)) for name in data.SPLITS] == [54_000, 5_000, 1_000, 10_000]
    assert built.shape == (1, 28, 28)
    x = built.preprocess(built.train.x)
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01
    assert torch.bincount(built.validation.y).min() > 400


def _no_download(source: Source, file: str) -> Path:
    path = download.ROOT / "data" / "cache" / source.name / file
    if not path.exists():
        raise FileNotFoundError(f"{file} is not in {path.parent}")
    return path
