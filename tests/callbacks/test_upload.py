"""Checkpoints that are sent away: all of them, whole, in spite of a target that fails, and back again."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import lightning as L
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint
from operations_helpers import KeepLogger, Net, data, make_trainer

import kenotron
from kenotron.callbacks import AsyncCheckpointIO, Upload
from kenotron.checkpoint import NotACheckpointError, is_checkpoint, read_manifest, verify
from kenotron.checkpoint.remote import RemoteFolder
from kenotron.cli import main
from kenotron.testing import RankPool

QUICK: dict[str, Any] = {"every_s": 0.05, "retry_s": 0.05, "max_retry_s": 0.1}


class Flaky(MemoryFileSystem):
    """Fails as often as it is told to, and notes in which order files came."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    failures = 0
    order: list[str] = []

    def _refuse(self) -> None:
        if Flaky.failures > 0:
            Flaky.failures -= 1
            raise ConnectionError("no route to host")

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._refuse()
        return super().cat_file(path, *args, **kwargs)

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._refuse()
        super().put_file(lpath, rpath, *args, **kwargs)
        Flaky.order.append(rpath.rsplit("/", 2)[1] + "/" + Path(rpath).name)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        super().pipe_file(path, value, *args, **kwargs)
        Flaky.order.append("/".join(path.rsplit("/", 2)[1:]))


@pytest.fixture
def flaky() -> Iterator[str]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.failures, Flaky.order = 0, []
    yield f"flaky://{uuid.uuid4().hex}"
    Flaky.failures = 0


def fit(folder: str, url: str, strategy: Any = None, steps: int = 6, resume: str | None = None, **settings: Any) -> Any:
    L.seed_everything(1, verbose=False)
    options = {key: settings.pop(key) for key in list(settings) if key in ("plugins",)}
    keep = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=settings.pop("top", -1), filename="{step}")
    logger = KeepLogger()
    upload = Upload(url, **{**QUICK, **settings})
    trainer = make_trainer(
        {} if strategy is None else strategy, upload, keep, max_steps=steps, logger=logger, enable_checkpointing=True, **options
    )
    trainer.fit(Net(), data(), ckpt_path=resume)
    for thread in threading.enumerate():
        if thread.name == "kenotron-upload":  # given up: it ends when it next looks
            thread.join(10)
            assert not thread.is_alive()
    return trainer, logger


def same(one: Path, other: Path) -> bool:
    a, b = kenotron.load_state_dict(one), kenotron.load_state_dict(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_that_is_published_arrives_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    _, logger = fit(str(tmp_path / "here"), url)
    assert RemoteFolder(url).names() == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert len(logger.values("upload/megabytes")) == len(logger.values("upload/seconds")) == 3
    assert Upload.fetch(url, tmp_path / "back") == tmp_path / "back"
    assert verify(tmp_path / "back").is_whole
    assert same(tmp_path / "back", tmp_path / "here" / "step=6.ckpt")
    assert main(["checkpoint", "fetch", url, str(tmp_path / "second"), "--name", "step=2.ckpt"]) == 0
    assert "holds" in capsys.readouterr().out
    assert same(tmp_path / "second", tmp_path / "here" / "step=2.ckpt")
    assert main(["checkpoint", "fetch", url, str(tmp_path / "third"), "--name", "nothing"]) == 2
    assert "holds no published checkpoint nothing" in capsys.readouterr().err
    resumed, _ = fit(str(tmp_path / "more"), url, steps=8, resume=str(tmp_path / "back"))
    assert resumed.global_step == 8
    assert RemoteFolder(url).names()[-1] == "step=8.ckpt"


def test_last_is_copied_at_the_target_where_it_is_the_step_that_was_sent(flaky: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}", save_last=True)
    trainer = make_trainer({}, Upload(flaky, **QUICK), saving, max_steps=4, enable_checkpointing=True)
    trainer.fit(Net(), data())
    shards = [name for name in Flaky.order if not name.endswith(("manifest.json", "README.txt"))]
    linked = {file.stat().st_ino for file in (tmp_path / "step=4.ckpt").iterdir()}
    assert all(file.stat().st_ino in linked for file in (tmp_path / "last.ckpt").glob("shard-*"))
    assert "step=4.ckpt" in str(shards) and not [name for name in shards if name.startswith("last.ckpt")][1:]
    for name in ("step=2.ckpt", "step=4.ckpt", "last.ckpt"):
        place = Upload.fetch(flaky, tmp_path / "back" / name, name)
        assert verify(place).is_whole
        assert same(place, tmp_path / name)


def test_a_copy_is_never_made_of_what_was_overwritten(flaky: str, tmp_path: Path) -> None:
    remote = RemoteFolder(flaky)

    def put(name: str, text: str, link: str | None = None) -> None:
        file = tmp_path / name
        file.unlink(missing_ok=True)
        if link is None:
            file.write_text(text)
        else:
            os.link(tmp_path / link, file)
        target = f"/there/{name.partition('-')[0]}/file"
        remote._send_file(file, remote._place()[0], target, save_id=uuid.uuid4().hex)
        assert remote._place()[0].cat_file(target) == text.encode()

    put("one", "1111")
    put("last-1", "1111", link="one")
    put("two", "2222")
    put("last-2", "2222", link="two")
    put("one-again", "3333")  # at the place of the first
    put("best", "1111", link="last-1")


def test_an_unreachable_target_is_tried_again_and_the_manifest_comes_last(flaky: str, tmp_path: Path) -> None:
    Flaky.failures = 5
    with pytest.warns(UserWarning, match=r"can't be reached \(ConnectionError: no route to host\); try 2") as told:
        trainer, _ = fit(str(tmp_path), flaky)
    assert trainer.global_step == 6
    assert sum("can't be reached" in str(each.message) for each in told) == 5
    assert RemoteFolder(flaky).names() == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for name in ("step=2.ckpt", "step=4.ckpt", "step=6.ckpt"):
        sent = [file for file in Flaky.order if file.startswith(name)]
        assert sent[-1] == f"{name}/manifest.json"
        assert len(sent) == len(set(sent)) == 2 + len(read_manifest(tmp_path / name).files)


def test_what_never_arrived_stays_and_is_sent_by_the_next_run(flaky: str, tmp_path: Path) -> None:
    Flaky.failures = 10**9
    with pytest.warns(UserWarning, match=r"2 checkpoints are not at .*step=2.ckpt.*The next|the next fit"):
        trainer, _ = fit(str(tmp_path), flaky, steps=4, drain_timeout_s=0.3, delete_local=True)
    assert trainer.global_step == 4
    Flaky.failures = 0
    assert RemoteFolder(flaky).names() == []
    assert is_checkpoint(tmp_path / "step=2.ckpt")
    fit(str(tmp_path), flaky, steps=6, resume=str(tmp_path / "step=4.ckpt"))
    assert RemoteFolder(flaky).names() == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]


