"""What a request holds and what answers it: safetensors in, JSON out.

A request is a safetensors file of one tensor: `latents` [B, C, h, w] for a DiNa-LRM, normalised as its backbone takes
them, in fp32, fp16 or bf16; `images` [B, 3, H, W] uint8 for a scorer of images. Its metadata has JSON texts: `prompts`,
B of them or one for all, and for a DiNa-LRM `levels`, `draws` and `seed`.

A sample's noise is drawn by seed and prompt alone, as `jobs.score` draws it: samples of one prompt share it, in
whatever requests they come.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from math import isfinite
from typing import Annotated

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, deserialize

from dina_rl.config import ServeRun
from dina_rl.config.base import NoiseLevels, Positive, Section, Texts
from dina_rl.config.keys import explain
from dina_rl.errors import shown
from dina_rl.scoring import PictureScorer
from dina_rl.textfiles import parse_json

LONGEST_PROMPT = 10_000
"""Characters of a prompt; text encoders read some hundred tokens."""
LATENT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LENGTH_BYTES = 8  # of the header's length, with which a safetensors file begins

Values = Mapping[str, object]


class Refused(Exception):
    """A request that is not answered by scores: an HTTP status, and one line for who asked."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(" ".join(reason.split()))
        self.status = status


class Parameters(Section):
    """The metadata of a request."""

    prompts: Annotated[Texts, Field(min_length=1)]
    levels: NoiseLevels | None = None
    draws: Positive | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one request asks, checked. M of its B samples can be scored.

    Attributes:
        samples: [M, ...] as they came: fp32, fp16 or bf16 latents, uint8 pictures.
        rows: the place of each among the B.
        failed: reason by place, of the others.
        levels: noise levels; none for a scorer of images.
        draws: noise draws.
    """

    samples: torch.Tensor
    prompts: tuple[str, ...]
    rows: tuple[int, ...]
    failed: Mapping[int, str]
    levels: tuple[float, ...]
    draws: int
    seed: int


def read_question(body: bytes, scorer: PictureScorer, run: ServeRun) -> Question:
    """The question in a request's body.

    Raises:
        Refused: it is no safetensors file, not of the tensor and metadata above, or beyond the limits of `run`.
    """
    tensors, metadata = _unpacked(body)
    name = scorer.space
    if list(tensors) != [name]:
        raise _bad(f"a {scorer.config.kind} scorer takes one tensor `{name}`, this has {shown(sorted(tensors))}")
    parameters = _parameters(metadata)
    levels, draws = _noise(parameters, scorer, run)
    samples = _latents(tensors[name], scorer) if name == "latents" else _pictures(tensors[name])
    count = len(samples)
    if count > run.max_samples:
        raise _bad(f"{count} samples, more than {run.max_samples}; ask in several requests")
    prompts = _prompts(parameters.prompts, count)
    rows = [row for row, sample in enumerate(samples) if bool(sample.isfinite().all())]
    return Question(
        samples=samples if len(rows) == count else samples[rows],
        prompts=tuple(prompts[row] for row in rows),
        rows=tuple(rows),
        failed={row: "the latent is not finite" for row in sorted(set(range(count)) - set(rows))},
        levels=levels,
        draws=draws,
        seed=run.seed if parameters.seed is None else parameters.seed,
    )


def answer(question: Question, scores: torch.Tensor, deviations: torch.Tensor) -> Values:
    """The body that answers, of scores [M] and their deviations [M].

    A score that is not finite, or that there is not, is null and has a reason in `failed`, by its place.
    """
    failed, kept = dict(question.failed), [None] * (len(question.rows) + len(question.failed))
    columns: dict[str, list[float | None]] = {"scores": list(kept), "deviations": list(kept)}
    for row, score, deviation in zip(question.rows, scores.tolist(), deviations.tolist(), strict=True):
        if isfinite(score) and isfinite(deviation):
            columns["scores"][row], columns["deviations"][row] = score, deviation
        else:
            failed[row] = f"its score is {score}"
    if question.draws < 2:
        del columns["deviations"]
    return {**columns, "failed": {str(row): failed[row] for row in sorted(failed)}}


def description(scorer: PictureScorer, run: ServeRun) -> dict[str, object]:
    """What who asks needs to know of the scorer."""
    config, latents = scorer.config, scorer.space == "latents"
    noise = {"levels": config.levels, "draws": config.draws, "seed": run.seed, "max_levels": run.max_levels}
    return {
        "scorer": config.kind,
        "path": config.path,
        "normalisation": config.normalisation,
        "tensor": scorer.space,
        "dtypes": list(LATENT_TYPES) if latents else ["U8"],
        "shapes": scorer.latent_shapes if latents else [[3, None, None]],
        **({**noise, "max_draws": run.max_draws} if latents else {}),
        "max_batch": run.max_batch,
        "max_samples": run.max_samples,
        "max_body_mib": run.max_body_mib,
        "timeout_s": run.timeout_s,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """A tensor as it lies in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytearray


