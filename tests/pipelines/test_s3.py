"""Archives behind URLs, with a real S3 server on this machine."""

import pytest
import tifffile

moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")


@pytest.fixture
def bucket(monkeypatch):
    """Write an object; the server is named as users name theirs, by environment variables."""
    import s3fs

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("archive")
    yield lambda name, content: files.pipe(f"archive/{name}", content)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def slide(tmp_path):
    import numpy as np

    def slide(seed):
        path = tmp_path / "slide.tif"
        pixels = np.random.default_rng(seed).integers(0, 255, (80, 100, 3), np.uint8)
        tifffile.imwrite(path, pixels, photometric="rgb", tile=(32, 32))
        return path.read_bytes()

    return slide


def test_a_buckets_slides_are_processed_once_and_again_when_they_change(
    run, bucket, slide, tmp_path
):
    for number in range(2):
        bucket(f"scans/deep/s{number}.tif", slide(number))
    bucket("scans/readme.txt", b"words")
    bucket("scans/list.csv", b"slide,id,label\ndeep/s0.tif,first,tumour\n")
    command = ("batch", "qc", "s3://archive/scans", "-o", "out", "--workers", 1)
    result = run(*command)
    assert result.code == 0, result.err
    found = sorted(path.name for path in (tmp_path / "out/slides").iterdir())
    assert found == ["s0", "s1"]
    assert sorted(path.name for path in (tmp_path / "out/slides/s0").iterdir()) == [
        "s0.done.json", "s0.qc.json", "s0.qc.png", "s0.thumb.jpg",
    ]  # fmt: skip
    assert "0 to do, 2 done before" in run(*command).err
    bucket("scans/deep/s1.tif", slide(7))
    assert "1 because the slide changed" in run(*command).err
    result = run("batch", "qc", "s3://archive/scans/list.csv", "-o", "named", "--workers", 1)
    assert result.code == 0, result.err
    assert [path.name for path in (tmp_path / "named/slides").iterdir()] == ["first"]
    assert run("batch", "qc", "s3://archive/*/deep/*0.tif", "-o", "glob", "--dry-run").code == 0
    missing = run("batch", "qc", "s3://archive/nowhere", "-o", "none")
    assert missing.code == 1
    assert "s3://archive/nowhere" in missing.err
