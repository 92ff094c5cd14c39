"""All uses of DeepSpeed's internals: things that distrec needs and for which DeepSpeed has no public interface.

`tests/training/test_deepspeed_internals.py` fails if a new version of DeepSpeed changes what this module relies on.
"""

from __future__ import annotations

from typing import Any

import torch


def disable_shm_comm() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives; call it before `deepspeed.init_distributed`.

    They are faster collectives between CPU processes on one host, compiled with g++ at the first start. If the process
    is killed during compilation, as Ray may do, a lock file remains, and every later start waits for it forever.

    Relies on the dictionary `deepspeed.ops.__compatible_ops__`, which `init_distributed` reads. No setting of DeepSpeed
    turns these collectives off.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def pytorch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The PyTorch optimizer that updates the weights, under any ZeRO stage.

    Relies on the engine's attribute `basic_optimizer`. The public `engine.optimizer` is ZeRO's wrapper around it, and
    DeepSpeed's getters of optimizer state do not return the number of steps.
    """
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def master_weights(engine: Any) -> list[torch.Tensor]:
    """The float32 tensors that `pytorch_optimizer` updates; its state is keyed by them.

    Under ZeRO 0 they are the parameters. Under ZeRO 1 to 3 they are my flat partitions of all parameters, padded with
    zeros. Relies on the attributes in which DeepSpeed's optimizers keep their partitions. The optimizer's own parameter
    groups cannot be used instead: ZeRO 3 fills them only during a step.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(engine.module.parameters())
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if _is_bf16_optimizer(engine):
        return list(engine.optimizer.fp32_groups_flat_partition)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def partitioned_gradients(engine: Any) -> list[torch.Tensor]:
    """My partitions of the averaged gradients under ZeRO 1 to 3: the tensors that the next step uses, not copies.

    They may end in padding, which is zero. Relies on the attributes in which DeepSpeed's optimizers keep gradients
    between `backward` and `step`. The public getters either gather a whole gradient or exist only for ZeRO 3.
    """
    if _is_bf16_optimizer(engine):
        return list(engine.optimizer.fp32_groups_gradient_flat_partition)
    return [grad for group in engine.optimizer.averaged_gradients.values() for grad in group]


def link_moments(engine: Any) -> None:
    """Let DeepSpeed's getters and setters of optimizer state find the moments before the first step.

    Relies on a private method of the optimizers for ZeRO 1 and 2. They call it themselves at the end of their first
    step; before that, the public getters find no moments. ZeRO 0 and 3 do not need it.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _is_bf16_optimizer(engine: Any) -> bool:
    """Whether the optimizer is BF16_Optimizer, which DeepSpeed uses for ZeRO 1 in bfloat16 with float32 gradients."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return isinstance(engine.optimizer, BF16_Optimizer)
