"""LAION's aesthetic predictor (v2): a linear stack on CLIP ViT-L/14's image embedding. It reads no prompt."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPModel

from dina_rl.config import ImageScorerConfig
from dina_rl.reward.card import check_tensors
from dina_rl.scorers.base import Conditions, ImageKind, Space
from dina_rl.scorers.clip import check_clip, clip_config, empty_clip, load_clip
from dina_rl.scorers.clip_input import CLIPInput
from dina_rl.scorers.weights import file_if_here, load_tensors, released_file

FILE = "sac+logos+ava1-l14-linearMSE.pth"  # christophschuhmann/improved-aesthetic-predictor, simple_inference.py
WIDTHS = (1024, 128, 64, 16, 1)  # yifan123/flow_grpo, flow_grpo/aesthetic_scorer.py; nothing is between the layers
PLACES = (0, 2, 4, 6, 7)  # the same; dropout is at 1, 3 and 5


class AestheticScorer:
    """`Scorer` in image space: about 1 to 10, whatever the prompt.

    Args:
        clip: frozen, on the device of `given` and `head`.
    """

    space: Space = "images"

    def __init__(self, clip: CLIPModel, head: nn.Module, given: CLIPInput) -> None:
        self._clip = clip
        self._head = head
        self._given = given
        self.reduce = given.reduce

    def __call__(self, samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        seen = self._clip.get_image_features(pixel_values=self._given.pixels(samples)).pooler_output
        scores: torch.Tensor = self._head(functional.normalize(seen, dim=-1)).squeeze(1)
        return scores


def check_aesthetic(config: ImageScorerConfig) -> None:
    """Raises ValueError where the released file or its CLIP model is not there, or they do not fit together."""
    check_clip(config.processor, config.processor)
    file = file_if_here(config.path, FILE)
    if file is not None:
        check_tensors(load_tensors(file), _head(config).state_dict(), file)


def open_aesthetic(config: ImageScorerConfig, device: str) -> AestheticScorer:
    """Raises ValueError as `check_aesthetic`."""
    check_clip(config.processor, config.processor)
    file = released_file(config.path, FILE)
    state, head = load_tensors(file), _head(config)
    check_tensors(state, head.state_dict(), file)
    head.load_state_dict(state)
    clip, given = load_clip(config.processor, device), CLIPInput(config.processor, device=device)
    return AestheticScorer(clip, head.to(device).requires_grad_(False).eval(), given)


def _head(config: ImageScorerConfig) -> nn.Module:
    """By the released names: `layers.0.weight` and so on."""
    width = clip_config(config.processor).projection_dim
    assert width is not None
    sizes = zip(PLACES, (width, *WIDTHS), WIDTHS, strict=False)
    linear = {place: nn.Linear(inputs, outputs) for place, inputs, outputs in sizes}
    stack = nn.Sequential(*(linear.get(place, nn.Identity()) for place in range(PLACES[-1] + 1)))
    return nn.Sequential(OrderedDict(layers=stack))


AESTHETIC = ImageKind(
    open=open_aesthetic,
    check=check_aesthetic,
    empty=lambda config: empty_clip(config.processor),  # its own layers are a part in five hundred of it
    files=(FILE, "config.json"),
)
