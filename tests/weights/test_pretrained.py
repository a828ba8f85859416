"""timm's tags of the released checkpoints, end to end against a server on loopback."""

import contextlib
import http.server
import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import timm
import torch

import vmoe_torch
from tests.weights.test_golden_checkpoints import FOLDER
from vmoe_torch.checkpoints import CheckpointError, cached_checkpoint, convert, export_original, read_original
from vmoe_torch.models import vmoe
from vmoe_torch.weights import remote as fetch

NAME = "vmoe_s32_last2_e8"
SMALL = {"embed_dim": 32, "num_heads": 4, "depth": 4}


class _Handler(http.server.BaseHTTPRequestHandler):
    """Files with byte ranges, as the bucket serves them; breaks off where the test wants it."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        path = server.folder / self.path.partition("?")[0].rpartition("/")[2]
        if not path.exists():
            return self.send_error(404)
        data = path.read_bytes()
        begin = 0
        if server.ranges and (asked := self.headers.get("Range")) and self.headers.get("If-Range") == server.etag:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        if begin and begin >= len(data):
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", server.length or str(len(data) - begin))
        if begin:
            begin -= server.back
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        data = data[begin:]
        if server.cut and path.suffix != ".index":
            server.cut -= 1
            data = data[: len(data) // 3]
            self.close_connection = True
        self.wfile.write(data)

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture
def server(tmp_path):
    """A server of the small released-layout checkpoint in its folder."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.folder, server.requests, server.cut, server.ranges, server.etag = tmp_path / "bucket", [], 0, True, '"a"'
        server.length, server.back = None, 0
        server.url = f"http://127.0.0.1:{server.server_address[1]}/bucket/small"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def source(server):
    """The model whose weights the server has, in two shards."""
    model = timm.create_model(NAME, **SMALL).eval()
    torch.nn.init.normal_(model.head.weight)
    export_original(model, server.folder / "small", num_shards=2)
    return model


def _create(server, tmp_path, **kwargs):
    overlay = {"url": server.url, "custom_load": True}
    kwargs = {**SMALL, "pretrained_cfg_overlay": overlay, "cache_dir": tmp_path / "cache", **kwargs}
    return timm.create_model(NAME, pretrained=True, **kwargs).eval()


def _same(model, source) -> bool:
    x = torch.randn(2, 3, 224, 224)
    return torch.equal(model(x), source(x))


def test_pretrained_fetches_converts_and_hits_the_cache(server, source, tmp_path):
    assert _same(_create(server, tmp_path), source)
    assert [path for path, _ in server.requests] == [
        f"/bucket/small{end}" for end in (".index", ".data-00000-of-00002", ".data-00001-of-00002")
    ]
    assert _same(_create(server, tmp_path), source)
    assert len(server.requests) == 3
    names = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert names <= {".safetensors", ".sha256", ".lock"}


def test_interrupted_download_is_resumed_within_a_call(server, source, tmp_path):
    server.cut = 1
    assert _same(_create(server, tmp_path), source)
    size = (server.folder / "small.data-00000-of-00002").stat().st_size
    assert server.requests[2] == ("/bucket/small.data-00000-of-00002", f"bytes={size // 3}-")


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_download_goes_on_in_the_next_call(server, source, tmp_path, monkeypatch, ranges):
    monkeypatch.setattr(fetch.download, "__kwdefaults__", {"progress": False, "tries": 1})
    server.cut, server.ranges = 1, ranges
    with pytest.raises(CheckpointError, match=r"small.data-00000-of-00002 could not be downloaded after 1 tries"):
        _create(server, tmp_path)
    assert not list((tmp_path / "cache").glob("*.safetensors"))
    assert _same(_create(server, tmp_path), source)
    assert [path.rpartition(".")[2] for path, _ in server.requests] == [
        "index",
        "data-00000-of-00002",
        "data-00000-of-00002",
        "data-00001-of-00002",
    ]


