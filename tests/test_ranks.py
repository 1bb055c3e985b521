"""What one process can show of several: values over ranks, shards, and what is said of a launcher."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader

from trl_margins import distributed
from trl_margins.distributed import (
    agreed,
    check_lockstep,
    check_processes,
    check_reachable,
    counted_pairs,
    fsdp_dtype,
    fsdp_modules,
    full_tensor,
    gather_over_ranks,
    gathered_parameters,
    is_sharded,
    keep_outputs_of_fsdp,
    leave_process_group,
    local,
    most_pairs,
    reduce_tensors,
    reshard,
    shard_index,
    wait_before_leaving,
    warn_if_unsharded,
)
from trl_margins.trainers.evaluations import EvaluationMixin

LAUNCHED = {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}
JOINED_BY_NONE = "a launcher started 2 processes (WORLD_SIZE=2), but nothing joins them, and each would do the whole"
ONE_OF_ACCELERATE = "accelerate launch started one process, whatever --num_processes says"
ONE_OF_SLURM = "Slurm started 3 tasks, each of which is a run of its own"


@pytest.mark.parametrize(
    ("variables", "joined", "said"),
    [
        ({}, 1, ""),
        ({"WORLD_SIZE": "1", **LAUNCHED}, 2, ""),
        (LAUNCHED, 1, ONE_OF_ACCELERATE),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, ""),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1, ""),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1, ""),
        ({"SLURM_STEP_NUM_TASKS": "3"}, 1, ONE_OF_SLURM),
        ({"SLURM_STEP_NUM_TASKS": "3"}, 3, ""),
        ({"SLURM_STEP_NUM_TASKS": "3", **LAUNCHED}, 1, ONE_OF_ACCELERATE),
    ],
)
def test_what_may_be_meant_otherwise_is_said(variables, joined, said, monkeypatch, caplog):
    for name in (*LAUNCHED, "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_processes(joined)
    assert [record.getMessage()[: len(said)] for record in caplog.records] == [said] * bool(said)


def test_processes_that_nothing_joins(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(ValueError, match=f"^{re.escape(JOINED_BY_NONE)}") as refused:
        check_processes(1)
    assert str(refused.value).endswith("start it without a launcher, and without WORLD_SIZE in its environment")


@pytest.mark.parametrize(
    ("asked", "processes", "kind", "is_said"),
    [
        ("true", 2, DistributedType.MULTI_CPU, True),
        ("TRUE", 2, DistributedType.MULTI_CPU, True),
        ("true", 2, DistributedType.FSDP, False),
        ("true", 1, DistributedType.NO, False),
        ("false", 2, DistributedType.MULTI_CPU, False),
        (None, 2, DistributedType.MULTI_CPU, False),
    ],
)
def test_a_model_that_accelerate_does_not_shard(asked, processes, kind, is_said, monkeypatch, caplog):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if asked is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", asked)
    warn_if_unsharded(
        SimpleNamespace(num_processes=processes, distributed_type=kind, device=torch.device("cpu")),
    )
    assert ("on this cpu every process holds the whole model, as with DDP" in caplog.text) == is_said


def test_only_the_outputs_keep_their_dtype():
    given = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    for is_fsdp2 in (True, False):
        plugin = SimpleNamespace(mixed_precision_policy=given)
        accelerator = SimpleNamespace(is_fsdp2=is_fsdp2, state=SimpleNamespace(fsdp_plugin=plugin))
        keep_outputs_of_fsdp(accelerator)
        kept = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if is_fsdp2 else given
        assert plugin.mixed_precision_policy == kept
    for plugin in (None, SimpleNamespace(mixed_precision_policy=None)):
        keep_outputs_of_fsdp(SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin)))
        assert plugin is None or plugin.mixed_precision_policy is None
    keep_outputs_of_fsdp(SimpleNamespace(is_fsdp2=False, state=SimpleNamespace()))


def raising(error):
    def check():
        raise error

    return check


def test_one_process_agrees_with_itself():
    alone = SimpleNamespace(is_main_process=True, num_processes=1)
    assert agreed(alone, lambda: 5) == 5
    error = KeyError("x")
    with pytest.raises(KeyError) as raised:
        agreed(alone, raising(error))
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "others"),
    [
        (None, None),
        (ValueError("row 3"), ValueError("row 3")),
        (OSError("no space"), OSError("no space")),
        (FileNotFoundError("gone"), RuntimeError("FileNotFoundError: gone")),
        (KeyError("x"), RuntimeError("KeyError: 'x'")),
    ],
)
def test_the_main_process_checks_for_all(error, others, monkeypatch):
    """Its own error on the main process, one that survives the way on the others; and the result on all."""
    sent = []

    def broadcast(objects):
        sent.append(objects)
        return sent[0]

    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    check, kinds = (raising(error), (type(error), type(others))) if error else ((lambda: "made"), (None, None))
    for is_main, kind in zip((True, False), kinds, strict=True):
        state = SimpleNamespace(is_main_process=is_main, num_processes=2)
        with pytest.raises(kind) if kind else nullcontext() as raised:
            assert agreed(state, check if is_main else raising(AssertionError("not here"))) == "made"
        if kind:
            assert raised.value is error if is_main else (type(raised.value) is kind)
            assert is_main or str(raised.value) == str(others)


class Rank(SimpleNamespace):
    """An accelerator of one rank among several, whose pairs have the numbers `sizes`; `gathered` counts the calls."""

    device = torch.device("cpu")
    gathered = 0

    @property
    def num_processes(self):
        return len(self.sizes)

    def gather(self, values):
        """Of sizes: those of all ranks. Of a rank's padded values: theirs plus 100 for each rank."""
        self.gathered += 1
        if values.dtype == torch.long:
            assert values.tolist() == [self.sizes[self.process_index]]
            return torch.tensor(self.sizes)
        assert len(values) == max(self.sizes)
        ranks = range(self.num_processes)
        return torch.cat([values + 100 * (rank - self.process_index) for rank in ranks])


