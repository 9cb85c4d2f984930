"""Private torch names that the core leans on: each must still be there and behave."""

from __future__ import annotations

import inspect
from datetime import timedelta

import torch
from torch.distributed import TCPStore
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.stage import _PipelineStageBase

from kenotron.parallel import _torch, collectives


def test_receive_buffers_are_described_as_they_were() -> None:
    info = _torch.RecvInfo("x", 0, torch.zeros(2), None)
    assert (info.input_name, info.source, info.tensor_meta) == ("x", 0, None)
    assert info.buffer is not None


def test_stages_allocate_buffers_where_ours_refit_them() -> None:
    assert list(inspect.signature(PipelineStage._setup_forward_recv_info).parameters) == [
        "self", "num_microbatches", "has_backward",
    ]  # fmt: skip
    assert list(inspect.signature(_PipelineStageBase._setup_backward_recv_info).parameters) == ["self", "num_microbatches"]


def test_groups_take_a_time_out() -> None:
    assert _torch.group_options("cpu", timedelta(seconds=7))._timeout == timedelta(seconds=7)


def test_a_store_can_be_cloned_for_a_thread() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.clone().set("key", "value")  # type: ignore[attr-defined]
    assert store.get("key") == b"value"


def test_fused_optimizers_say_that_they_skip_steps_by_a_tensor() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], fused=True)
    assert optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]
    weight.grad, optimizer.found_inf = torch.ones(2), torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


def test_tensors_without_data_run_and_are_weighed() -> None:
    with _torch.FakeTensorMode(allow_non_fake_inputs=True):
        product = torch.empty(1000, 1000) @ torch.empty(1000, 1000)
    assert product.untyped_storage().nbytes() == 4_000_000


def test_collectives_of_a_silent_group_are_told_and_do_nothing() -> None:
    told: list[tuple[str, int]] = []
    group = _torch.SilentGroup(4, lambda kind, size: told.append((kind, size)))
    x = torch.ones(8)
    collectives.reduce_from(x, group)
    collectives.gather_from(x, 0, group, grad="slice")
    collectives.reduce_scatter_to(x, 0, group)
    collectives.all_to_all(x, group)
    assert told == [("all_reduce", 32), ("all_gather", 128), ("reduce_scatter", 32), ("all_to_all", 32)]


def test_compilations_are_told_until_it_is_enough() -> None:
    told: list[str] = []
    stop = _torch.watch_compilation(lambda: told.append("begin"), lambda: told.append("end"))
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert told == ["begin", "end"]
    stop()
    torch.compile(lambda x: x * 3, backend="eager")(torch.ones(2))
    assert told == ["begin", "end"]


def test_a_backward_pass_is_known_from_within() -> None:
    x = torch.ones(2, requires_grad=True)
    seen: list[bool] = []
    x.register_hook(lambda grad: seen.append(_torch.is_in_backward()))
    x.sum().backward()
    assert seen == [True] and not _torch.is_in_backward()


def test_data_that_is_set_has_another_storage() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    before = _torch.storage_id(weight)
    weight.detach().mul_(2)
    assert _torch.storage_id(weight) == before
    weight.data = torch.zeros(2)
    assert _torch.storage_id(weight) != before


def test_groups_of_parameters_are_gathered_by_what_is_watched() -> None:
    names = {"unshard", "_to_unsharded", "_to_sharded", "pre_backward", "post_backward", "is_sharded", "is_unsharded"}
    assert names <= set(dir(FSDPParamGroup))
    assert {"init_unsharded_param", "unsharded_param"} <= set(dir(FSDPParam))


def test_modes_see_factories_and_can_be_left() -> None:
    assert {torch.empty, torch.arange, torch.tensor, torch.as_tensor} <= _torch.device_constructors()
    with torch.device("meta"), _torch.without_functions():
        assert torch.ones(2).device.type == "cpu"


def test_real_tensors_are_made_within_a_fake_mode() -> None:
    with _torch.FakeTensorMode(), _torch.with_real_tensors():
        assert torch.ones(2).sum().item() == 2
