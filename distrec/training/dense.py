"""The dense module under DeepSpeed, ZeRO 0 to 3, on the existing process group.

DeepSpeed averages gradients over ranks, but here a rank's loss is its share of a sum, so `backward` multiplies by the
world size. Weights and moments are read and written by parameter name, as full tensors in float32, because DeepSpeed's
own ZeRO checkpoints cannot be loaded at another world size.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from distrec.config.run import DenseSection, OptimizerSection
from distrec.errors import NonFiniteLoss
from distrec.parallel.world import World
from distrec.training.deepspeed_internals import (
    disable_shm_comm,
    link_moments,
    master_weights,
    partitioned_gradients,
    pytorch_optimizer,
)

_TYPES = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}


class DenseEngine:
    """A method's dense module. Without one (`module=None`) there is a plain backward pass and no state. Collective.

    Args:
        module: the module, with the same initial weights on every rank.
        optimizer: the same rule as for the tables.
        settings: ZeRO stage, precision and activation checkpointing.
    """

    def __init__(
        self, world: World, module: torch.nn.Module | None, optimizer: OptimizerSection, settings: DenseSection
    ):
        self._world, self._stage = world, settings.zero_stage
        self._precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.precision]
        self._moment_names = [] if optimizer.name == "sgd" else ["exp_avg", "exp_avg_sq"]
        self._engine: Any = None
        if module is not None:
            self._names = [name for name, _ in module.named_parameters()]
            self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
            if settings.activation_checkpointing:
                _recompute(module)
            initial = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
            self._engine = _initialize(module, optimizer, settings)
            if self._precision is not torch.float32:  # DeepSpeed rounded the master weights
                for name, value in initial.items():
                    self.set_weight(name, value)

    @property
    def module(self) -> torch.nn.Module:
        """The module itself; under ZeRO 3 it holds a part of the weights."""
        found: torch.nn.Module = self._engine.module
        return found

    def train(self, mode: bool) -> None:
        """Switch to training mode (dropout is on) or to evaluation mode."""
        if self._engine is not None:
            self._engine.train(mode)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the module. Its floating-point inputs are cast to its precision, and its outputs to float32.

        This includes tensors inside lists and mappings.
        """
        if self._precision is torch.float32:
            return self._engine(*inputs, **named)
        inputs, named = _cast((inputs, named), self._precision)
        return _cast(self._engine(*inputs, **named), torch.float32)

    def backward(self, share: torch.Tensor, last: bool = True) -> None:
        """Run the backward pass of my share of the loss, times the world size. Collective.

        Table gradients keep that factor; `ShardedTables.average_gradients` removes it. Gradients of several passes add
        up until `step`; those of dense weights are complete after the pass with `last`.
        """
        scaled = share * self._world.size
        if self._engine is None:
            scaled.backward()
        else:
            # Set here, so that DeepSpeed neither counts passes nor divides by their number: the passes form one sum.
            self._engine.set_gradient_accumulation_boundary(last)
            self._engine.backward(scaled)

    def step(self, lr: float) -> None:
        """Update the dense weights and clear their gradients. Collective.

        Raises:
            NonFiniteLoss: DeepSpeed skipped the step, as it does under ZeRO 1 to 3 if a gradient is not finite.
        """
        if self._engine is None:
            return
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        gradients = self.local_gradients() if self._stage == 3 else []
        self._engine.step()
        if not self._engine.was_step_applied():
            raise NonFiniteLoss(
                "the gradient of the dense module is NaN or infinite though the loss is finite, and the step was "
                "skipped. Lower 'optimizer.lr' or check the features."
            )
        for grad in gradients:
            # ZeRO 3 never clears these buffers. A parameter that the next step does not use would be updated by its
            # previous gradient again.
            grad.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name, as full float32 tensors on every rank. Collective."""
        out: dict[str, torch.Tensor] = {}
        for name, parameter in self._parameters():
            out[f"{name}.weight"] = self._get(parameter, None, name)
            for moment in self._moment_names:
                out[f"{name}.{moment}"] = self._get(parameter, moment, name)
        return out

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Set weights and moments from `state`, which has the form that `state()` returns. Collective."""
        for name, parameter in self._parameters():
            self.set_weight(name, state[f"{name}.weight"])
            for moment in self._moment_names:
                self._set(parameter, moment, state[f"{name}.{moment}"])

    def set_weight(self, name: str, value: torch.Tensor) -> None:
        """Set one parameter by name. Collective."""
        from deepspeed import zero
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        parameter = dict(self._parameters())[name]
        if self._stage == 3:
            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
            safe_set_local_fp32_param(parameter, self._partition(value))
            return
        parameter.data.copy_(value)
        if self._stage > 0:  # the partitioned master weights, which the optimizer updates
            safe_set_full_fp32_param(parameter, value)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of the whole loss by name, as full tensors; between `backward` and `step`. Collective."""
        from deepspeed.utils import safe_get_full_grad

        grads = {name: safe_get_full_grad(parameter) for name, parameter in self._parameters()}
        return {name: grad.view(self._shapes[name]).clone() for name, grad in grads.items() if grad is not None}

    @property
    def replicated(self) -> bool:
        """Whether every rank holds all gradients and updates every weight (ZeRO 0), instead of its partition."""
        return self._stage == 0

    def local_gradients(self) -> list[torch.Tensor]:
        """The gradients that `step` will use: the tensors themselves, not copies.

        These are all gradients under ZeRO 0, and otherwise my partition of them, padded with zeros.
        """
        if self._engine is None:
            return []
        if self.replicated:
            return [parameter.grad for _, parameter in self._parameters() if parameter.grad is not None]
        return partitioned_gradients(self._engine)

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far (Adam's bias correction depends on it)."""
        return next((int(state["step"]) for state in self._rule_states()), 0)

    @steps.setter
    def steps(self, count: int) -> None:
        for state in self._rule_states():
            state["step"] = torch.tensor(float(count)) if torch.is_tensor(state["step"]) else count

    def _rule_states(self) -> list[dict[str, Any]]:
        if self._engine is None:
            return []
        return [state for state in pytorch_optimizer(self._engine).state.values() if "step" in state]

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(()) if self._engine is None else self._engine.module.named_parameters()

    def _partition(self, value: torch.Tensor) -> torch.Tensor:
        """My part of a full value under ZeRO 3, whose parts have equal sizes and are padded with zeros.

        DeepSpeed's setters for full values accept only sizes that the number of ranks divides.
        """
        flat = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % self._world.size))
        return flat.chunk(self._world.size)[self._world.rank]

    def _get(self, parameter: torch.nn.Parameter, moment: str | None, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            full = parameter.data if moment is None else pytorch_optimizer(self._engine).state[parameter][moment]
        else:
            full = (
                safe_get_full_fp32_param(parameter)
                if moment is None
                else safe_get_full_optimizer_state(parameter, moment)
            )
        return full.detach().to(torch.float32).reshape(self._shapes[name]).clone()

    def _set(self, parameter: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 0:
            pytorch_optimizer(self._engine).state[parameter][moment].copy_(value)
        elif self._stage == 3:
            safe_set_local_optimizer_state(parameter, self._partition(value), moment)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)


def leave_group() -> None:
    """Destroy the default process group, in DeepSpeed too: otherwise this process's next run would use the old one.

    Work that has left the group already is no error.
    """
    if not dist.is_initialized():
        return
    if "deepspeed" in sys.modules:
        import deepspeed.comm

        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
            return
    dist.destroy_process_group()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors cast to `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(entry, dtype) for entry in value)
    return value


def _recompute(module: torch.nn.Module) -> None:
    """Make every submodule whose class has `recompute = True` keep only its inputs and run again in its backward pass.

    Random draws are repeated. ZeRO 3 gathers weights in hooks. The hooks of the submodule itself are not run again, but
    those of its own submodules are.
    """
    for part in module.modules():
        if getattr(type(part), "recompute", False):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def _initialize(module: torch.nn.Module, optimizer: OptimizerSection, dense: DenseSection) -> Any:
    disable_shm_comm()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it; Ray sets it, but a run without workers does not
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    settings: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    if optimizer.name != "sgd":
        settings |= {"betas": optimizer.betas, "eps": optimizer.eps, "torch_adam": True}
        settings["adam_w_mode"] = optimizer.name == "adamw"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default clips to a norm of 1
        "zero_optimization": {"stage": dense.zero_stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": _TYPES[optimizer.name], "params": settings},
        "steps_per_print": 10**9,
    }
    if dense.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16"}
        config["communication_data_type"] = "fp32"
    parameters = list(module.parameters())
    with redirect_stdout(io.StringIO()):  # its BF16_Optimizer prints the memory in use at each stage
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, config=config, dist_init_required=False
        )
    if optimizer.name != "sgd":
        _allocate_moments(engine)
    return engine


def _allocate_moments(engine: Any) -> None:
    """Allocate the moments of every master weight now, so that a checkpoint can be loaded before the first step."""
    rule = pytorch_optimizer(engine)
    for master in master_weights(engine):
        rule.state[master] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(master, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
        }
    link_moments(engine)