def test_the_numbers_of_pairs_are_read_only_where_they_may_differ():
    for sizes, even, most, reads in (([3], False, 3, 0), ([3, 3], True, 3, 0), ([3, 1, 4], False, 4, 1)):
        rank = Rank(sizes=sizes, process_index=0, even_batches=even)
        assert most_pairs(rank, sizes[0]) == most
        assert rank.gathered == reads


@pytest.mark.parametrize("mine", [0, 1, 2])
def test_values_of_uneven_ranks(mine):
    sizes = [2, 1, 3]
    gather, first = gather_over_ranks(Rank(sizes=sizes, process_index=mine, even_batches=False), sizes[mine])
    own = torch.arange(sizes[mine], dtype=torch.float32) + 100 * mine
    padded = torch.tensor([*own.tolist(), 0.0, 0.0])
    everyone = [padded[:size] + 100 * (rank - mine) for rank, size in enumerate(sizes)]
    assert torch.equal(gather(own), torch.cat(everyone))
    assert first == sum(sizes[:mine])


def test_values_of_even_ranks_begin_where_their_rank_does():
    rank = Rank(sizes=[4, 4, 4], process_index=2, even_batches=True)
    assert gather_over_ranks(rank, 4) == (rank.gather, 8)
    assert gather_over_ranks(Rank(sizes=[4], process_index=0, even_batches=False), 4)[1] == 0
    assert rank.gathered == 0


@pytest.mark.parametrize(
    ("remainder", "ends", "counted"),
    [
        (1, True, [1, 0, 0]),
        (7, True, [4, 3, 0]),
        (11, True, [4, 4, 3]),
        (0, True, None),
        (-1, True, None),
        (1, False, None),
    ],
)
def test_pairs_that_fill_up_the_last_batch_of_an_evaluation_do_not_count(remainder, ends, counted):
    state = SimpleNamespace(remainder=remainder, end_of_dataloader=ends)
    rank = Rank(sizes=[4, 4, 4], process_index=1, even_batches=True, gradient_state=state)
    assert counted_pairs(rank, 4) == counted
    one = Rank(sizes=[4], process_index=0, even_batches=True, gradient_state=state)
    uneven = Rank(sizes=[4, 4, 4], process_index=1, even_batches=False, gradient_state=state)
    assert counted_pairs(one, 4) is counted_pairs(uneven, 4) is None


