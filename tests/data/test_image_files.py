"""Pictures by place: in the table, below a root, behind URLs of a server that stalls, redirects and lies."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from recsys_ray.data.image_files import ImageTable, UrlConfig, fetch, fetch_url, unpack_images, with_bytes
from recsys_ray.data.images import ImageError
from recsys_ray.data.sources.blocks import pieces_of, read_piece

OWN = UrlConfig(allowed=True, private_addresses=True, retries=1, timeout_s=1.0)


class Shop(BaseHTTPRequestHandler):
    """Answers by the path; `/flaky` fails the first time."""

    asked: dict[str, int]

    def do_GET(self) -> None:
        Shop.asked[self.path] = Shop.asked.get(self.path, 0) + 1
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/good")
            self.end_headers()
        elif self.path == "/flaky" and Shop.asked[self.path] == 1:
            self.send_error(503)
        elif self.path == "/gone":
            self.send_error(404)
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000)
        elif self.path == "/host":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.headers["host"].encode())
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"picture")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shop() -> Iterator[str]:
    Shop.asked = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url_is_fetched_once_and_again_after_a_refusal(shop: str) -> None:
    assert fetch_url(f"{shop}/good", 100, OWN) == b"picture"
    assert fetch_url(f"{shop}/flaky", 100, OWN) == b"picture"
    assert Shop.asked == {"/good": 1, "/flaky": 2}


@pytest.mark.parametrize(("path", "message"), [
    ("/gone", "status 404"), ("/moved", "redirects are not followed"), ("/large", "more than 100 bytes")])
def test_a_url_that_gives_no_picture_says_why(shop: str, path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        fetch_url(f"{shop}{path}", 100, OWN)
    assert Shop.asked[path] == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.7", "[::1]", "0.0.0.0"])
def test_no_private_address_is_asked(host: str) -> None:
    with pytest.raises(ImageError, match="no public address"):
        fetch_url(f"http://{host}/latest/meta-data", 100, UrlConfig(allowed=True))


def test_a_name_is_looked_up_once(shop: str) -> None:
    """What was checked is what is connected to: a name that says another address the second time gains nothing."""
    port = int(shop.rpartition(":")[2])
    told = iter([["127.0.0.1"], ["10.0.0.7"]])
    found = fetch_url(f"http://pictures.example:{port}/host", 100, OWN, lambda host, port: next(told))
    assert found == f"pictures.example:{port}".encode()


def test_urls_are_off_unless_asked_for(shop: str) -> None:
    with pytest.raises(ImageError, match="fetching is off"):
        fetch(f"{shop}/good", ImageTable(path="unused"))


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret.jpg", "a/../../secret.jpg", "file:///etc/passwd", ""])
def test_a_place_outside_the_root_is_refused(tmp_path: Path, location: str) -> None:
    with pytest.raises(ImageError):
        fetch(location, ImageTable(path="unused", root=str(tmp_path)))


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "innocent.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ImageError, match="link out of the root"):
        fetch("innocent.jpg", ImageTable(path="unused", root=str(tmp_path / "root")))


def test_a_table_gives_bytes_or_the_reason(tmp_path: Path, shop: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(b"local")
    (tmp_path / "pictures" / "big.jpg").write_bytes(b"x" * 2000)
    pa_csv.write_csv(pa.table({"image": ["a", "b", "c", "d"], "where": [
        "pictures/a.jpg", f"{shop}/good", "pictures/none.jpg", "pictures/big.jpg"]}), tmp_path / "pictures.csv")
    table = ImageTable.model_validate({
        "path": str(tmp_path / "pictures.csv"), "columns": {"image_id": "image", "location": "where"},
        "root": str(tmp_path), "urls": OWN.model_dump(), "limits": {"max_bytes": 1000}})
    recipe = table.recipe()
    rows = pa.concat_tables(block for file in recipe.files for piece in pieces_of(file)
                            for block in read_piece(piece, recipe))
    found = with_bytes(rows, table).to_pylist()
    assert [row["data"] for row in found] == [b"local", b"picture", None, None]
    assert [row["_error"] for row in found[:2]] == [None, None]
    assert found[2]["_error"] == "cannot be read: FileNotFoundError"
    assert found[3]["_error"] == "2000 bytes; the limit is 1000"
    assert found[2]["_source"].endswith("pictures.csv:4")


def test_pictures_of_a_table_become_files(tmp_path: Path) -> None:
    def table(*ids: str) -> ImageTable:
        rows = {"image_id": ids, "data": pa.array([b"one", b"two"][:len(ids)], pa.large_binary())}
        pq.write_table(pa.table(rows), tmp_path / "pictures.parquet")
        return ImageTable(path=str(tmp_path / "pictures.parquet"))

    folder = tmp_path / "files"
    assert unpack_images(table("a.jpg", "b.jpg"), folder) == 2
    (folder / "a.jpg").write_bytes(b"own")      # what is there stays
    assert unpack_images(table("a.jpg", "b.jpg"), folder) == 2
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == {"a.jpg": b"own", "b.jpg": b"two"}
    for bad in ("../out.jpg", "/etc/out.jpg", "..", ""):
        with pytest.raises(ImageError, match="cannot become a file"):
            unpack_images(table(bad), folder)
    assert not (tmp_path / "out.jpg").exists()
