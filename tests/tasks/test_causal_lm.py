"""CausalLM, ChatData and StreamData: the same numbers on every layout, and nothing lost or repeated over kills."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

import kenotron
from kenotron.data.fim import FillInTheMiddle
from kenotron.data.loader import Loading
from kenotron.data.nanoset import NanosetWriter
from kenotron.data.rows import IGNORED
from kenotron.data.source import ArraySource
from kenotron.data.stream import Sampling
from kenotron.data.tokenize.vocabulary import train_tokenizer
from kenotron.hf.configuration import make_config
from kenotron.tasks import CausalLM, ChatData, StreamData, TokenData
from kenotron.testing import RankPool, RanksFailedError

VOCABULARY = 300
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
QUICK = Loading(num_workers=0)


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Put back what training in this process makes of the logs."""
    ours, lightnings = logging.getLogger("kenotron"), logging.getLogger("lightning.pytorch")
    before = ours.parent, ours.level, lightnings.level
    yield
    ours.parent = before[0]
    ours.setLevel(before[1])
    lightnings.setLevel(before[2])


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3) as processes:
        yield processes


def documents(count: int = 40) -> list[np.ndarray]:
    """Documents of 2 to 17 tokens."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCABULARY, 2 + i % 16) for i in range(count)]


def ragged(batch: int = 6) -> TokenData:
    """Samples with padding, so that batches and ranks have different numbers of tokens."""
    corpora, held_out = (
        {"a": ArraySource("a", documents())},
        {"b": ArraySource("b", documents(9)), "c": ArraySource("c", documents(5))},
    )
    sampling = Sampling(samples="documents")
    return TokenData(corpora, 16, batch, sampling=sampling, loading=QUICK, validation=held_out, val_batch_size=2)


class History(L.Callback):
    """Keeps losses and samples, saves after a batch, and ends the training after another."""

    def __init__(self, save_at: int = -1, path: str = "", module: Any = None) -> None:
        self.save_at, self.path, self.losses, self.seen = save_at, path, [], []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.seen.append(batch["input_ids"].tolist())

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))
        if len(self.seen) == self.save_at:
            trainer.save_checkpoint(self.path)
            if isinstance(trainer.strategy, kenotron.KenotronStrategy):
                trainer.strategy.checkpointer.wait()
            trainer.strategy.barrier()


def train(
    strategy: Any,
    steps: int,
    data: Any,
    model: Any = None,
    save_at: int = -1,
    path: str = "",
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(1, verbose=False)
    history = History(save_at, path)
    strategy = kenotron.KenotronStrategy(**strategy) if isinstance(strategy, dict) else strategy
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[history], num_sanity_val_steps=0,
        **{"val_check_interval": steps, "check_val_every_n_epoch": None, **settings},
    )  # fmt: skip
    module = CausalLM(model or MODEL, learning_rate=1e-2, warmup_steps=2, total_steps=20)
    trainer.fit(module, datamodule=data() if callable(data) else data, ckpt_path=path if resume else None)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"losses": history.losses, "seen": history.seen, "metrics": metrics}


# ------------------------------------------------------------------------------------------------------------- CausalLM


@pytest.mark.parametrize(
    "layouts",
    [
        [(2, {"pp": 2}), (2, {})],
        pytest.param([(3, {"zero_stage": 3}), (2, {"tp": 2}), (2, {"cp": 2})], marks=pytest.mark.slow),
    ],
)
def test_losses_and_perplexities_are_those_of_all_tokens_on_every_layout(pool: RankPool, layouts: Any) -> None:
    whole = pool.run(train, 1, {}, 3, ragged)[0]
    assert set(whole["metrics"]) >= {"loss", "val_loss/b", "perplexity/b", "val_loss/c", "perplexity/c"}
    assert whole["metrics"]["perplexity/b"] == pytest.approx(math.exp(whole["metrics"]["val_loss/b"]), rel=1e-5)
    assert whole["losses"][0] == pytest.approx(math.log(VOCABULARY), abs=0.2)
    for ranks, layout in layouts:
        for found in pool.run(train, ranks, layout, 3, ragged):
            assert np.allclose(found["losses"], whole["losses"], rtol=2e-5), layout
            for name, value in whole["metrics"].items():
                if name.startswith(("val_loss", "perplexity")):
                    assert found["metrics"][name] == pytest.approx(value, rel=1e-4), (layout, name)


def test_accumulated_batches_weigh_by_their_tokens(pool: RankPool) -> None:
    whole = pool.run(train, 1, {}, 4, ragged)[0]
    parts = pool.run(train, 2, {}, 4, ragged, accumulate_grad_batches=3)[0]
    # The last loss of a validation follows from all gradients before.
    assert parts["metrics"]["val_loss/b"] == pytest.approx(whole["metrics"]["val_loss/b"], rel=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(24).reshape(2, 12),
        {"input_ids": torch.arange(24).reshape(2, 12)},
        {"input_ids": torch.arange(24).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)},
        {"input_ids": torch.arange(24).reshape(2, 12), "labels": torch.arange(24).reshape(2, 12)},
    ],
)
@pytest.mark.parametrize("implementation", ["kenotron", "transformers"])
def test_batches_of_other_collators_train(batch: Any, implementation: Any) -> None:
    torch.manual_seed(0)
    module = CausalLM(MODEL, implementation=implementation)
    module.configure_model()
    loss, count = module._loss(batch)
    ids = torch.arange(24).reshape(2, 12)
    logits = module(input_ids=ids).logits
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert int(count) == 22 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_is_padding_is_not_learned_and_a_batch_of_nothing_is_no_nan() -> None:
    module = CausalLM(MODEL)
    module.configure_model()
    ids, mask = torch.arange(24).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    assert int(module._loss({"input_ids": ids, "attention_mask": mask})[1]) == 11 + 4
    loss, count = module._loss({"input_ids": ids, "labels": torch.full_like(ids, IGNORED)})
    assert (loss.item(), int(count)) == (0.0, 0)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (MODEL, "Decoder"),
        ({"model_type": "mamba2", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "num_heads": 4,
          "head_dim": 8, "n_groups": 1}, "Mamba"),
        ({"model_type": "gpt_neox", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2}, "GPTNeoXForCausalLM"),
    ],
)  # fmt: skip
def test_the_model_is_ours_where_it_covers_the_family(model: Any, kind: str) -> None:
    module = CausalLM(model)
    module.configure_model()
    assert type(module.model).__name__ == kind
    found = train("auto", 2, ragged(), model)
    assert all(math.isfinite(loss) for loss in found["losses"])


def test_directories_are_read_or_taken_as_configurations(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    stored = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
    stored.save_pretrained(tmp_path / "hf")
    ids = torch.arange(10)[None]
    logits = []
    for from_scratch in (False, True):
        module = CausalLM(str(tmp_path / "hf"), from_scratch=from_scratch)
        module.configure_model()
        logits.append(module.eval()(input_ids=ids).logits)
    wanted = stored.eval()(input_ids=ids).logits
    assert torch.allclose(logits[0], wanted, atol=1e-5) and not torch.allclose(logits[1], wanted, atol=1e-2)


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="without model_type"):
        CausalLM({"vocab_size": 3})
    trainer = L.Trainer(max_steps=-1, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="no end that a schedule"):
        trainer.fit(CausalLM(MODEL), datamodule=ragged())
    for batch in ([1, 2], {"text": "x"}):
        with pytest.raises(ValueError, match="Give a mapping with input_ids"):
            CausalLM(MODEL)._loss(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama", "hiden_size": 64}, r"LlamaConfig has no setting hiden_size \(the nearest is hidden_size\)"),
        ({"model_type": "lama"}, "no model_type 'lama'. Near it: llama"),
        ({"model_type": "llama", "hidden_size": "wide"}, "no configuration that transformers takes"),
    ],
)
def test_a_configuration_with_what_its_family_does_not_have_is_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLM(settings).configure_model()


def test_older_names_of_settings_are_taken() -> None:
    config = make_config({"model_type": "llama", "rope_theta": 5e5, "torch_dtype": "bfloat16", "transformers_version": "4.1"})
    assert config.rope_parameters["rope_theta"] == 5e5


CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 2
  val_check_interval: 2
  check_val_every_n_epoch: null
  strategy: kenotron
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model:
  model: {model}
  learning_rate: 0.001
  warmup_steps: 1
data:
  corpora: {{a: {folder}/a.ds}}
  validation: {{a: {folder}/a.ds}}
  sequence_length: 16
  global_batch_size: 4
  loading: {{num_workers: 0}}
  fim: {{rate: 0.9, prefix: 297, middle: 298, suffix: 299}}
"""


