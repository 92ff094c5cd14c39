"""Everything that distrec takes from inside DeepSpeed, because it has no public way to do it.

`tests/training/test_deepspeed_internals.py` fails when another version of DeepSpeed changes what is relied on here.
"""

from __future__ import annotations

from typing import Any

import torch


def disable_shm_comm() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives; call it before `deepspeed.init_distributed`.

    They are a shortcut between CPU processes of one host, compiled with g++ at the first start. A process killed
    meanwhile, as Ray kills workers, leaves a lock file behind for which every later start waits without end.

    Relies on the dictionary `deepspeed.ops.__compatible_ops__`, which `init_distributed` consults. No setting of
    DeepSpeed leaves them out.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def pytorch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The PyTorch optimizer that updates the weights, under any ZeRO stage.

    Relies on the engine's attribute `basic_optimizer`. The public `engine.optimizer` is ZeRO's wrapper around it, and
    DeepSpeed's getters of optimizer state leave out the number of steps.
    """
    optimizer: torch.optim.Optimizer = engine.basic_optimizer
    return optimizer


def master_weights(engine: Any) -> list[torch.Tensor]:
    """The float32 tensors that `pytorch_optimizer` updates, and under which it keeps its state.

    Under ZeRO 0 they are the parameters. Under ZeRO 1 to 3 they are my flat partitions of all parameters, padded with
    zeros. Relies on the attribute that each of DeepSpeed's optimizers gives its partitions. The optimizer's own
    parameter groups are no substitute: ZeRO 3 fills them during a step only.
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
    """The averaged gradients that the next step will use, under ZeRO 1 to 3: my partitions, over live storage.

    They may end in padding, which is zero. Relies on the attributes where DeepSpeed's optimizers keep them between
    `backward` and `step`. The public getters either gather a whole gradient or exist for ZeRO 3 only.
    """
    if _is_bf16_optimizer(engine):
        return list(engine.optimizer.fp32_groups_gradient_flat_partition)
    return [grad for group in engine.optimizer.averaged_gradients.values() for grad in group]


def link_moments(engine: Any) -> None:
    """Let DeepSpeed's getters and setters of optimizer state find the moments before the first step.

    Relies on a method of the optimizers of ZeRO 1 and 2, which they call themselves at the end of their first step;
    ZeRO 0 and 3 need no such link. Until then the public getters know no moment of any parameter.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _is_bf16_optimizer(engine: Any) -> bool:
    """Whether ZeRO 1 runs as DeepSpeed's BF16_Optimizer, which it does in bfloat16 with float32 gradients."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return isinstance(engine.optimizer, BF16_Optimizer)
