"""DeepSpeed behind the library's `Engine` Protocol: the one module that imports deepspeed.

Checkpoints leave here as whole plain tensors under parameter names, each from one rank, never as DeepSpeed's pickled
shards, so a run resumes on any number of ranks and ZeRO stage.
"""

import warnings
from collections.abc import Container, Sequence

import deepspeed
import torch
import torch.distributed
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import nn

from dina_rl.adamw import MOMENTS
from dina_rl.alignment.engine import build_optimizer, set_rate, share
from dina_rl.backbones.lora import trainable
from dina_rl.backbones.trained import check_names, copy_in, copy_out, trained_parameters
from dina_rl.config import LearnerConfig


class DeepSpeedEngine:
    """`dina_rl.alignment.engine.Engine` on one rank of torch's default process group, at any ZeRO stage.

    Stage 3 replaces `torch.nn.functional.linear` in its process by matmul and addition, which spares it the gathered
    weights that autograd would keep. In fp32 the numbers stay the same; over a bfloat16 base each bias is rounded once
    more, so that a forward is no longer bit for bit the rollout's.

    Args:
        policy: transformer with its adapter, or all of it trainable; the same on every rank.
        config: of the learner; `zero_stage`, learning rate, decay and clipping are used.
        persistence_threshold: at stage 3, parameters up to this many numbers are kept whole on every rank.
    """

    def __init__(self, policy: nn.Module, config: LearnerConfig, *, persistence_threshold: int = 100_000) -> None:
        _adopt_process_group()
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.mine = share(trained_parameters(policy), self.rank, self.world_size)  # stage 3 leaves them no sizes
        self._policy = policy
        self._stage = config.zero_stage
        self._max_grad_norm = config.max_grad_norm
        self._norm = torch.tensor(0.0)
        self._parameters = trainable(policy)
        optimizer = build_optimizer(list(self._parameters.values()), config)
        if self._stage == 0:
            # DeepSpeed averages gradients inside its step and at stage 0 keeps their norm to itself.
            optimizer.register_step_pre_hook(lambda *_: self._clip())
        self.module, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=list(self._parameters.values()),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # only its counters use it
                "managed_gradient_accumulation": False,  # any number of backward calls, then one step
                "gradient_clipping": 0.0 if self._stage == 0 else config.max_grad_norm,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {
                    "stage": self._stage,
                    "overlap_comm": False,
                    "stage3_param_persistence_threshold": persistence_threshold,
                },
                "steps_per_print": None,
            },
        )
        self._create_moments()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.module.backward(loss)

    def step(self, learning_rate: float) -> float:
        set_rate(self._optimizer, learning_rate)
        self.module.step()
        return float(self._norm if self._stage == 0 else self.module.get_global_grad_norm())

    def weights(self, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
        state = {}
        for name, parameter in trained_parameters(self._policy).items():  # one by one: whole, they may not fit a GPU
            with deepspeed.zero.GatheredParameters([parameter]):
                if names is None or name in names:
                    state[name] = copy_out(parameter)
        return state

    def load_weights(self, state: dict[str, torch.Tensor]) -> None:
        parameters = trained_parameters(self._policy)
        check_names(set(state), set(parameters))
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                copy_in(parameter, state[name])
        if self._stage > 0:
            self.module.optimizer.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        tensors = {"step": self._shards()[0]["step"].cpu().clone()}
        mine = {id(parameter) for name, parameter in trained_parameters(self._policy).items() if name in self.mine}
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                whole = (
                    self._optimizer.state[parameter][moment]
                    if self._stage == 0
                    else safe_get_full_optimizer_state(parameter, moment)
                )
                if id(parameter) in mine:
                    tensors[f"{name}.{moment}"] = whole.cpu().clone()
        return tensors

    def load_optimizer_state(self, state: dict[str, torch.Tensor]) -> None:
        if not state:
            return
        for shard in self._shards():
            shard["step"].copy_(state["step"])
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                self._load_moment(parameter, state[f"{name}.{moment}"], moment)

    def reduce(self, values: Sequence[float], operation: str) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64, device=self.module.device)
        operations = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
        torch.distributed.all_reduce(reduced, op=operations[operation])
        return reduced.tolist()

    @property
    def _optimizer(self) -> torch.optim.AdamW:
        """The AdamW that steps, on whole parameters at stage 0 and on this rank's flat shards above it."""
        optimizer: torch.optim.AdamW = self.module.optimizer if self._stage == 0 else self.module.optimizer.optimizer
        return optimizer

    def _flat_shards(self) -> list[torch.Tensor]:
        """This rank's fp32 share of the parameters, as DeepSpeed hands it to AdamW."""
        optimizer = self.module.optimizer
        if self._stage == 0:
            return list(self._parameters.values())
        shards: list[torch.Tensor] = (
            optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        )
        return shards

    def _shards(self) -> list[dict[str, torch.Tensor]]:
        return [self._optimizer.state[shard] for shard in self._flat_shards()]

    def _create_moments(self) -> None:
        """Zero moments from the start (AdamW would make them in its first step), for a checkpoint to be read into."""
        for shard in self._flat_shards():
            zeros = {moment: torch.zeros_like(shard, requires_grad=False) for moment in MOMENTS}
            self._optimizer.state[shard] = {"step": torch.tensor(0.0), **zeros}
        if self._stage in (1, 2):
            zero = self.module.optimizer
            for group, shard in zip(zero.bit16_groups, self._flat_shards(), strict=True):
                lazy_init_hp_params_optimizer_state(group, shard, zero.optimizer.state)

    def _load_moment(self, parameter: nn.Parameter, whole: torch.Tensor, moment: str) -> None:
        if self._stage == 0:
            self._optimizer.state[parameter][moment].copy_(whole)
        elif self._stage == 3:
            # DeepSpeed's own setter cuts past the end of a parameter that the ranks do not divide evenly.
            share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed sets it on parameters
            padded = nn.functional.pad(whole.flatten(), (0, share * self.world_size - whole.numel()))
            mine = padded[self.rank * share : (self.rank + 1) * share]
            safe_set_local_optimizer_state(parameter, mine, moment)
        else:
            safe_set_full_optimizer_state(parameter, whole, moment)

    def _clip(self) -> None:
        self._norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)


def _adopt_process_group() -> None:
    """Let DeepSpeed use the process group that torch already has (`actors/gang.py` made it)."""
    # The CPU accelerator would compile an inference-only shared-memory op here: half a minute, a C++ compiler, and a
    # lock file that hangs the next start if this one is killed.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    # torch deprecates two collectives that DeepSpeed 0.19 calls in every micro-batch.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