@pytest.mark.parametrize("mine", [0, 1, 2])
def test_a_rank_without_a_pair_that_counts_sees_its_own_behind_the_others(mine):
    sizes = [2, 1, 0]
    gather, first = gather_over_ranks(
        Rank(sizes=sizes, process_index=mine, even_batches=True), max(sizes[mine], 1), sizes
    )
    own = torch.arange(max(sizes[mine], 1), dtype=torch.float32) + 100 * mine
    padded = torch.tensor([*own.tolist(), 0.0])[:2]
    counted = [padded[:size] + 100 * (rank - mine) for rank, size in enumerate(sizes)]
    assert torch.equal(gather(own), torch.cat([*counted, own] if mine == 2 else counted))
    assert torch.equal(gather(own)[first:][: len(own)], own)


def test_ranks_with_as_many_batches():
    class Loader(SimpleNamespace):
        def __len__(self):
            return self.n

    loader = Loader(n=3, dataset=[0])
    stream = Loader(n=3, dataset=iter([0]))
    uneven = {"process_index": 0, "even_batches": False}
    check_lockstep(Rank(sizes=[3, 3], **uneven), loader, "train")
    for passed in (Rank(sizes=[3], **uneven), Rank(sizes=[3, 2], process_index=0, even_batches=True)):
        check_lockstep(passed, loader, "train")
        assert passed.gathered == 0
    check_lockstep(Rank(sizes=[3, 2], **uneven), stream, "train")
    with pytest.raises(ValueError, match=r"the ranks have \[3, 2\] batches of the eval data set, and would wait"):
        check_lockstep(Rank(sizes=[3, 2], **uneven), loader, "eval")


def test_one_process_has_nothing_to_reduce():
    tensors = {"a": torch.ones(2)}
    assert reduce_tensors(SimpleNamespace(num_processes=1), tensors, "sum") is tensors
    several = SimpleNamespace(num_processes=2, reduce=lambda tensor, how: {"sum": 2, "mean": 1}[how] * tensor)
    assert reduce_tensors(several, tensors, "sum")["a"].tolist() == [2.0, 2.0]
    assert reduce_tensors(several, tensors, "mean")["a"].tolist() == [2.0, 2.0]


