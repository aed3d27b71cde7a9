"""Fetching a model, and converting it while it comes: what is fetched, refused and left behind."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from checkpoints_convert import checksums, commands, downloads, fetch, hub
from checkpoints_convert import convert as converting
from checkpoints_convert.convert import convert
from checkpoints_convert.downloads import Download
from checkpoints_convert.hub import Limits
from tests.checkpoints_convert.local_hub import REPO, LocalHub
from tests.schedules import every
from zimage_jax import cli
from zimage_jax.errors import ConfigError, ConversionError, DownloadError, OutputError, UsageError
from zimage_jax.weights import sources
from zimage_jax.weights.writer import Writer, partial_folder

LIMITS = Limits(connections=3, timeout=5.0, retries=2, backoff=0.01, block=65536, segment=1 << 18)
SHARD = "transformer/diffusion_pytorch_model-{:05d}-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def files(published):
    return {p.relative_to(published).as_posix(): p.read_bytes() for p in every_file(published)}


@pytest.fixture
def server(files, monkeypatch):
    made = LocalHub(files | {"README.md": b"not fetched", "../../evil": b"", "/evil": b""})
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", made.url)
    yield made
    made.close()


def every_file(folder):
    return [p for p in sorted(folder.rglob("*")) if p.is_file()]


def contents(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in every_file(folder)}


def get(dst, **options):
    return fetch.fetch(REPO, dst, limits=LIMITS, quiet=True, **options)


def get_native(dst, form="bfloat16", **options):
    return fetch.fetch_and_convert(REPO, dst, form, limits=LIMITS, quiet=True, **options)


# -- the folder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", hub.HUBS)
def test_a_model_is_fetched_once(server, files, tmp_path, where):
    dst = tmp_path / "made" / "model"
    summary = get(dst, hub=where)
    assert contents(dst) == files
    assert (tmp_path / "made").is_dir()
    assert os.listdir(tmp_path / "made") == ["model"]
    total = sum(map(len, files.values()))
    assert summary == {"path": str(dst), "files": len(files), "bytes": total, "downloaded": total}
    server.forget()
    assert get(dst, hub=where)["downloaded"] == 0
    assert set(server.sent) == {""}  # the list of files


def test_an_interrupted_fetch_goes_on(server, files, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch.Arrival, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(tmp_path / "model")
    before = dict(server.sent)
    server.forget()
    get(tmp_path / "model")
    assert contents(tmp_path / "model") == files
    # the first block of a shard came for its header; the configs came whole
    assert server.sent[SHARD.format(1)] == len(files[SHARD.format(1)]) - before[SHARD.format(1)]
    assert "tokenizer/tokenizer.json" not in server.sent


def test_the_published_model_is_verified_with_the_published_sums(
    server, files, tmp_path, monkeypatch
):
    sums = {n: hashlib.md5(d, usedforsecurity=False).hexdigest() for n, d in files.items()}
    monkeypatch.setattr(checksums, "published_md5", lambda: sums)
    monkeypatch.setattr(fetch, "PUBLISHED", REPO)
    get(tmp_path / "right")
    sums[SHARD.format(2)] = "0" * 32
    with pytest.raises(DownloadError, match=r"expected MD5 0+, got MD5 [0-9a-f]{32}.*--revision"):
        get(tmp_path / "wrong")
    assert not (tmp_path / "wrong" / SHARD.format(2)).exists()
    server.log.clear()
    get(tmp_path / "wrong", revision="c0ffee")  # another revision: the hub's own checksums
    assert contents(tmp_path / "wrong") == files


def test_a_revision_is_named_to_the_hub(server, tmp_path):
    get(tmp_path / "model", revision="a/b c?")
    assert server.log[0][0] == f"/api/models/{REPO}/revision/a/b c?"
    get(tmp_path / "other", revision="a&b", hub="modelscope")


# -- refused before its gigabytes come -------------------------------------------------------------


def small_only(server, files) -> bool:
    """Whether no more than a block of each shard was sent."""
    return all(
        n <= LIMITS.block for name, n in server.sent.items() if name.endswith(".safetensors")
    )


@pytest.mark.parametrize(
    ("name", "data", "kind", "expected"),
    [
        ("transformer/config.json", b"{", ConfigError, "not JSON"),
        ("transformer/config.json", b'{"dim": 1}', ConfigError, "is missing"),
        (INDEX, b"{}", ConversionError, "expected a weight_map"),
        (SHARD.format(1), b"x" * 100, DownloadError, "not a safetensors file"),
        (SHARD.format(1), b"", DownloadError, "not a safetensors file"),
        (SHARD.format(1), b"\2" + b"\0" * 7 + b"{}" + b"\0" * 90, ConversionError, "not a whole"),
        (SHARD.format(2), b"\2" + b"\0" * 7 + b"{}", ConversionError, "missing"),
    ],
    ids=["json", "keys", "index", "words", "empty", "holes", "no tensors"],
)
def test_another_model(server, files, tmp_path, name, data, kind, expected):
    server.files[name] = data
    with pytest.raises(kind, match=expected):
        get(tmp_path / "model")
    assert small_only(server, files)


@pytest.mark.parametrize(
    "shard", ["../evil.safetensors", "/etc/evil.safetensors", "..", "", "a\n.safetensors", "x.json"]
)
def test_an_index_names_files_beside_it(server, tmp_path, shard):
    server.files[INDEX] = json.dumps({"weight_map": {"a": shard}}).encode()
    server.files[f"transformer/{shard}"] = b"evil"
    with pytest.raises(ConversionError, match="is not the name of a safetensors file beside it"):
        get(tmp_path / "dst" / "model")
    assert {p.name for p in tmp_path.iterdir()} == {"dst"}
    assert os.listdir(tmp_path / "dst") == ["model"]


@pytest.mark.parametrize("name", ["transformer/config.json", SHARD.format(3)])
def test_a_repository_without_a_needed_file(server, tmp_path, name):
    del server.files[name]
    with pytest.raises(DownloadError, match=f"has no {name}"):
        get(tmp_path / "model")


def test_a_link_does_not_lead_out_of_the_folder(server, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / "transformer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        get(tmp_path / "model")
    assert not os.listdir(tmp_path / "elsewhere")


def test_a_strangers_config_is_kept(server, tmp_path):
    place = tmp_path / "model" / "vae" / "config.json"
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    with pytest.raises(OutputError, match="move it away"):
        get(tmp_path / "model")
    assert place.read_text() == "{}"


def test_a_full_disk_is_seen_before(server, files, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(OutputError, match=r"needs .* of disk, 1.0 MiB are free"):
        get(tmp_path / "model")
    assert small_only(server, files)
    with pytest.raises(OutputError, match=r"needs .* of disk, 1.0 MiB are free"):
        get_native(tmp_path / "native")
    assert small_only(server, files)


def test_a_size_that_no_disk_has(server, tmp_path):
    def huge(answer):
        for sibling in answer.get("siblings", []):
            if sibling["rfilename"] == SHARD.format(1):
                sibling["size"] = (1 << 50) - 1

    server.listed = huge
    with pytest.raises(OutputError, match=r"needs 1048576.00 GiB of disk"):
        get(tmp_path / "model")


def test_two_at_once(server, tmp_path, monkeypatch):
    def second(*_):
        with pytest.raises(OutputError, match="another process is writing it"):
            get(tmp_path / "model")

    monkeypatch.setattr(fetch.Arrival, "finish", second)
    get(tmp_path / "model")


# -- converting while it comes ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    source = sources.open_source(published, {}, None, None)
    return contents(convert(source, tmp_path_factory.mktemp("native") / "made", quiet=True))


def test_the_result_is_that_of_a_conversion(server, converted, tmp_path):
    summary = get_native(tmp_path / "native")
    assert contents(tmp_path / "native") == converted
    assert os.listdir(tmp_path) == ["native"]
    assert summary["downloaded"] == summary["bytes"]
    with pytest.raises(OutputError, match="already exists"):
        get_native(tmp_path / "native")


def test_int8_while_it_comes(server, published, tmp_path):
    get_native(tmp_path / "native", "int8")
    source = sources.open_source(published, {}, None, None)
    expected = convert(source, tmp_path / "expected", "int8", quiet=True)
    assert contents(tmp_path / "native") == contents(expected)


def test_a_shard_is_removed_when_it_is_converted(server, published, tmp_path, monkeypatch):
    """Shards in the model's order, as the published ones: two are on the disk at most, and of what
    is in native files already no more than one shard and the unit that two share."""
    tensors = {
        name: array
        for file in sorted((published / "transformer").glob("*.safetensors"))
        for name, array in load_file(file).items()
    }
    names, share = sorted(tensors, key=place_in_the_model), -(-len(tensors) // 3)
    parts = {SHARD.format(k + 1): names[k * share : (k + 1) * share] for k in range(3)}
    for shard, own in parts.items():
        server.files[shard] = save({n: tensors[n] for n in own})
    index = {n: shard.rpartition("/")[2] for shard, own in parts.items() for n in own}
    server.files[INDEX] = json.dumps({"weight_map": index}).encode()
    written, seen, write = set(), [], Writer.write

    def watched(self, component, unit, pieces):
        write(self, component, unit, pieces)
        written.add(unit)
        here = [s for s in parts if (tmp_path / "native.fetch" / s).exists()]
        twice = [n for s in here for n in parts[s] if unit_of(n) in written]
        seen.append((len(here), sum(tensors[n].nbytes for n in twice)))

    monkeypatch.setattr(Writer, "write", watched)
    monkeypatch.setattr(converting, "_WORKERS", 1)
    get_native(tmp_path / "native", "float32")
    by_unit = dict.fromkeys(map(unit_of, names), 0)
    for name, array in tensors.items():
        by_unit[unit_of(name)] += array.nbytes
    assert max(count for count, _ in seen) == 2
    largest = max(sum(tensors[n].nbytes for n in own) for own in parts.values())
    assert largest / 2 < max(twice for _, twice in seen) <= largest + max(by_unit.values())
    assert seen[-1][0] == 0  # the VAE came last
    expected = convert(
        sources.open_source(published, {}, None, None), tmp_path / "expected", "float32", quiet=True
    )
    before, after = (contents(p) for p in (expected, tmp_path / "native"))
    assert {n: d for n, d in before.items() if "manifest" not in n} == {
        n: d for n, d in after.items() if "manifest" not in n
    }


def unit_of(name: str) -> str:
    first, number = name.split(".")[:2] if "." in name else (name, "")
    is_block = first in ("layers", "noise_refiner", "context_refiner")
    return f"{first}.{number}" if is_block else "stem"


def place_in_the_model(name: str) -> tuple:
    """The stem, the refiners, and the layers by their numbers."""
    unit = unit_of(name)
    first, _, number = unit.partition(".")
    return ["stem", "noise_refiner", "context_refiner", "layers"].index(first), int(number or 0)


@pytest.mark.parametrize("at", every([0, 5, 9, 12], [9]))
def test_an_interrupted_conversion_goes_on(server, converted, tmp_path, monkeypatch, at):
    count, write = [0], Writer.write

    def interrupted(self, *args):
        count[0] += 1
        if count[0] > at:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get_native(tmp_path / "native")
    left = contents(tmp_path / "native.fetch")
    server.forget()
    get_native(tmp_path / "native")
    assert contents(tmp_path / "native") == converted
    assert os.listdir(tmp_path) == ["native"]
    for name in server.sent.keys() - {""}:
        assert name not in left  # what was there was not fetched again
    if at > 9:  # the transformer is converted and gone: its headers are all that is read again
        assert server.sent[SHARD.format(1)] <= LIMITS.block


def test_lossless_waits_for_all(server, files, tmp_path):
    with pytest.raises(UsageError, match="convert the result to lossless"):
        get_native(tmp_path / "native", "lossless")
    with pytest.raises(UsageError, match="expected one of"):
        get_native(tmp_path / "native", "int9")
    assert not any(name.endswith(".safetensors") for name in server.sent)


def test_a_strangers_file_in_the_folder_is_kept(server, tmp_path):
    place = tmp_path / "native.fetch" / "vae" / "notes.txt"
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    get_native(tmp_path / "native")
    assert contents(tmp_path / "native.fetch") == {"vae/notes.txt": b"mine"}


@given(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=3), max_size=12))
def test_the_plan_of_shards(needs_of):
    """Each unit is converted once, when its shards are there; each shard comes once, and goes when
    its last unit is converted."""
    shards = [Path(f"shard{k}") for k in range(5)]
    needs = {("transformer", f"layers.{k}"): {shards[s] for s in n} for k, n in enumerate(needs_of)}
    here, gone, done = set(), set(), []
    for step in fetch.plan(shards, needs):
        assert step.shard not in here | gone
        here.add(step.shard)
        for units, dropped in ((step.first, step.dropped_first), (step.rest, step.dropped)):
            assert all(needs[unit] <= here for unit in units)
            done += units
            here -= set(dropped)
            gone |= set(dropped)
        assert here == {s for s in here if any(s in needs[u] for u in needs.keys() - set(done))}
    assert sorted(done) == sorted(needs)
    assert not here
    assert gone == set().union(*needs.values())


def test_shards_that_share_a_unit():
    """As those of the published model: in order, and a block at each border in both."""
    a, b, c = (Path(x) for x in "abc")
    needs = {("t", "0"): {a}, ("t", "1"): {a, b}, ("t", "2"): {b}, ("t", "3"): {b, c}}
    assert fetch.plan([a, b, c], needs) == [
        fetch.Step(a, [], [], [("t", "0")], []),
        fetch.Step(b, [("t", "1")], [a], [("t", "2")], []),
        fetch.Step(c, [("t", "3")], [b, c], [], []),
    ]


# -- the command -----------------------------------------------------------------------------------


def test_the_command(server, files, tmp_path):
    run = CliRunner().invoke
    dst = str(tmp_path / "model")
    shown = run(commands.fetch, [REPO, dst, "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found.pop("seconds") > 0
    assert found == {
        "path": dst,
        "files": len(files),
        "bytes": sum(map(len, files.values())),
        "downloaded": sum(map(len, files.values())),
    }
    assert shown.stderr == ""
    shown = run(commands.fetch, [REPO, dst, "--quiet", "--connections", "1"])
    assert (shown.exit_code, shown.output) == (0, "")
    shown = run(commands.fetch, [REPO, dst])
    assert "0.0 MiB of" in shown.stdout
    native = str(tmp_path / "native")
    shown = run(commands.fetch, [REPO, native, "--convert", "--format", "int8", "--quiet"])
    assert (shown.exit_code, shown.output) == (0, "")
    assert not partial_folder(tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["a", "b", "c"], 2, "expected [REPO] DST"),
        (["no-owner", "dst"], 2, "expected a repository as OWNER/NAME"),
        ([REPO, "dst", "--format", "int8"], 2, "--format is for --convert"),
        ([REPO, "dst", "--convert", "--format", "lossless"], 2, "lossless"),
        (["some/other", "dst"], 1, "HTTP 404"),
        (["dst"], 1, "HTTP 404"),  # the published model, which this hub has not
        ([REPO, "dst", "--connections", "99"], 2, "connections"),
    ],
)
def test_the_commands_errors(server, tmp_path, monkeypatch, capsys, words, code, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        cli.run(commands.fetch, words, "fetch")
    shown = capsys.readouterr()
    assert leaving.value.code == code
    assert shown.out == ""
    assert expected in shown.err
    assert shown.err.count("\n") == 1


def test_ctrl_c_leaves_what_came(server, files, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.Arrival, "finish", interrupted)
    with pytest.raises(SystemExit) as leaving:
        cli.run(commands.fetch, [REPO, str(tmp_path / "model"), "--quiet"], "fetch")
    assert leaving.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted"
    assert (tmp_path / "model" / f"{SHARD.format(1)}.partial.map").exists()


def test_without_requests(server, tmp_path, monkeypatch, capsys):
    import sys

    for name in ("checkpoints_convert.fetch", "checkpoints_convert.hub", "requests"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("checkpoints_convert.fetch", raising=False)
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(SystemExit) as leaving:
        cli.run(commands.fetch, [REPO, str(tmp_path / "model")], "fetch")
    assert leaving.value.code == 2
    assert "needs requests: run scripts/setup fetch" in capsys.readouterr().err


def test_threads_write_nothing_after_the_end(server, tmp_path):
    repository = hub.open_repository("huggingface", REPO, None, LIMITS, print)
    remote = repository.file(SHARD.format(1))
    download = Download(remote, tmp_path / "file", LIMITS.block)
    download.want()
    pieces = download.fetch(repository.web, 0, 1)
    next(pieces)
    download.close()
    before = contents(tmp_path)
    assert list(pieces) == []
    with pytest.raises(downloads._SupersededError):
        list(download.fetch(repository.web, 1, 2))
    assert contents(tmp_path) == before
