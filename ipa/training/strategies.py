"""Several processes that train one adapter: DDP, FSDP (torch's ``fully_shard``), ZeRO-2 (Rajbhandari et al. 2020).

Every process takes its part of a step's samples; the gradient is the mean over all of them. A checkpoint always has
whole tensors, so any number of processes can resume with any strategy. (DeepSpeed's need the same number of processes.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ipa.errors import UserError, brief
from ipa.identity import slurm_tasks
from ipa.model import IPAdapterModel

TIMEOUT_MINUTES = 60.0  # the other ranks wait while the first scores previews
# open_clip's blocks; diffusers and transformers name theirs in _no_split_modules
OPEN_CLIP_BLOCKS = {"ResidualAttentionBlock", "CustomResidualAttentionBlock"}
STARTED_WITH = {"Slurm": "sbatch --ntasks-per-node=… --nodes=…", "torchrun": "--nproc-per-node=… --nnodes=…"}

log = logging.getLogger(__name__)


class AdapterDDP(DDPStrategy):
    """Lightning's DDP without the frozen parts: they are not broadcast at the start and are in no bucket.

    Every step uses all trained weights in the same order, so the graph is static. With accumulated gradients DDP must
    not assume so: it would learn the graph from its first pass, which does not reduce gradients.
    """

    def __init__(self, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
        self.patience = timedelta(minutes=timeout_minutes)
        super().__init__(
            cluster_environment=found_environment(),
            timeout=self.patience,
            find_unused_parameters=False,
            gradient_as_bucket_view=True,
        )

    def _configure_launcher(self) -> None:
        check_processes(self)
        super()._configure_launcher()

    def setup_distributed(self) -> None:
        join_restarted_group(self.patience, self.root_device)
        super().setup_distributed()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        assert self.lightning_module is not None
        self._ddp_kwargs["static_graph"] = self.lightning_module.trainer.accumulate_grad_batches == 1
        # what is not trained, and all buffers: those of the trainable set never change
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        return super()._setup_model(model)


class AdapterFSDP(ModelParallelStrategy):
    """Lightning's strategy for ``fully_shard``, which ``AdapterTraining.configure_model`` applies; see ``shard``.

    Lightning's checkpoints of this strategy hold the whole module with the base; here they are those of every other
    strategy: one file with the trained weights as whole tensors, written by the first process.
    """

    shards_base = True

    # bypass what ModelParallelStrategy overrides
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    load_checkpoint = Strategy.load_checkpoint
    save_checkpoint = Strategy.save_checkpoint
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer

    def __init__(self, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
        self.patience = timedelta(minutes=timeout_minutes)
        super().__init__(
            data_parallel_size=1,  # becomes the world size in setup_environment
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=self.patience,
        )
        self.cluster_environment = found_environment()

    def _configure_launcher(self) -> None:
        check_processes(self)
        super()._configure_launcher()

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size
        join_restarted_group(self.patience, self.root_device)
        super().setup_environment()

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(Strategy.optimizer_state(self, optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(sharded(state, optimizer))  # to the parameters' device


class AdapterZeRO2(AdapterFSDP):
    """Only the trained weights are sharded; they are gathered from the forward pass until their gradients are made."""

    shards_base = False


STRATEGIES: dict[str, Callable[[float], Strategy]] = {"ddp": AdapterDDP, "fsdp": AdapterFSDP, "zero2": AdapterZeRO2}


def make_strategy(kind: str, accelerator: str, devices: Any, num_nodes: int, timeout_minutes: float) -> Strategy | str:
    """``kind`` is ddp, fsdp or zero2, if several processes are configured or were started; else Lightning chooses."""
    if kind not in STRATEGIES:
        raise UserError(f"trainer.strategy.kind={kind}: give one of {', '.join(STRATEGIES)}")
    started = environment.world_size() if (environment := found_environment()) else 1
    are_several = max(num_nodes, started) > 1 or count_devices(accelerator, devices) > 1
    return STRATEGIES[kind](timeout_minutes) if are_several else "auto"


def count_devices(accelerator: str, devices: Any) -> int:
    """How many of this machine's devices ``devices`` selects; 1 if there are none, which Lightning reports."""
    kind: Any = CPUAccelerator if accelerator == "cpu" or not CUDAAccelerator.is_available() else CUDAAccelerator
    if kind is CPUAccelerator and accelerator not in ("cpu", "auto"):
        return 1
    try:
        number = kind.auto_device_count() if devices == "auto" else kind.parse_devices(devices)
        return len(kind.get_parallel_devices(number))
    except (TypeError, MisconfigurationException) as error:
        raise UserError(f"trainer.devices={devices}: {brief(error)}") from error


