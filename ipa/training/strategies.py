"""Several processes that train one adapter: DDP, where its gradients travel, and FSDP, where the base is shared out.

Every process takes its part of a step's samples; the gradient is the mean over all of them. With DDP each holds all
weights. With FSDP (torch's ``fully_shard``) each holds a part of every block's, and a block is put together while it is
computed: the base may then be larger than a GPU, at the price of sending it around. With ZeRO-2 (Rajbhandari et al.
2020) each holds the base and a part of the adapter's gradients and moments. In all cases a checkpoint has whole
tensors, so that any number of processes goes on from it, with any strategy. (DeepSpeed's is a folder with a file for
each process, that only as many can read, and Lightning lets nobody else write there.)

python train.py trainer=fsdp        torchrun --nnodes=2 --nproc-per-node=8 … train.py trainer=ddp trainer.num_nodes=2
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ipa.errors import UserError
from ipa.model import IPAdapterModel

# previews are made and scored while other ranks wait for the first
PATIENCE_MINUTES = 60.0
# what open_clip calls its blocks; diffusers and transformers say themselves what is one, in _no_split_modules
OPEN_CLIP_BLOCKS = {"ResidualAttentionBlock", "CustomResidualAttentionBlock"}
STARTED_WITH = {"Slurm": "sbatch --ntasks-per-node=… --nodes=…", "torchrun": "--nproc-per-node=… --nnodes=…"}

log = logging.getLogger(__name__)


class AdapterDDP(DDPStrategy):
    """Lightning's DDP, blind to what is frozen: it is neither sent around at the start nor has a place in a bucket.

    Every step uses all that is trained, in the same order, so the graph is static and nothing is searched for. With
    accumulated gradients DDP is not told so: it learns a static graph from its first pass, and takes the passes whose
    gradients do not travel for a part of it.
    """

    def __init__(self, timeout_minutes: float = PATIENCE_MINUTES) -> None:
        super().__init__(
            cluster_environment=found_environment(),
            timeout=timedelta(minutes=timeout_minutes),
            find_unused_parameters=False,
            gradient_as_bucket_view=True,
        )

    def _configure_launcher(self) -> None:
        check_processes(self)
        super()._configure_launcher()

    def setup_distributed(self) -> None:
        join_restarted_group(self._get_process_group_backend(), self._timeout, self.root_device)
        super().setup_distributed()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        assert self.lightning_module is not None
        self._ddp_kwargs["static_graph"] = self.lightning_module.trainer.accumulate_grad_batches == 1
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen_names(model))
        return super()._setup_model(model)


class AdapterFSDP(ModelParallelStrategy):
    """Lightning's strategy for ``fully_shard``, which ``AdapterTraining.configure_model`` applies; see ``shard``.

    The whole world shares every block. Lightning's own checkpoints of this strategy are made of all that the module
    holds, the base among it; here they are as of every other strategy: one file with what is trained, in whole
    tensors, written by the first process.
    """

    shares_base = True

    # passes by what ModelParallelStrategy makes of them
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    load_model_state_dict = Strategy.load_model_state_dict
    load_checkpoint = Strategy.load_checkpoint
    save_checkpoint = Strategy.save_checkpoint
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer

    def __init__(self, timeout_minutes: float = PATIENCE_MINUTES) -> None:
        super().__init__(
            data_parallel_size=1,  # the world's size, once that is known
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.cluster_environment = found_environment()

    def _configure_launcher(self) -> None:
        check_processes(self)
        super()._configure_launcher()

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size
        join_restarted_group(self._get_process_group_backend(), self._timeout, self.root_device)
        super().setup_environment()

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(Strategy.optimizer_state(self, optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shared_out(state, optimizer))
            _optimizer_to_device(optimizer, self.root_device)


class AdapterZeRO2(AdapterFSDP):
    """The base is whole everywhere; what is trained is put together for a step, until its gradients are made."""

    shares_base = False


def data_parallel(accelerator: str, devices: Any, num_nodes: int, timeout_minutes: float) -> Strategy | str:
    """DDP for several processes, and for one what Lightning has for one."""
    return AdapterDDP(timeout_minutes) if are_several(accelerator, devices, num_nodes) else "auto"


def fully_sharded(accelerator: str, devices: Any, num_nodes: int, timeout_minutes: float) -> Strategy | str:
    """FSDP for several processes; one has nothing to share out."""
    return AdapterFSDP(timeout_minutes) if are_several(accelerator, devices, num_nodes) else "auto"


def zero_two(accelerator: str, devices: Any, num_nodes: int, timeout_minutes: float) -> Strategy | str:
    """ZeRO-2 for several processes; one has nothing to share out."""
    return AdapterZeRO2(timeout_minutes) if are_several(accelerator, devices, num_nodes) else "auto"


def are_several(accelerator: str, devices: Any, num_nodes: int) -> bool:
    """Whether several processes are asked for, or were started."""
    started = environment.world_size() if (environment := found_environment()) else 1
    return max(num_nodes, started) > 1 or count_devices(accelerator, devices) > 1


def count_devices(accelerator: str, devices: Any) -> int:
    """How many devices of a machine Lightning's ``devices`` means; 1 where it will say itself that there are none."""
    kind: Any = CPUAccelerator if accelerator == "cpu" or not CUDAAccelerator.is_available() else CUDAAccelerator
    if kind is CPUAccelerator and accelerator not in ("cpu", "auto"):
        return 1
    number = kind.auto_device_count() if devices == "auto" else kind.parse_devices(devices)
    return len(kind.get_parallel_devices(number))


