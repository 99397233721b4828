"""LoRA adapters on a diffusers transformer: add, read, write, export, switch off.

The base model doubles as the reference policy by switching the adapter off, so no second copy is ever held.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from dina_rl.checkpoint import replaced_file
from dina_rl.seeding import derive_seed
from dina_rl.sums import read_sums, sha256, write_sums

LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(module: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Inject fp32 LoRA layers into every module of `module` whose name ends in one of `targets`.

    A is Gaussian (drawn from `seed`, not from the global state) and B is zero, so the model's function is unchanged.
    Only the adapter's parameters require a gradient afterwards.
    """
    module.requires_grad_(False)
    config = peft_config(rank=rank, alpha=alpha, targets=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora"))
        inject_adapter_in_model(config, module)
    for parameter in trainable(module).values():
        parameter.data = parameter.data.float()  # fp32 masters also on a half-precision base


def peft_config(*, rank: int, alpha: float, targets: Sequence[str], inference_mode: bool = False) -> LoraConfig:
    """Our adapters in peft's words."""
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # declared int, but peft only divides it by r
        init_lora_weights="gaussian",
        target_modules=list(targets),
        inference_mode=inference_mode,
    )


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name, in definition order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def lora_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A CPU copy of the adapter's weights under peft's names (no adapter name inside)."""
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(module).items()}


def load_lora_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Overwrite the adapter's weights in place.

    Raises:
        ValueError: `state` does not hold exactly the adapter's tensors.
    """
    expected = set(get_peft_model_state_dict(module))
    if set(state) != expected:
        raise ValueError(
            f"adapter does not fit: {len(expected - set(state))} tensors missing, "
            f"{len(set(state) - expected)} unknown (first: {sorted(expected ^ set(state))[:1]})"
        )
    set_peft_model_state_dict(module, state)


def export_adapter(
    save_lora_weights: Callable[..., None],
    directory: Path,
    state: dict[str, torch.Tensor],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
) -> Path:
    """Write a transformer's `lora_state` as the file that stock `load_lora_weights` reads; whole or not at all.

    Its sum is written beside it.

    The scale alpha / rank is multiplied into B, for many readers ignore the header and take it to be 1.

    Args:
        save_lora_weights: of the stock pipeline's class.

    Returns:
        The file in `directory`, which is made if need be.
    """
    folded = {name: tensor * (alpha / rank) if ".lora_B." in name else tensor for name, tensor in state.items()}
    with replaced_file(directory / LORA_FILE, lasting=True) as temporary:
        save_lora_weights(
            temporary.parent,
            transformer_lora_layers=folded,
            weight_name=temporary.name,
            transformer_lora_adapter_metadata={"r": rank, "lora_alpha": rank, "target_modules": list(targets)},
        )
    write_sums(directory, {**read_sums(directory), LORA_FILE: sha256(directory / LORA_FILE)})
    return directory / LORA_FILE


@contextmanager
def adapter_disabled(module: nn.Module) -> Iterator[None]:
    """Inside, `module` computes as if it had no adapter (the reference policy); `requires_grad` is untouched."""
    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    # Those of its layers are all that peft touches; naming every parameter takes longer than what it does.
    required = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, wanted in required:
            parameter.requires_grad_(wanted)