@pytest.fixture
def ranks(request):
    """A process that takes itself for the last of several."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param - 1, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [5, 6], indirect=True)
def test_the_number_of_a_shard(ranks):
    """Of ranks in two rows of three: replicas have the same number, and no two parts do."""
    if ranks == 5:
        assert shard_index(DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (5,)), [Shard(0)])) == 4
        return
    mesh = init_device_mesh("cpu", (2, 3))  # this rank has the place (1, 2)
    values = torch.ones(2, 4)
    for placements, index in (
        ((Shard(0), Shard(1)), 1 * 3 + 2),
        ((Replicate(), Shard(0)), 2),
        ((Shard(0), Replicate()), 1),
        ((Replicate(), Replicate()), 0),
    ):
        tensor = DTensor.from_local(values, mesh, placements, run_check=False)
        assert shard_index(tensor) == index
        assert is_sharded(tensor)
        assert torch.equal(local(tensor), values)
    assert shard_index(values) == 0
    assert not is_sharded(values)
    assert local(values) is full_tensor(values) is values


def test_parameters_without_names_are_refused():
    with pytest.raises(ValueError, match="FSDP1 keeps no parameters by name, which GAPO and SAM need: set fsdp"):
        check_reachable(FullyShardedDataParallel.__new__(FullyShardedDataParallel), {})
    model = nn.Linear(2, 2)
    check_reachable(model, dict(model.named_parameters()))
    model.weight.ds_id = 0  # as of a ZeRO-3 that leaves nothing else
    with pytest.raises(ValueError, match="'weight' is partitioned by a ZeRO-3 without ds_tensor, ds_numel"):
        check_reachable(model, dict(model.named_parameters()))


def sharded(mesh, dtype=None):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    for module in (model[1], model):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype), reshard_after_forward=False)
    return model


def test_a_model_that_fsdp2_shards(one_process):
    model = sharded(one_process)
    assert fsdp_modules(model) == [model, model[1]]
    assert fsdp_dtype(model) is None
    assert fsdp_dtype(sharded(one_process, torch.bfloat16)) == torch.bfloat16
    assert fsdp_modules(model[0]) == []
    assert fsdp_dtype(model[0]) is None
    names = ["0.weight", "1.bias"]
    found = gathered_parameters(model, names)
    assert sorted(found) == names
    for name, parameter in found.items():
        assert parameter.shape == dict(model.named_parameters())[name].shape
        assert not isinstance(parameter, DTensor)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"'2\.weight' is sharded by more than FSDP2"):
        gathered_parameters(model, [*names, "2.weight"])


@pytest.mark.parametrize("after_error", [False, True])
def test_gathered_parameters_are_sharded_again(after_error, one_process):
    model = sharded(one_process)
    if after_error:
        reshard(model, after_error=True)  # before any forward pass there is nothing to reset
        model[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError) if after_error else nullcontext():
        model(torch.ones(1, 2))
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    reshard(model, after_error)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not after_error:
        with torch.no_grad():
            next(model.parameters()).to_local().fill_(7.0)
            gathered = gathered_parameters(model, ["0.weight"])
            assert model(torch.ones(1, 2)).isfinite().all()
        assert (gathered["0.weight"] == 7.0).all()


def test_zero3_gathers_anew_too():
    model, released = nn.Linear(1, 1), []
    model.weight._z3_optimizer = SimpleNamespace(empty_partition_cache=lambda: released.append(1))
    reshard(model)
    assert released == [1]


def test_what_is_done_at_the_end(monkeypatch, tmp_path):
    """Nothing without a group; with gloo, the others are waited for, and one that is gone is no error."""
    waits = []

    def barrier():
        waits.append(1)
        raise RuntimeError("the other side has gone")

    monkeypatch.setattr(dist, "barrier", barrier)
    leave_process_group()
    wait_before_leaving()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    leave_process_group()
    assert not dist.is_initialized()
    assert not waits
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wait_before_leaving()
    assert dist.is_initialized()
    leave_process_group()
    assert not dist.is_initialized()
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("options", "ranks", "is_stream", "said"),
    [
        ({}, 2, True, "its first rows are read again behind its last, up to 7 in all"),
        ({"split_batches": True}, 2, True, "its first rows are read again behind its last, up to 3 in all"),
        ({}, 1, True, ""),
        ({}, 2, False, ""),
        ({"drop_last": True}, 1, False, "if it is not full: 2 of 10 pairs count nowhere"),
        ({"drop_last": True}, 3, False, "if it is not full: 10 of 10 pairs count nowhere"),
        ({"drop_last": True, "split_batches": True}, 3, False, "if it is not full: 2 of 10 pairs count nowhere"),
        ({"drop_last": True, "size": 5}, 2, False, ""),
    ],
)
def test_rows_that_an_evaluation_counts_otherwise_are_said_once(options, ranks, is_stream, said, caplog):
    """accelerate fills up to a whole batch: of all ranks together, or the one that they share."""
    rows = Dataset.from_dict({"a": range(10)})
    trainer = EvaluationMixin.__new__(EvaluationMixin)
    trainer.args = SimpleNamespace(
        eval_batch_size=options.get("size", 4),
        dataloader_drop_last=options.get("drop_last", False),
        accelerator_config=SimpleNamespace(split_batches=options.get("split_batches", False)),
    )
    trainer.accelerator = SimpleNamespace(num_processes=ranks)
    trainer.is_world_process_zero = lambda: True
    for _ in range(2):
        trainer._warn_of_rows(DataLoader(rows.to_iterable_dataset() if is_stream else rows))
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
