"""The trained part of a transformer: its LoRA adapter where it has one, else all of its parameters.

Both kinds travel, average and resume alike: as tensors by name, fp32, on the CPU.
"""

from collections.abc import Container, Sequence
from pathlib import Path

import torch
from diffusers.models import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dina_rl.backbones.lora import add_lora
from dina_rl.checkpoint import replaced_directory
from dina_rl.config import PolicyLoRAConfig
from dina_rl.sums import sum_files

ADAPTER = "default"  # peft's name of the only adapter, left out of saved names


def make_trainable(module: nn.Module, lora: PolicyLoRAConfig | None, *, targets: Sequence[str], seed: int) -> None:
    """Add an adapter to a frozen `module`, or set all of its parameters free.

    Args:
        lora: None for full fine-tuning.
        targets: modules to adapt where `lora` names none.

    Raises:
        ValueError: a target that no module of the transformer has.
    """
    if lora is None:
        module.requires_grad_(True)
        return
    check_targets(module, lora)
    add_lora(module, rank=lora.rank, alpha=lora.alpha, targets=lora.targets or targets, seed=seed)


def check_targets(module: nn.Module, lora: PolicyLoRAConfig | None) -> None:
    """Raises ValueError where `lora` names a target that is no linear layer of `module`."""
    linear = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
    for target in (lora and lora.targets) or ():
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ValueError(
                f"learner.lora.targets: no linear layer of the transformer is called {target} (some are: "
                f"{', '.join(sorted({'.'.join(name.split('.')[2:]) for name in linear if name.count('.') > 2})[:6])})"
            )


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained part by the names under which it is saved: an adapter's are peft's own."""
    named = dict(module.named_parameters())
    if not any(isinstance(layer, BaseTunerLayer) for layer in module.modules()):
        return named
    return {name.replace(f".{ADAPTER}.", "."): value for name, value in named.items() if ".lora_" in name}


def trained_state(module: nn.Module, names: Container[str] | None = None) -> dict[str, torch.Tensor]:
    """A CPU fp32 copy of the trained part, or of what `names` holds of it."""
    parameters = trained_parameters(module)
    return {name: copy_out(parameter) for name, parameter in parameters.items() if names is None or name in names}


def load_trained_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Overwrite the trained part in place, rounding to the parameters' own dtype.

    Raises:
        ValueError: `state` does not hold exactly its tensors.
    """
    parameters = trained_parameters(module)
    check_names(set(state), set(parameters))
    for name, parameter in parameters.items():
        copy_in(parameter, state[name])


def check_names(given: set[str], expected: set[str]) -> None:
    """Raises ValueError where the tensors given are not those that are trained."""
    if given != expected:
        raise ValueError(
            f"weights do not fit: {len(expected - given)} tensors missing, {len(given - expected)} unknown "
            f"(first: {sorted(expected ^ given)[:1]})"
        )


def copy_out(parameter: nn.Parameter) -> torch.Tensor:
    """A CPU fp32 copy of a parameter."""
    return parameter.detach().to("cpu", torch.float32, copy=True)


@torch.no_grad()
def copy_in(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite a parameter in place."""
    parameter.copy_(value)


def save_transformer(transformer: ModelMixin, directory: Path, state: dict[str, torch.Tensor]) -> Path:
    """Write `transformer` with the weights `state`, in its own dtype, as stock `from_pretrained` reads it.

    The directory appears whole or not at all.
    """
    load_trained_state(transformer, state)
    with replaced_directory(directory, lasting=True) as fresh:
        transformer.save_pretrained(fresh)
        sum_files(fresh)
    return directory
