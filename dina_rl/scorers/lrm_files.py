"""The released layout of an LRM: `unet/`, `text_encoder/`, for SDXL `text_encoder_2/`, and `state_dict.pt`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dina_rl.backbones.known import (
    CLIP_G_TEXT,
    CLIP_L_TEXT,
    SD15_AUTOENCODER,
    SD15_UNET,
    SDXL_AUTOENCODER,
    SDXL_UNET,
    Sizes,
)
from dina_rl.config import LRM_RELEASE
from dina_rl.fingerprint import local_directory, weight_files
from dina_rl.loading import loading
from dina_rl.reward.card import check_tensors
from dina_rl.reward.published import DAMAGED, HUB_ID
from dina_rl.scorers.clip import COUNTED
from dina_rl.scorers.lrm_model import LEFT_OUT, LRM, Head, TextModel, truncated
from dina_rl.scorers.weights import Tensors, load_saved
from dina_rl.textfiles import regular

STATE = "state_dict.pt"
SDXL_HAS = "addition_embed_type"  # in its UNet's configuration; SD1.5's is without
CONFIG, ALL = "config.json", "*"
ON_HUB = ".gitattributes"  # which every repository there has
TEXTS: Mapping[str, type[TextModel]] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartSizes:
    """Of the parts that a plan needs."""

    unet: Sizes
    vae: Sizes
    texts: tuple[Sizes, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Family:
    """One of the two released models."""

    folder: str  # of the release: Kwai-Kolors/LPO, lpo/configs/*.py, ft_model_path
    texts: tuple[str, ...]  # its text encoders
    sizes: PartSizes  # as published

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders of its weights."""
        return ("unet", *self.texts)


SD15 = Family(
    folder="lrm_sd15",
    texts=("text_encoder",),
    sizes=PartSizes(unet=SD15_UNET, vae=SD15_AUTOENCODER, texts=(CLIP_L_TEXT,)),
)
SDXL = Family(
    folder="lrm_sdxl",
    texts=("text_encoder", "text_encoder_2"),
    sizes=PartSizes(unet=SDXL_UNET, vae=SDXL_AUTOENCODER, texts=(CLIP_L_TEXT, CLIP_G_TEXT)),
)


@cache
def empty_lrm(path: str, processor: str, family: Family) -> LRM:
    """The model on the meta device, known by its hub id or read from where it is.

    Raises:
        ValueError: it is neither known nor can be read, or is another kind of model.
    """
    sizes = family.sizes if path == LRM_RELEASE else read_sizes(path, processor, family)
    texts = zip(family.texts, sizes.texts, strict=True)
    with torch.device("meta"):
        return _assembled(
            AutoencoderKL.from_config(sizes.vae),
            UNet2DConditionModel.from_config(sizes.unet),
            [TEXTS[name](CLIPTextConfig.from_dict(text)) for name, text in texts],
        )


def read_sizes(path: str, processor: str, family: Family) -> PartSizes:
    """Of its parts, from their configurations.

    Raises:
        ValueError: one cannot be read, or is another kind of model's.
    """
    place = directory_of(path, family, CONFIG)
    unet = _config(UNet2DConditionModel, place, "unet")
    _check_unet(unet, path, family)
    vae = _config(AutoencoderKL, processor, "vae")
    made, read = vae.get("latent_channels"), unet.get("in_channels")
    if made != read:
        raise ValueError(f"the VAE of {processor} has latents of {made} channels, LRM {path} reads {read}")
    return PartSizes(unet=unet, vae=vae, texts=tuple(_text_config(place, name) for name in family.texts))


def open_lrm(path: str, processor: str, family: Family) -> LRM:
    """The model with its weights, fp32.

    Raises:
        ValueError: a part cannot be read, or its tensors are not those of the model.
    """
    read_sizes(path, processor, family)
    place = directory_of(path, family, ALL)
    with loading("the model", place / "unet"):
        vae = _stock(AutoencoderKL, processor, "vae")
        unet = _open_unet(place / "unet")
        model = _assembled(vae, unet, [_stock(TEXTS[name], str(place), name) for name in family.texts])
    state = _read_state(place / STATE)
    check_tensors(state, model.head.state_dict(), place / STATE)
    model.head.load_state_dict(state)
    return model


def directory_of(path: str, family: Family, files: str) -> Path:
    """The directory of the released layout: `path`, or the model's folder in it; of a hub id what is downloaded.

    Args:
        files: of each part that are wanted of a hub id; a local directory must have all.

    Raises:
        ValueError: there is none.
    """
    root = Path(path).expanduser()
    local = root.is_dir() or not HUB_ID.fullmatch(path)
    found = _inside(root if local else _downloaded(path, family, files), family)
    for name in (*(f"{part}/{CONFIG}" for part in family.parts), STATE):
        if not (found / name).is_file():
            raise ValueError(f"LRM {path} has no {name}; give the directory of {family.folder}")
    for part in family.parts if local or files == ALL else ():
        if not weight_files(found / part, None):
            raise ValueError(f"LRM {path} has no whole set of weight files in {part}/")
    return found