def test_everything_runs_from_yaml(tmp_path: Path) -> None:
    warnings.filterwarnings("ignore")
    with NanosetWriter(tmp_path / "a.ds", token_size=2) as writer:
        for document in documents():
            writer.write(np.minimum(document, 296))
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path, model=json.dumps(MODEL)))
    cli = LightningCLI(CausalLM, TokenData, args=["fit", "--config", str(tmp_path / "config.yaml")], save_config_callback=None)
    assert cli.trainer.global_step == 2 and cli.datamodule.num_trained_samples == 8
    assert 100 < float(cli.trainer.callback_metrics["perplexity/a"]) < 1000


def test_infilled_samples_go_on_after_a_resume(tmp_path: Path) -> None:
    def data() -> TokenData:
        fim = FillInTheMiddle(rate=0.7, prefix=297, middle=298, suffix=299)
        return TokenData({"a": ArraySource("a", [np.minimum(d, 296) for d in documents()])}, 16, 4, loading=QUICK, fim=fim)

    whole = train("auto", 12, data)
    assert sum(297 in sample for batch in whole["seen"] for sample in batch) > 10
    train("auto", 5, data, save_at=5, path=str(tmp_path / "c.ckpt"))
    rest = train("auto", 12, data, path=str(tmp_path / "c.ckpt"), resume=True)
    assert rest["seen"] == whole["seen"][5:]


