"""Files of others read within bounds, ours written whole or not at all."""

import os
import threading

import pytest

from zimage_jax import files
from zimage_jax.errors import ConfigError, OutputError, UsageError


@pytest.mark.parametrize(
    "read", [lambda p: files.read_regular(p, 10), lambda p: files.read_json(p)]
)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path, words in {
        tmp_path / "pipe": "a device, a pipe or a socket",
        tmp_path: "a folder",
        tmp_path / "none": "No such file",
        tmp_path / ("x" * 300): "name too long",
        tmp_path / "a\0b": "NUL",
    }.items():
        with pytest.raises(UsageError, match=words):
            read(path)


def test_a_file_over_its_limit_is_refused_also_where_the_system_states_no_size(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert files.read_regular(tmp_path / "x", 5) == b"12345"
    with pytest.raises(UsageError, match="larger than the 4 bytes"):
        files.read_regular(tmp_path / "x", 4)
    if os.path.exists("/proc/cpuinfo"):
        from pathlib import Path

        with pytest.raises(UsageError, match="larger than the 4 bytes"):
            files.read_regular(Path("/proc/cpuinfo"), 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "expected a JSON object, found list"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "not JSON"),
        ("\x1b[31m", "not JSON"),
    ],
)
def test_json_that_is_none_is_one_line(text, words):
    with pytest.raises(ConfigError, match=words) as raised:
        files.parse_json(text, "x.json", ConfigError)
    assert "\n" not in str(raised.value)
    assert str(raised.value).isprintable()


def test_toml_is_bounded_too(tmp_path):
    (tmp_path / "x.toml").write_text("a = " + "[" * 3000)
    with pytest.raises(UsageError, match=r"not TOML"):
        files.read_toml(tmp_path / "x.toml")


def test_a_stranger_s_text_is_printable_and_short():
    assert files.printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert len(files.printable("x" * 1_000_000)) == 120
    assert files.printable("一张图") == "一张图"


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_device_or_a_pipe_is_written_through_and_a_link_kept(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write_whole(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="No such device"):
        files.write_whole(tmp_path / "pipe", b"x", overwrite=True)  # nobody reads
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole(tmp_path / "pipe", b"x", overwrite=True)
    assert os.read(reader, 9) == b"x"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OutputError, match="Is a directory"):
        files.write_whole(tmp_path, b"x", overwrite=True)


def test_a_name_in_use_is_left_alone(tmp_path):
    paths = [files.write_whole(tmp_path / "x.png", bytes([k])) for k in range(3)]
    assert [p.name for p in paths] == ["x.png", "x-2.png", "x-3.png"]
    assert files.write_whole(tmp_path / "x.png", b"new", overwrite=True).read_bytes() == b"new"
    assert (tmp_path / "x-2.png").read_bytes() == b"\x01"
    assert len(list(tmp_path.iterdir())) == 3, "no temporary file stays"


def test_many_at_once_take_many_names(tmp_path):
    found, lock = [], threading.Lock()

    def write(k):
        path = files.write_whole(tmp_path / "x.png", bytes([k]))
        with lock:
            found.append((path, k))

    threads = [threading.Thread(target=write, args=(k,)) for k in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({p for p, _ in found}) == 12
    assert all(p.read_bytes() == bytes([k]) for p, k in found)


def test_a_filesystem_without_links_still_never_overwrites(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert [files.write_whole(tmp_path / "x.png", b"").name for _ in range(2)] == [
        "x.png",
        "x-2.png",
    ]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OutputError, match="No space left on device"):
        files.write_whole(tmp_path / "x.png", b"123")
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        files.write_whole(tmp_path / "file" / "x.png", b"1")
