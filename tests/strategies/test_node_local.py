"""Nodes that share no file system: two of two processes each, every one of which sees its own node's folder alone."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from strategy_helpers import SLOW, Classifier, Task, loaders, make_trainer

import kenotron
from kenotron.callbacks import Upload
from kenotron.checkpoint import is_checkpoint, load_state, load_state_dict, merge, read_manifest
from kenotron.checkpoint.remote import RemoteFolder
from kenotron.strategies import CheckpointSettings, KenotronStrategy
from kenotron.testing import RankPool


class OnNodes(KenotronStrategy):  # type: ignore[misc]
    """Sees its node's folder under a path that is the same on all nodes."""

    def own(self, path: Any) -> str:
        return str(path).replace("node-0", "DISK").replace("DISK", f"node-{self.node_rank}")

    def _path_of_rank_0(self, path: Any, save_id: str) -> str:
        return self.own(super()._path_of_rank_0(path, save_id))

    def remove_checkpoint(self, filepath: Any) -> None:
        super().remove_checkpoint(self.own(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        loaded: dict[str, Any] = super().load_checkpoint(self.own(checkpoint_path), weights_only)
        return loaded

    def _checkpoint_folders(self, trainer: Any) -> list[Path]:
        return [Path(self.own(folder)) for folder in super()._checkpoint_folders(trainer)]

    def _exchange(self, own: Any) -> list[Any]:
        told = super()._exchange(json.dumps(own).replace(f"node-{self.node_rank}", "DISK"))
        return [json.loads(self.own(each)) for each in told]


class AsTheyAre(OnNodes):
    """Nodes that share the folder, whatever they were told."""

    def own(self, path: Any) -> str:
        return str(path)


class OwnFolder(L.Callback):
    """Names the node's folder to those who look into it themselves."""

    def __init__(self, keep: ModelCheckpoint) -> None:
        self.keep = keep

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.keep.dirpath = trainer.strategy.own(self.keep.dirpath)


def fit(strategy: Mapping[str, Any], folder: str, **options: Any) -> list[str]:
    rank = int(os.environ["RANK"])
    os.environ |= {"GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    L.seed_everything(1, verbose=False)
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=1, monitor="step", mode="max")
    on_nodes = options.pop("kind", OnNodes)(**strategy, checkpoint=CheckpointSettings(node_local=True))
    callbacks: list[L.Callback] = [keep]
    if url := options.pop("url", None):
        callbacks += [OwnFolder(keep), Upload(url, every_s=0.05)]
    trainer = make_trainer(on_nodes, callbacks, devices=2, num_nodes=2, max_epochs=options.pop("max_epochs", 2))
    train, _ = loaders(trainer, Task(Classifier, strategy))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Classifier(dropout=0.1), train, **options)
    trainer.save_checkpoint(f"{folder}/end")
    return [str(warning.message) for warning in caught]


LAYOUTS = [
    {"zero_stage": 3},
    {"tp": 2},
    pytest.param({"zero_stage": 2, "dp_replicate": 2}, marks=SLOW),
    pytest.param({"pp": 2, "microbatches": 2}, marks=SLOW),
]


@pytest.mark.parametrize("strategy", LAYOUTS, ids=str)
def test_each_node_keeps_its_part_and_resumes_from_it(pool: RankPool, strategy: dict[str, Any], tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    pool.run(fit, 4, strategy, str(one / "DISK"))
    assert [sorted(path.name for path in (one / f"node-{node}").iterdir()) for node in (0, 1)] == [["end", "step=6.ckpt"]] * 2
    pool.run(fit, 4, strategy, str(other / "DISK"), max_epochs=1)
    resumed = pool.run(fit, 4, strategy, str(other / "DISK"), ckpt_path=str(other / "DISK" / "step=3.ckpt"))
    assert not any("restored without" in message for messages in resumed for message in messages)
    parts = [[folder / f"node-{node}" / "end" for node in (0, 1)] for folder in (one, other)]
    for part in (*parts[0], *parts[1]):
        assert read_manifest(part).node is not None
    merged = [merge(found, tmp_path / f"merged-{index}") for index, found in enumerate(parts)]
    expected, found = (load_state_dict(each, "") for each in merged)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected if not name.startswith(("state/", "rank_state/")))


@SLOW
def test_each_node_sends_its_part(pool: RankPool, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    pool.run(fit, 4, {"zero_stage": 3}, str(tmp_path / "DISK"), url=url)
    for node in (0, 1):
        assert RemoteFolder(f"{url}/node-{node}").names()[-1] == "step=6.ckpt"
    back = [Upload.fetch(f"{url}/node-{node}", tmp_path / f"back-{node}", "step=6.ckpt") for node in (0, 1)]
    assert [read_manifest(path).node is not None for path in back] == [True, True]
    here = merge([tmp_path / f"node-{node}" / "step=6.ckpt" for node in (0, 1)], tmp_path / "here")
    weights, expected = kenotron.load_state_dict(merge(back, tmp_path / "merged")), kenotron.load_state_dict(here)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def load_elsewhere(path: str) -> dict[str, torch.Tensor]:
    trainer = make_trainer({}, max_epochs=3)
    module = Classifier()
    train, _ = loaders(trainer, Task(Classifier, {}))
    trainer.fit(module, train, ckpt_path=path)
    assert trainer.global_step == 9
    return module.state_dict()


def test_merged_parts_resume_on_another_layout(pool: RankPool, tmp_path: Path) -> None:
    pool.run(fit, 4, {"zero_stage": 3}, str(tmp_path / "DISK"))
    merge([tmp_path / "node-0" / "end", tmp_path / "node-1" / "end"], tmp_path / "merged")
    weights = kenotron.load_state_dict(tmp_path / "merged")
    found = pool.run(load_elsewhere, 1, str(tmp_path / "merged"))[0]
    assert found.keys() == weights.keys()
    assert load_state(tmp_path / "merged")["lightning"]["global_step"] == 6


def test_a_node_that_lost_the_last_checkpoint_takes_the_others_back(pool: RankPool, tmp_path: Path) -> None:
    pool.run(fit, 4, {}, str(tmp_path / "DISK"))
    shutil.rmtree(tmp_path / "node-1" / "end")
    with pytest.raises(RuntimeError, match="no checkpoint is on all nodes"):
        pool.run(fit, 4, {}, str(tmp_path / "DISK"), ckpt_path=str(tmp_path / "DISK" / "end"))
    assert is_checkpoint(tmp_path / "node-0" / "end")


def test_a_folder_that_nodes_share_is_refused_at_the_start(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ValueError: node_local=True, but nodes share .*files of ranks \[0, 2\]"):
        pool.run(fit, 4, {}, str(tmp_path / "DISK"), kind=AsTheyAre)
    assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]