# ------------------------------------------------------------------------------------------------------------- ChatData


def conversations(count: int = 30) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "one " * (i % 9 + 1)}]}
        for i in range(count)
    ]


def chat_data(folder: str, **changes: Any) -> ChatData:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    given = {
        "sequence_length": 60,
        "global_batch_size": 6,
        "template": template,
        "cache_dir": f"{folder}/cache",
        "loading": QUICK,
    }
    return ChatData({"talk": conversations()}, f"{folder}/t", validation={"talk": conversations(5)}, **{**given, **changes})


def train_on_chats(folder: str, *args: Any, **settings: Any) -> dict[str, Any]:
    return train(*args, lambda: chat_data(folder), **settings)


def test_conversations_train_on_several_ranks_and_resume_on_others(pool: RankPool, tmp_path: Path) -> None:
    train_tokenizer(["user: What is 1? assistant: one one"], 290, tmp_path / "t")
    whole = pool.run(train_on_chats, 1, str(tmp_path), {}, 6)[0]
    saved = str(tmp_path / "c.ckpt")
    first = pool.run(train_on_chats, 3, str(tmp_path), {}, 3, save_at=3, path=saved)
    rest = pool.run(train_on_chats, 2, str(tmp_path), {}, 6, path=saved, resume=True)
    joined = [[row for rank in first for row in rank["seen"][i]] for i in range(3)]
    joined += [[row for rank in rest for row in rank["seen"][i]] for i in range(3)]
    assert joined == whole["seen"]
    assert np.allclose([*first[0]["losses"], *rest[0]["losses"]], whole["losses"], rtol=1e-4)
    assert len([place for place in (tmp_path / "cache").iterdir() if place.name.startswith("chat-")]) == 2