def bytes_on_disk(path: str, family: Family) -> int | None:
    """Of its weights; None: a hub id, not all of which is here."""
    root = local_directory(path, ON_HUB)
    if root is None:
        return None
    parts = [weight_files(_inside(root, family) / part, None) for part in family.parts]
    return sum(file.stat().st_size for files in parts for file in files) if all(parts) else None


def _inside(root: Path, family: Family) -> Path:
    return root / family.folder if (root / family.folder).is_dir() else root


def _downloaded(path: str, family: Family, files: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    names = (STATE, *(f"{part}/{files}" for part in family.parts))
    wanted = [f"{folder}{name}" for folder in ("", f"{family.folder}/") for name in names]
    try:
        return Path(snapshot_download(path, allow_patterns=[ON_HUB, *wanted]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"LRM {path} is neither a local directory nor can be read: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _assembled(vae: AutoencoderKL, unet: UNet2DConditionModel, texts: list[TextModel]) -> LRM:
    return LRM(vae=vae, unet=truncated(unet), texts=texts, head=Head(unet, texts))


def _check_unet(unet: Sizes, path: str, family: Family) -> None:
    kind, ours = unet.get("_class_name"), family.sizes.unet
    if kind != UNet2DConditionModel.__name__ or unet.get(SDXL_HAS) != ours.get(SDXL_HAS):
        found, wanted = ("SDXL" if sizes.get(SDXL_HAS) else "SD1.5" for sizes in (unet, ours))
        raise ValueError(f"LRM {path} is a {kind} like {found}'s, not {wanted}'s")


def _config(kind: type[AutoencoderKL] | type[UNet2DConditionModel], path: str | Path, part: str) -> Sizes:
    try:
        config = kind.load_config(str(path), subfolder=part)
    except (OSError, ValueError) as error:
        raise ValueError(f"{part} of {path} cannot be read: {first_line(error)}") from error
    assert isinstance(config, dict)
    return config


def _text_config(place: Path, part: str) -> Sizes:
    try:
        return dict(CLIPTextConfig.from_pretrained(place, subfolder=part).to_dict())
    except (OSError, ValueError) as error:
        raise ValueError(f"{part} of {place} cannot be read: {first_line(error)}") from error


def _stock(kind: Any, path: str, part: str) -> Any:
    """A part by its own class, in fp32; that class leaves tensors that are missing as they are drawn."""
    try:
        model, found = kind.from_pretrained(path, subfolder=part, dtype=torch.float32, output_loading_info=True)
    except DAMAGED as error:
        raise ValueError(f"{part} of {path} cannot be read: {first_line(error)}") from error
    for what in ("missing", "unexpected"):
        names = sorted(name for name in found[f"{what}_keys"] if not name.endswith(COUNTED))
        if names:
            raise ValueError(f"{part} of {path}: {len(names)} tensors {what}: {', '.join(names[:3])}")
    return model


def _open_unet(folder: Path) -> UNet2DConditionModel:
    """The first half of it: of the rest names and shapes are looked at, no more."""
    with torch.device("meta"):
        whole = UNet2DConditionModel.from_config(_config(UNet2DConditionModel, folder.parent, "unet"))
    files = weight_files(folder, None)
    if files[0].suffix != ".safetensors":
        raise ValueError(f"{folder} has no safetensors file, which can be read in part; save its UNet again as one")
    kept: Tensors = {}
    shapes: Tensors = {}
    for name, tensor in (pair for file in files for pair in _tensors(file)):
        shapes[name] = tensor.to("meta")
        if not name.startswith(LEFT_OUT):
            kept[name] = tensor.float()
    check_tensors(shapes, whole.state_dict(), folder)
    half = truncated(whole)
    half.load_state_dict(kept, assign=True)
    return half


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of the file, on the meta device where it is not needed: it is not read then."""
    try:
        with safe_open(regular(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                left_out = name.startswith(LEFT_OUT)
                shape = opened.get_slice(name).get_shape()
                yield name, torch.empty(shape, device="meta") if left_out else opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from error


def _read_state(file: Path) -> Tensors:
    """The tensors of `state_dict.pt`, a dict of the projections' own and of a number, under flat names."""
    state = load_saved(file)
    if not isinstance(state, dict):
        raise ValueError(f"{file} is not a dict of tensors")
    try:
        return dict(pair for name, value in state.items() for pair in _flat(name, value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file} holds something else than tensors and numbers: {first_line(error)}") from error


def _flat(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, dict):
        yield from ((f"{name}.{key}", torch.as_tensor(tensor).float()) for key, tensor in value.items())
    else:
        yield name, torch.as_tensor(value).float()
