"""A file is named by its content, and read again only when it may have changed."""

import os
import shutil
from pathlib import Path

import pytest

from moonlang.model_loader import identity
from moonlang.model_loader.identity import content_id


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(identity, "_CHUNK", 1000)
    monkeypatch.setattr(identity, "_SETTLED_S", -60.0)  # as if all files were old
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 10)
    return path


def test_every_byte_counts(path: Path):
    names = {content_id(path)}
    content = path.read_bytes()
    for change in (content[:-1], content + b"\0", content[:1500] + b"!" + content[1501:], b""):
        path.write_bytes(change)
        names.add(content_id(path))
    assert len(names) == 5


def test_the_name_and_the_place_do_not_count(path: Path, tmp_path: Path):
    copy = shutil.copy(path, tmp_path / "copy")
    assert content_id(Path(copy)) == content_id(path)


def test_an_unchanged_file_is_not_read_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = tmp_path / "records"
    first = content_id(path, records)
    monkeypatch.setattr(identity, "_read", None)  # reading would raise
    assert content_id(path, records) == first


def test_a_change_that_keeps_size_and_time_is_seen(path: Path, tmp_path: Path):
    before, stat = content_id(path, tmp_path / "records"), path.stat()
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_id(path, tmp_path / "records") != before


def test_a_file_changed_a_moment_ago_is_not_recorded(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(identity, "_SETTLED_S", 60.0)
    content_id(path, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_a_spoilt_record_is_not_believed(path: Path, tmp_path: Path):
    records = tmp_path / "records"
    name = content_id(path, records)
    (record,) = records.iterdir()
    record.write_text(name[:10])
    assert content_id(path, records) == name
    assert record.read_text() == name