def test_retention_on_both_sides_spares_the_last_and_what_others_put_there(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    (tmp_path / "there" / "step=1.ckpt").mkdir(parents=True)
    (tmp_path / "there" / "step=1.ckpt" / "mine").touch()
    fit(str(tmp_path / "here"), url, steps=8, keep=2, delete_local=True)
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["step=8.ckpt"]
    found = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert found == ["step=1.ckpt", "step=6.ckpt", "step=8.ckpt", "uploads.json"]
    assert json.loads((tmp_path / "there" / "uploads.json").read_text()) == ["step=6.ckpt", "step=8.ckpt"]


def test_a_name_that_is_used_again_is_sent_again(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    for run in ("one", "two"):
        fit(str(tmp_path / run), url, steps=2)
    first, second = (read_manifest(tmp_path / run / "step=2.ckpt").save_id for run in ("one", "two"))
    assert first != second == RemoteFolder(url).save_id("step=2.ckpt")
    assert RemoteFolder(url).names() == ["step=2.ckpt"]
    assert verify(Upload.fetch(url, tmp_path / "back")).is_whole


def ranks(folder: str, url: str, strategy: Any) -> list[str]:
    fit(folder, url, strategy, **({"plugins": [AsyncCheckpointIO()]} if strategy == "ddp" else {}))
    return RemoteFolder(url).names()


@pytest.mark.parametrize("strategy", [{"zero_stage": 2}, "ddp"], ids=["zero2", "ddp"])
def test_one_rank_sends_what_all_have_written(tmp_path: Path, strategy: Any) -> None:
    url = f"file://{tmp_path}/there"
    with RankPool(2) as pool:
        first, _ = pool.run(ranks, 2, str(tmp_path / "here"), url, strategy)
    assert first == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    assert same(Upload.fetch(url, tmp_path / "back"), tmp_path / "here" / "step=6.ckpt")


def test_bad_input_is_told(tmp_path: Path) -> None:
    for url, text in [("/some/folder", "is no URL.*s3://"), ("nowhere://x", "fsspec knows no nowhere://.*memory")]:
        with pytest.raises(ValueError, match=text):
            Upload(url)
    for settings, text in [({"keep": 0}, "keep=0"), ({"retry_s": 0.0}, "retry_s=0.0"), ({"every_s": -1.0}, "every_s=-1.0")]:
        with pytest.raises(ValueError, match=text):
            Upload("memory://x", **settings)
    with pytest.raises(ValueError, match=r"SingleDeviceStrategy with TorchCheckpointIO.*plugins=\[AsyncCheckpointIO"):
        make_trainer("auto", Upload("memory://x")).fit(Net(), data())
    with pytest.raises(ValueError, match="what ModelCheckpoint or Preemption saves, and there is neither"):
        make_trainer({}, Upload("memory://x")).fit(Net(), data())
    with pytest.raises(NotACheckpointError, match="memory://empty holds no published checkpoint"):
        Upload.fetch("memory://empty", tmp_path / "x")


def test_without_fsspec_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ImportError, match=r"pip install 'kenotron\[data\]'"):
        Upload("memory://x")


@pytest.mark.parametrize("index", [["../other"], ["a/b"], [".."], [7], {"a": 1}])
def test_a_list_of_uploads_leads_nowhere_else(index: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "uploads.json").write_text(json.dumps(index))
    folder = RemoteFolder(f"file://{tmp_path}/run")
    with pytest.raises(ValueError, match="is no list of names of checkpoints"):
        folder.names()
    with pytest.raises(ValueError, match="is no name of something in"):
        folder.remove("../other")
    assert (tmp_path / "other").is_dir()