def test_chats_of_columns_and_options_that_do_not_exist_are_told(tmp_path: Path) -> None:
    train_tokenizer(["a"], 260, tmp_path / "t")
    with pytest.raises(ValueError, match="give path, and of"):
        ChatData({"x": {"file": "a"}}, tmp_path / "t", 16, 2)
    with pytest.raises(ValueError, match="is no tokenizer"):
        ChatData({"x": conversations()}, tmp_path / "none", 16, 2).prepare_data()
    with pytest.raises(ValueError, match="corpora is empty"):
        ChatData({}, tmp_path / "t", 16, 2)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations(3)))
    data = ChatData(
        {"x": {"path": str(path), "template": "none", "too_long": "cut"}}, tmp_path / "t", 16, 2, cache_dir=tmp_path
    )
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1 .*template='none' takes prompts and completions"):
        data.prepare_data()


# ----------------------------------------------------------------------------------------------------------- StreamData


class Endless:
    """Rows without a state."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for document in documents(90):
            yield {"input_ids": document.tolist()}


def stream_data(kind: str, **changes: Any) -> StreamData:
    rows: Any = Endless()
    if kind == "datasets":
        import datasets

        rows = datasets.Dataset.from_list(list(Endless())).to_iterable_dataset(num_shards=4)
    given = {"sampling": Sampling(samples="documents", shuffle=False), "in_worker": False}
    return StreamData(rows, 16, 6, **{**given, "validation": {"v": ArraySource("v", documents(4))}, **changes})


def train_on_stream(kind: str, options: dict[str, Any], *args: Any, **settings: Any) -> dict[str, Any]:
    return train(*args, lambda: stream_data(kind, **options), **settings)


@pytest.mark.parametrize("kind", ["plain", "datasets"])
def test_streams_go_on_at_the_next_sample_on_other_ranks(kind: str, pool: RankPool, tmp_path: Path) -> None:
    whole = pool.run(train_on_stream, 1, kind, {}, "auto", 9)[0]
    assert "perplexity/v" in whole["metrics"]
    saved = str(tmp_path / "c.ckpt")
    first = pool.run(train_on_stream, 2, kind, {"in_worker": True}, {}, 5, save_at=4, path=saved)
    rest = pool.run(train_on_stream, 3, kind, {}, {}, 9, path=saved, resume=True)
    joined = [[row for rank in first for row in rank["seen"][i]] for i in range(4)]
    joined += [[row for rank in rest for row in rank["seen"][i]] for i in range(5)]
    assert joined == whole["seen"]


def test_a_stream_that_is_not_repeated_ends_the_training_with_its_last_whole_batch() -> None:
    found = train(
        "auto", 1000, lambda: stream_data("plain", repeat=False), val_check_interval=None, max_epochs=1, limit_val_batches=0
    )
    rows = [tuple(row) for batch in found["seen"] for row in batch]
    assert len(rows) > 20 and len(rows) % 6 == 0


def test_streams_of_other_settings_or_ranks_are_refused(pool: RankPool, tmp_path: Path) -> None:
    saved = str(tmp_path / "c.ckpt")
    train("auto", 2, lambda: stream_data("plain"), save_at=2, path=saved)
    with pytest.raises(ValueError, match="samples='documents', and the data module has samples='windows'"):
        train("auto", 4, lambda: stream_data("plain", sampling=Sampling(shuffle=False)), path=saved, resume=True)
    with pytest.raises(ValueError, match="can't be divided over 1 data-parallel ranks × 4"):
        train("auto", 2, lambda: stream_data("plain"), accumulate_grad_batches=4)
    with pytest.raises(RanksFailedError, match=r"the stream holds token id \d+, and the model's vocabulary has 20"):
        pool.run(train_on_stream, 1, "plain", {"vocab_size": 20, "validation": None}, "auto", 2)