def _unpacked(body: bytes) -> tuple[dict[str, _Packed], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        found = deserialize(body)  # checks the header, the metadata's types and every length
    except SafetensorError as error:
        raise _bad(f"no safetensors file: {error}") from error
    size = int.from_bytes(body[:LENGTH_BYTES], "little")
    header = parse_json(body[LENGTH_BYTES : LENGTH_BYTES + size])
    tensors = {
        name: _Packed(dtype=each["dtype"], shape=tuple(each["shape"]), data=each["data"]) for name, each in found
    }
    return tensors, header.get("__metadata__") or {}


def _parameters(metadata: Mapping[str, str]) -> Parameters:
    values: dict[str, object] = {}
    for name, text in metadata.items():
        if name == "format":  # which some writers add
            continue
        try:
            values[name] = parse_json(text)
        except ValueError as error:
            raise _bad(f"metadata {shown(name)} is not JSON: {error}") from error
    try:
        return Parameters.model_validate(values)
    except ValidationError as error:
        raise _bad("; ".join(_clipped(line) for line in explain(error)[:3])) from error


def _latents(packed: _Packed, scorer: PictureScorer) -> torch.Tensor:
    shapes = scorer.latent_shapes
    if packed.dtype not in LATENT_TYPES:
        raise _bad(f"latents are of {', '.join(LATENT_TYPES)}, these are {packed.dtype}")
    if len(packed.shape) != 4 or packed.shape[0] == 0 or packed.shape[1:] not in shapes:
        wanted = " or ".join(f"[B, {', '.join(map(str, shape))}]" for shape in shapes)
        raise _bad(f"latents are {wanted}, these are {list(packed.shape)}")
    return torch.frombuffer(packed.data, dtype=LATENT_TYPES[packed.dtype]).reshape(packed.shape)


def _pictures(packed: _Packed) -> torch.Tensor:
    if packed.dtype != "U8":
        raise _bad(f"images are of U8, these are {packed.dtype}")
    if len(packed.shape) != 4 or packed.shape[1] != 3 or 0 in packed.shape:
        raise _bad(f"images are [B, 3, H, W], these are {list(packed.shape)}")
    return torch.frombuffer(packed.data, dtype=torch.uint8).reshape(packed.shape)


def _prompts(prompts: Sequence[str], count: int) -> Sequence[str]:
    if len(prompts) not in (1, count):
        raise _bad(f"prompts: {len(prompts)} for {count} samples")
    for prompt in prompts:
        if len(prompt) > LONGEST_PROMPT:
            raise _bad(f"prompts: one has {len(prompt)} characters, more than {LONGEST_PROMPT}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # JSON can say half of a pair of surrogates
            raise _bad(f"prompts: {shown(prompt)} is no text: {error.reason}") from error
    return prompts if len(prompts) == count else [prompts[0]] * count


def _noise(parameters: Parameters, scorer: PictureScorer, run: ServeRun) -> tuple[tuple[float, ...], int]:
    """Levels and draws: as asked for, or the scorer's own."""
    if scorer.space == "images":
        given = [name for name in ("levels", "draws", "seed") if dict(parameters)[name] is not None]
        if given:
            raise _bad(f"{', '.join(given)}: a {scorer.config.kind} scorer draws no noise")
        return (), 1
    levels, draws = parameters.levels or scorer.config.levels or (), parameters.draws or scorer.config.draws
    if len(levels) > run.max_levels:
        raise _bad(f"levels: {len(levels)}, more than {run.max_levels}")
    if draws > run.max_draws:
        raise _bad(f"draws: {draws}, more than {run.max_draws}")
    return levels, draws


def _bad(reason: str) -> Refused:
    return Refused(HTTPStatus.BAD_REQUEST, reason)


def _clipped(line: str) -> str:
    return line if len(line) <= 160 else f"{line[:157]}..."
