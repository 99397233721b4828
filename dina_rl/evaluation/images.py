"""Images of a preference set as scorers take them."""

import torch

from dina_rl.data.buckets import Size
from dina_rl.data.images import image_size, load_image
from dina_rl.data.records import PreferenceSet


def read_image(source: PreferenceSet, key: str, *, size: Size | None) -> torch.Tensor:
    """RGB [3, H, W] in [0, 1] of the image behind a record's key, stretched to `size` or as large as it is.

    Raises:
        ValueError: it is missing or broken.
    """
    content = source.image(key)
    height, width = image_size(content) if size is None else size
    return torch.tensor(load_image(content, height=height, width=width)).permute(2, 0, 1).float() / 255