def test_part_from_another_byte_than_asked_for_is_not_appended(server, source, tmp_path):
    path = server.folder / "small.data-00000-of-00002"
    server.cut, server.back = 1, 100
    fetch.download(f"{server.url}.data-00000-of-00002", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == path.read_bytes()
    # The whole, what is missing (and was not), the whole.
    assert [asked is not None for _, asked in server.requests] == [False, True, False]


def test_length_that_is_no_number_is_not_believed(server, source, tmp_path):
    server.length = "many"
    fetch.download(f"{server.url}.index", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == (server.folder / "small.index").read_bytes()


@pytest.mark.parametrize("end", ["..%2F..%2Fx", "%2Ftmp%2Fx", "..%5Cx"])
def test_escaped_slashes_lead_nowhere(server, end, tmp_path):
    name = fetch.file_name(f"{server.url}/{end}")
    assert Path(name).name == name
    with pytest.raises(CheckpointError, match="HTTP 404"):
        cached_checkpoint(f"{server.url}/{end}", tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_file_that_changed_in_between_is_fetched_anew(server, source, tmp_path):
    part = tmp_path / "x.part"
    part.write_bytes(b"old bytes of another version")
    fetch.tag_file(part).write_text('"before"')
    fetch.download(f"{server.url}.index", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == (server.folder / "small.index").read_bytes()
    assert not list(tmp_path.glob("x.part*"))


def test_part_that_came_whole_is_accepted(server, source, tmp_path):
    (tmp_path / "x.part").write_bytes((server.folder / "small.index").read_bytes())
    fetch.tag_file(tmp_path / "x.part").write_text('"a"')
    fetch.download(f"{server.url}.index", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == (server.folder / "small.index").read_bytes()


@pytest.fixture
def remote(monkeypatch, tmp_path):
    """A file of fsspec's, of which a first try gets three bytes."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/resumed/x", b"abcdefghi")

    def broken(response, file, have, *_):
        file.write(response.read(3))
        raise ConnectionError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_copy", broken)
        with pytest.raises(CheckpointError, match="could not be downloaded after 1 tries: broken off"):
            fetch.download("memory://resumed/x", tmp_path / "x", tries=1)
    assert (tmp_path / "x.part").read_bytes() == b"abc"
    yield memory
    memory.rm("/resumed", recursive=True)


def test_fsspec_resumes_the_same_file(remote, tmp_path):
    # What is there is not fetched again.
    (tmp_path / "x.part").write_bytes(b"ABC")
    fetch.download("memory://resumed/x", tmp_path / "x", tries=1)
    assert (tmp_path / "x").read_bytes() == b"ABCdefghi"
    assert not list(tmp_path.glob("x.part*"))


@pytest.mark.parametrize("case", ["changed", "no tag", "unknown"])
def test_fsspec_begins_anew_where_the_file_may_be_another(remote, tmp_path, monkeypatch, case):
    if case == "no tag":
        fetch.tag_file(tmp_path / "x.part").unlink()
    if case == "unknown":
        monkeypatch.delattr(type(remote), "modified")
    remote.pipe("/resumed/x", b"123456789")
    fetch.download("memory://resumed/x", tmp_path / "x", tries=1)
    assert (tmp_path / "x").read_bytes() == b"123456789"
    assert not list(tmp_path.glob("x.part*"))


def test_fsspec_refuses_a_file_that_ends_early(remote, tmp_path, monkeypatch):
    info = type(remote).info
    monkeypatch.setattr(type(remote), "info", lambda self, path, **options: {**info(self, path), "size": 12})
    with pytest.raises(CheckpointError, match="the connection ended at byte 9 of 12"):
        fetch.download("memory://resumed/x", tmp_path / "x", tries=1)


def test_a_download_is_on_the_disk_before_it_has_its_name(remote, tmp_path, monkeypatch):
    fsync, synced = os.fsync, []

    def sync(descriptor):
        synced.append([path.name for path in tmp_path.iterdir() if os.path.samestat(path.stat(), os.fstat(descriptor))])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    fetch.download("memory://resumed/x", tmp_path / "x", tries=1)
    assert synced == [["x.part"]]


def test_offline_says_what_to_do(server, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"must be in the cache when HF_HUB_OFFLINE is set.*custom_load=True"):
        _create(server, tmp_path)
    assert not server.requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    _create(server, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert _same(_create(server, tmp_path), source)


def test_no_network_says_what_to_do(tmp_path):
    # Port 9 of loopback: nothing listens there.
    with pytest.raises(CheckpointError, match=r"could not be downloaded after 1 tries.*custom_load=True"):
        fetch.download("http://127.0.0.1:9/x.index", tmp_path / "x", tries=1)


def test_missing_file_is_named(server, source, tmp_path):
    (server.folder / "small.data-00001-of-00002").unlink()
    with pytest.raises(CheckpointError, match=r"small.data-00001-of-00002 must be readable, got HTTP 404"):
        _create(server, tmp_path)


def test_damaged_download_is_not_found_again(server, source, tmp_path):
    path = server.folder / "small.data-00001-of-00002"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="data-00001-of-00002"):
        _create(server, tmp_path)
    path.write_bytes(good)
    assert _same(_create(server, tmp_path), source)


def test_later_change_is_refused(server, source, tmp_path):
    _create(server, tmp_path)
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="must have the sha256 recorded when it was first seen"):
        _create(server, tmp_path)
    # The same weights again are welcome, others at the same place are not.
    path.unlink()
    assert cached_checkpoint(server.url, tmp_path / "cache").read_bytes() == good
    path.unlink()
    source.cls_token.data.add_(1)
    export_original(source, server.folder / "small", num_shards=2)
    with pytest.raises(CheckpointError, match="must have the sha256 recorded when it was first seen"):
        _create(server, tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_url_of_a_file_is_cached_and_checked(server, source, tmp_path, suffix):
    if suffix == ".npz":
        arrays = read_original(str(server.folder / "small"))
        np.savez(server.folder / "small.npz", **{path: array.numpy() for path, array in arrays.items()})
    else:
        convert(server.folder / "small", server.folder / "small.safetensors")
    url = f"{server.url}{suffix}?download=true"
    server.cut = 1
    for _ in range(2):
        assert _same(_create(server, tmp_path, pretrained_cfg_overlay={"url": url}), source)
    # Broken off once, then resumed; never asked for again.
    assert len(server.requests) == 2
    (path,) = (tmp_path / "cache").glob(f"*{suffix}")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="must have the sha256 recorded when it was first seen"):
        _create(server, tmp_path, pretrained_cfg_overlay={"url": url})


def test_remote_prefix_is_read_directly(server, source):
    got = read_original(server.url)
    assert torch.equal(got["cls"], source.cls_token)


def test_checkpoint_on_disk_is_loaded_with_other_classes(server, source, tmp_path):
    overlay = {"file": str(server.folder / "small"), "custom_load": True}
    model = _create(server, tmp_path, pretrained_cfg_overlay=overlay)
    assert _same(model, source)
    model = _create(server, tmp_path, pretrained_cfg_overlay=overlay, num_classes=7, img_size=288, in_chans=1)
    assert model(torch.randn(1, 1, 288, 288)).shape == (1, 7)
    assert torch.equal(model.norm.weight, source.norm.weight)
    features = _create(server, tmp_path, features_only=True)
    assert len(features(torch.randn(1, 3, 224, 224))) == 3
    assert not list(Path(tmp_path).glob("cache/*.download"))


RELEASED = {
    "vmoe_s32_last2_e8.randaug_light1_in1k": ("vmoe_s32_last2_ilsvrc2012_randaug_light1", 224, 1000, True, 4.0),
    "vmoe_s32_last2_e8.randaug_medium_in1k": ("vmoe_s32_last2_ilsvrc2012_randaug_medium", 224, 1000, True, 4.0),
    "vmoe_s32_last2_e8_384.randaug_light1_in1k_ft_in1k": (
        "vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012",
        384,
        1000,
        False,
        1.5,
    ),
    "vmoe_b16_e8.randaug_strong_in21k": ("vmoe_b16_imagenet21k_randaug_strong", 224, 21843, False, 1.05),
    "vmoe_b16_e8_384.randaug_strong_in21k_ft_in1k": (
        "vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012",
        384,
        1000,
        False,
        1.5,
    ),
    "eee_s32_last2_e8.in1k": ("eee_s32_last2_ilsvrc2012", 224, 1000, True, 1.5),
    "eee_s32_last2_e8_128.in1k_ft_cifar100": ("eee_s32_last2_ilsvrc2012_ft_cifar100", 128, 100, True, 1.5),
}


@pytest.mark.parametrize("tag", RELEASED)
def test_tag_says_what_the_release_is(tag):
    prefix, size, classes, pre_logits, capacity = RELEASED[tag]
    with torch.device("meta"):
        model = timm.create_model(tag)
    cfg = model.pretrained_cfg
    assert cfg["url"] == f"https://storage.googleapis.com/vmoe_checkpoints/{prefix}"
    assert cfg["custom_load"] is True
    assert cfg["mean"] == cfg["std"] == (0.5, 0.5, 0.5)
    data = timm.data.resolve_model_data_config(model)
    # 224 px is the middle of an image resized to 256; fine-tuned models see all of it.
    assert (data["input_size"], data["crop_pct"]) == ((3, size, size), 0.875 if size == 224 else 1.0)
    assert data["crop_mode"] == ("center" if size == 224 else "squash")
    assert model.num_classes == model.head.out_features == classes == cfg["num_classes"]
    assert isinstance(model.pre_logits, torch.nn.Sequential) == pre_logits
    layers = vmoe_torch.moe_layers(model.eval())
    assert {layer.eval_capacity_factor for layer in layers.values()} == {capacity}
    assert {layer.dispatch_dtype for layer in layers.values()} == {torch.bfloat16}


def test_label_sets_are_timms():
    subset = timm.data.infer_imagenet_subset
    assert subset(timm.models.get_pretrained_cfg("vmoe_s32_last2_e8")) == "imagenet-1k"
    assert subset(timm.models.get_pretrained_cfg("vmoe_b16_e8")) == "imagenet-21k-goog"


def test_every_released_tag_is_listed():
    listed = set(timm.list_models("*", pretrained=True, module="vmoe")) | set(
        timm.list_models("*", pretrained=True, module="ensemble")
    )
    assert listed == set(RELEASED)
    assert vmoe.BUCKET.startswith("https://")


def test_gs_urls_are_public_https(monkeypatch):
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    assert fetch.public_url("gs://vmoe_checkpoints/a.index") == f"{vmoe.BUCKET}/a.index"
    monkeypatch.setattr(fetch, "find_spec", lambda name: name)
    assert fetch.public_url("gs://vmoe_checkpoints/a.index") == "gs://vmoe_checkpoints/a.index"


def test_unknown_protocol_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere://x must have a protocol that fsspec can open"):
        fetch.download("nowhere://x", tmp_path / "x")
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "x.part").unlink()
    with pytest.raises(CheckpointError, match="memory://none must exist"):
        fetch.download("memory://none", tmp_path / "x")


def test_golden_prefix_is_read_from_the_cache_as_from_disk(server, tmp_path):
    for path in (FOLDER / "params_3shards_chunked").glob("ckpt.*"):
        server.folder.mkdir(exist_ok=True)
        (server.folder / path.name).write_bytes(path.read_bytes())
    url = server.url.replace("small", "ckpt")
    first = cached_checkpoint(url, tmp_path / "cache", progress=True)
    export_original(first, tmp_path / "back")
    got, want = read_original(str(tmp_path / "back")), read_original(str(FOLDER / "params_3shards_chunked" / "ckpt"))
    assert all(torch.equal(got[name], want[name]) for name in want)