def found_environment() -> ClusterEnvironment | None:
    """What started this process as one of several: torchrun or Slurm, in Lightning's order; None for nobody.

    Slurm's jobs are requeued by `ipa.training.stopping`, not by Lightning. Raises UserError for one that says how many
    tasks it has, but not how many on each node.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if not SLURMEnvironment.detect():
        return None
    if (tasks := int(os.environ["SLURM_NTASKS"])) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"the Slurm job has {tasks} tasks, but does not say how many on each node: give sbatch or srun --nodes=… "
            "--ntasks-per-node=… in place of --ntasks, one task for each GPU"
        )
    return SLURMEnvironment(auto_requeue=False)


def check_processes(strategy: Any) -> None:
    """Raise UserError where others were started than the configuration asks for: some would wait for ever."""
    environment: ClusterEnvironment = strategy.cluster_environment
    asked, started = strategy.num_processes * strategy.num_nodes, environment.world_size()
    if environment.creates_processes_externally and asked != started:
        starter = "Slurm" if isinstance(environment, SLURMEnvironment) else "torchrun"
        raise UserError(
            f"trainer.devices and trainer.num_nodes ask for {strategy.num_processes} × {strategy.num_nodes} processes, "
            f"but {starter} started {started}: give trainer.devices=PROCESSES_OF_A_NODE trainer.num_nodes=NODES as "
            f"{STARTED_WITH[starter]} says"
        )


def join_restarted_group(backend: str, timeout: timedelta | None, device: torch.device) -> None:
    """Make the process group where torchrun has started the processes anew; Lightning takes it as it is then.

    They meet in the store of torchrun's agent, where the addresses of the processes before them still stand; some would
    wait for those (pytorch/pytorch issue 135712). So each start has a prefix of its own. When a node comes anew nobody
    counts a start, which only a store for each group helps against.
    """
    starts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or distributed.is_initialized():
        return
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) and not starts:
        log.warning("to come again after a node has died, torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    if starts:
        store, rank, world_size = next(distributed.rendezvous("env://"))
        distributed.init_process_group(
            backend,
            store=distributed.PrefixStore(f"start_{starts}", store),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if device.type != "cpu" else None,
        )


def frozen_names(module: nn.Module) -> list[str]:
    """Parameters that are not trained, and all buffers: the trainable set has none that training changes."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return frozen + [name for name, _ in module.named_buffers()]


def shard(model: IPAdapterModel, mesh: DeviceMesh, base: bool = True) -> None:
    """Give every rank of ``mesh`` its part of the blocks, and of what is trained, which begins as on the first rank.

    Without ``base`` the frozen blocks stay whole, and what is trained is put together once a step.

    Units are the blocks of denoiser, text and image encoders, the head, and every branch by itself, since those are
    called from within the blocks. What is left, embeddings, the convolutions at both ends and the VAE, which is not
    called as a module and small, stays whole. Precision is autocast's business, as without shards: what is trained
    travels in float32, the base in its own type.
    """
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": base}
    model.family.to(memory_format=torch.contiguous_format)  # fully_shard takes no other layout
    for parameter in model.trainable.to(mesh.device_type).parameters():
        distributed.broadcast(parameter.detach(), 0)
    for block in [*(frozen_blocks(model) if base else ()), *trained_parts(model)]:
        fully_shard(block, **options)
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    # a common root without weights of its own, so that the blocks share streams and are fetched ahead; it has to know
    # of it before a preview calls one of them by itself
    fully_shard(model, ignored_params=rest, **options)
    register_fsdp_forward_method(model, "errors")
    root: Any = fully_shard
    root.state(model)._lazy_init()


def frozen_blocks(model: IPAdapterModel) -> list[nn.Module]:
    """Inner ones before those that they stand in."""
    parts = [part for name, part in model.family.named_children() if name != "vae"] + [model.encoder]
    blocks = []
    for part in parts:
        names = {name for module in part.modules() for name in getattr(module, "_no_split_modules", None) or ()}
        names |= OPEN_CLIP_BLOCKS
        blocks += [module for module in reversed(list(part.modules())) if type(module).__name__ in names]
    return blocks


def trained_parts(model: IPAdapterModel) -> list[nn.Module]:
    parts = [model.head, *getattr(model.adapter, "branches", ())]
    missed = {*model.trainable.parameters()} - {p for part in parts for p in part.parameters()}
    assert not missed, "something is trained outside of head and branches"
    return parts


def whole(tree: Any) -> Any:
    """A tree of plain containers with every shared tensor put together, on the CPU: to be called by all ranks."""
    return apply_to_collection(tree, DTensor, lambda shared: shared.detach().full_tensor().cpu())


def like(value: Tensor, target: Tensor) -> Tensor:
    """This rank's part of ``value``, which all ranks have, as ``target`` is shared out; the value if that is not."""
    if not isinstance(target, DTensor):
        return value
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts; what is done to them is done to the tensors."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def shared_out(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's whole state as its parameters are shared out."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def fit(value: Any, parameter: Tensor) -> Any:
        moment = isinstance(value, Tensor) and value.shape == parameter.shape  # and not the count of steps
        return like(value, parameter) if moment else value

    moments = {
        number: {name: fit(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all of them, over all parts: to be called by all ranks."""
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