def found_environment() -> ClusterEnvironment | None:
    """What started this process as one of several: torchrun or Slurm, in Lightning's order; None if nothing did.

    Raises UserError for a job that does not say how many tasks it has on each node.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if slurm_tasks(os.environ) == 1:  # also a shell in an allocation of several tasks
        return None
    if (tasks := int(os.environ["SLURM_NTASKS"])) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"the Slurm job has {tasks} tasks, but not a number of tasks per node: give sbatch or srun --nodes=… "
            "--ntasks-per-node=… instead of --ntasks, one task per GPU"
        )
    return SLURMEnvironment(auto_requeue=False)  # `ipa.training.stopping` does


def environment_plugins() -> list[ClusterEnvironment]:
    """Lightning takes every process in an allocation of Slurm for one of its tasks."""
    return [LightningEnvironment()] if SLURMEnvironment.detect() and found_environment() is None else []


def check_processes(strategy: Any) -> None:
    """Raise UserError if not as many processes were started as are configured: some would wait forever."""
    environment: ClusterEnvironment = strategy.cluster_environment
    if not environment.creates_processes_externally and strategy.num_nodes > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"trainer.num_nodes={strategy.num_nodes}, but this process was started by itself and would wait for "
            "the others: start the command on every machine with srun or torchrun (docs/cluster.md)"
        )
    asked, started = strategy.num_processes * strategy.num_nodes, environment.world_size()
    if environment.creates_processes_externally and asked != started:
        starter = "Slurm" if isinstance(environment, SLURMEnvironment) else "torchrun"
        raise UserError(
            f"trainer.devices and trainer.num_nodes ask for {strategy.num_processes} × {strategy.num_nodes} processes, "
            f"but {starter} started {started}: give trainer.devices=PROCESSES_PER_NODE trainer.num_nodes=NODES, "
            f"to match {STARTED_WITH[starter]}"
        )


def join_restarted_group(timeout: timedelta, device: torch.device) -> None:
    """Create the process group after torchrun restarted the processes; Lightning then uses it as it is.

    The store of torchrun's agent still has the addresses of the previous processes, and some would wait for those
    (pytorch/pytorch issue 135712). So every restart has a prefix of its own. Nothing counts restarts of a whole node.
    """
    starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or distributed.is_initialized():
        return
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and not starts:
        log.warning("to restart after a node has died, torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    if starts:
        store, rank, world_size = next(distributed.rendezvous("env://"))
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=distributed.PrefixStore(f"start_{starts}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type != "cpu" else None,
        )


def shard(model: IPAdapterModel, mesh: DeviceMesh, base: bool = True) -> None:
    """Shard the blocks and the trained weights, which start as on the first rank, over ``mesh``.

    Without ``base`` the frozen blocks stay whole, and the trained weights are gathered once a step. Each branch is a
    unit by itself, since branches are called from within the blocks. Embeddings, the convolutions at both ends and the
    VAE, which is not called as a module, stay whole. Trained weights are sent in float32, the base in its own dtype.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": base}
    model.family.to(memory_format=torch.contiguous_format)  # the only layout of fully_shard
    for parameter in model.trainable.to(mesh.device_type).parameters():
        distributed.broadcast(parameter.detach(), 0)
    for block in [*(frozen_blocks(model) if base else ()), *trained_parts(model)]:
        fully_shard(block, **options)
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    # a common root without weights lets the blocks share streams and prefetch; they must know it before a preview calls
    # one of them by itself
    fully_shard(model, ignored_params=rest, **options)
    register_fsdp_forward_method(model, "errors")
    root: Any = fully_shard
    root.state(model)._lazy_init()


def frozen_blocks(model: IPAdapterModel) -> list[nn.Module]:
    """Inner blocks before those that contain them."""
    parts = [part for name, part in model.family.named_children() if name != "vae"] + [model.encoder]
    blocks = []
    for part in parts:
        names = {name for module in part.modules() for name in getattr(module, "_no_split_modules", None) or ()}
        names |= OPEN_CLIP_BLOCKS
        blocks += [module for module in reversed(list(part.modules())) if type(module).__name__ in names]
    return blocks


def trained_parts(model: IPAdapterModel) -> list[nn.Module]:
    """The head and every branch."""
    branches = [branch for branches in model.adapter.children() for branch in branches.children()]
    parts = [model.head, *branches]
    missed = {*model.trainable.parameters()} - {p for part in parts for p in part.parameters()}
    assert not missed, "trained weights outside of head and branches"
    return parts


def whole(tree: Any) -> Any:
    """Nested containers with every sharded tensor gathered, on the CPU; all ranks call this."""
    return apply_to_collection(tree, DTensor, lambda shared: shared.detach().full_tensor().cpu())


def like(value: Tensor, target: Tensor) -> Tensor:
    """This rank's part of ``value``, which all ranks have, sharded as ``target``; ``value`` if that is not sharded."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts, as views."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def sharded(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer, sharded as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def fit(value: Any, parameter: Tensor) -> Any:
        is_moment = isinstance(value, Tensor) and value.shape == parameter.shape  # not the step count
        return like(value, parameter) if is_moment else value

    moments = {
        number: {name: fit(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all gradients and all ranks' parts; all ranks call this."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
