"""How well a reward model agrees with the held-out pairs of a latent store: what a fit reports of itself."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dina_rl.backbones.base import TextEncoder
from dina_rl.data.stores.latents import LatentStore, PairBatch
from dina_rl.reward.model import LatentRewardModel
from dina_rl.seeding import normal
from dina_rl.textfiles import read_record
from dina_rl.types import PromptEmbeds

GOLDEN_FILE = "golden.json"


def pairwise_accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """Share of pairs whose preferred image scores strictly higher; equal scores count as wrong. Scores [N], N > 0."""
    if not len(chosen) or chosen.shape != rejected.shape:
        raise ValueError(f"accuracy needs equally many scores on both sides, got {chosen.shape} and {rejected.shape}")
    return (chosen > rejected).float().mean().item()


def label_ceiling(golden: Mapping[str, float], pairs: Sequence[tuple[str, str]]) -> float:
    """Share of (chosen, rejected) image paths whose noise-free golden scores agree with the label.

    No scorer of single images beats this on average: the rest of the labels is the annotators' noise.

    Raises:
        ValueError: an image without a golden score.
    """
    missing = [path for pair in pairs for path in pair if path not in golden]
    if missing:
        raise ValueError(f"{len(missing)} images have no golden score, the first is {missing[0]}")
    scores = torch.tensor([(golden[chosen], golden[rejected]) for chosen, rejected in pairs], dtype=torch.float64)
    return pairwise_accuracy(scores[:, 0], scores[:, 1])


def store_ceiling(store: LatentStore) -> float | None:
    """`label_ceiling` of the test pairs, where golden scores lie beside the dataset (miniature world), else None."""
    file = Path(store.info.dataset) / GOLDEN_FILE
    if not file.is_file():
        return None
    table = store.pairs("test")
    pairs = [
        (store.images[chosen], store.images[rejected])
        for chosen, rejected in zip(table.chosen.tolist(), table.rejected.tolist(), strict=True)
    ]
    return label_ceiling(read_record(dict[str, float], file), pairs)


@torch.no_grad()
def score_pairs(
    model: LatentRewardModel,
    batches: Iterable[PairBatch],
    encoder: TextEncoder,
    *,
    levels: Sequence[float],
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [N], [N] of the chosen and the rejected image of every pair at one noise level or an ensemble of them.

    A pair's two images share the noise, as in training: what differs between their scores is then the images. The noise
    is keyed by the pair, so that batching does not change a score.
    """
    device = next(model.head.parameters()).device
    chosen, rejected = [], []
    for batch in batches:
        noise = torch.stack([normal(batch.chosen.shape[1:], seed, "score-pairs", id) for id in batch.pair_ids.tolist()])
        latents = torch.cat([batch.chosen, batch.rejected]).to(device)
        prompt = encoder(batch.prompts).to(device)
        scores = model.score_clean(
            latents, PromptEmbeds.cat([prompt, prompt]), levels, torch.cat([noise, noise]).to(device)
        )
        preferred, other = scores.float().cpu().chunk(2)
        chosen.append(preferred)
        rejected.append(other)
    return torch.cat(chosen), torch.cat(rejected)
