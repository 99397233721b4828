"""Presets hang together: every chain that the guide names, encode -> fit -> align -> evaluate, at its true sizes.

No weights but a miniature's: models stand on torch's meta device, and each stage does what it does before it starts
anything. Only places (data, prompts, pipelines, CLIP models) are the test's.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dina_rl.backbones.base import Backbone
from dina_rl.cli import load
from dina_rl.config import AlignRun, EvaluateRun, FitRun, HPSv3Config, LocalRun
from dina_rl.data.buckets import PUBLISHED as BUCKETS
from dina_rl.reward.card import PEFT_PREFIX, make_card
from dina_rl.reward.checkpoint import read_card
from dina_rl.reward.inputs import check_fit_inputs
from dina_rl.reward.model import LatentRewardModel
from dina_rl.runtime import open_pipeline
from dina_rl.types import PromptEmbeds
from jobs import align, evaluate
from tests.sources import CONFIGS, PUBLISHED_REWARD, PUBLISHED_TEXT_TOKENS
from tests.tiny_clip import save_tiny_clip
from tests.tiny_hpsv3 import save_tiny_hpsv3
from tests.tiny_reward import write_preferences
from tests.true_sizes import PUBLISHED, complete, write_pipeline

GUIDE = (CONFIGS.parent / "docs" / "cluster.md").read_text()
PRESETS = {file.stem for file in CONFIGS.glob("*.yaml")}
FAMILIES = MappingProxyType(
    {
        "stabilityai/stable-diffusion-3.5-medium": "SD3.5-M",
        "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
        "Tongyi-MAI/Z-Image-Turbo": "Z-Image-Turbo",
    }
)


def named(cell: str) -> list[str]:
    """Presets that a cell of a table names."""
    globs = re.findall(r"`configs/([\w*]+)\.yaml`", cell)
    return sorted({file.stem for glob in globs for file in CONFIGS.glob(f"{glob}.yaml")})


def rows() -> list[list[str]]:
    """What fits and what aligns with it, as the guide's table has them."""
    table = GUIDE.partition("| encode and fit | align |\n")[2].partition("\n\n")[0]
    return [line.strip("|").split("|") for line in table.splitlines()[1:]]


CHAINS = {fit: named(cells[1]) for cells in rows() for fit in named(cells[0])}
"""Preset of a fit -> presets that align with it; those of `dina_rl.local` are both."""
WITHOUT_FIT = [preset for cells in rows() if not named(cells[0]) for preset in named(cells[1])]
FITS = [fit for fit in CHAINS if not fit.startswith("local")]
ALIGNS = [(fit, preset) for fit in FITS for preset in CHAINS[fit]]
LOCAL = [preset for preset in CHAINS if preset.startswith("local")]


def test_every_preset_belongs_to_a_chain() -> None:
    assert {*CHAINS, *WITHOUT_FIT, *(preset for presets in CHAINS.values() for preset in presets)} == PRESETS


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A directory with what presets name by path: pipelines, a preference set, prompts, CLIP models, fits."""

    root: Path
    pipelines: Mapping[str, str]
    hpsv3: HPSv3Config

    def pipeline(self, preset: str) -> str:
        """What stands in for the pipeline that a preset names."""
        named = yaml.safe_load((CONFIGS / f"{preset}.yaml").read_text()).get("pipeline", {}).get("path", "shapes")
        return self.pipelines[named]

    def fit(self, preset: str) -> FitRun:
        places = [
            *("--pipeline.path", self.pipeline(preset), "--dataset.path", str(self.root / "hpdv3")),
            *("--run-dir", str(self.root / preset)),
        ]
        return load(FitRun, ["--config", str(CONFIGS / f"{preset}.yaml"), *places], program="test")

    def align(self, preset: str, reward: Path | None) -> AlignRun:
        words = ["--config", str(CONFIGS / f"{preset}.yaml"), "--pipeline.path", self.pipeline(preset)]
        if reward is not None:
            words += ["--rewards.dina.path", str(reward)]
            if read_card(reward).fingerprint is None:  # the published one, which names a hub id
                words += ["--rewards.dina.pipeline", self.pipeline(preset)]
        given = load(AlignRun, words, program="test")
        if given.prompts.train != "shapes":
            for split in ("train", "dev", "test"):
                words += [f"--prompts.{split}", str(self.root / f"{split}.txt")]
        if given.golden.of_images is not None:
            words += ["--golden.path", str(self.root / "golden"), "--golden.processor", str(self.root / "golden")]
        if given.rewards.pickscore is not None:
            clip = str(self.root / "pickscore")
            words += ["--rewards.pickscore.path", clip, "--rewards.pickscore.processor", clip]
        if given.rewards.hpsv3 is not None:
            words += ["--rewards.hpsv3.path", self.hpsv3.path, "--rewards.hpsv3.processor", self.hpsv3.processor]
        return load(AlignRun, words, program="test")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, tiny_flux: Path, tiny_z_image: Path) -> Place:
    root = tmp_path_factory.mktemp("chains")
    pipelines = {hub: str(write_pipeline(root / name, PUBLISHED[name])) for hub, name in FAMILIES.items()}
    for name, tiny in (("SD3.5-M", tiny_pipeline), ("FLUX.1-dev", tiny_flux), ("Z-Image-Turbo", tiny_z_image)):
        complete(root / name, tiny)
    write_preferences(root / "hpdv3", train=2, test=2)
    for split, count in (("train", 256), ("dev", 2), ("test", 2)):
        (root / f"{split}.txt").write_text("".join(f"{split} prompt {number}\n" for number in range(count)))
    for name in ("golden", "pickscore"):
        save_tiny_clip(root / name)
    hpsv3 = save_tiny_hpsv3(root / "hpsv3")
    return Place(root=root, pipelines={**pipelines, "shapes": "shapes"}, hpsv3=hpsv3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A fit as far as it comes without weights."""

    run: FitRun
    backbone: Backbone
    model: LatentRewardModel  # on torch's meta device
    run_dir: Path  # as the fit leaves it, without tensors

    @property
    def reward(self) -> Path:
        return self.run_dir / "reward"


def fit_on_meta(run: FitRun, run_dir: Path) -> Fitted:
    backbone = open_pipeline(run.pipeline)
    backbone.load_transformer = backbone.empty_transformer
    with torch.device("meta"):
        model = LatentRewardModel(backbone, run.reward, seed=run.seed).to("meta")
    buckets = BUCKETS if run.dataset.buckets == "published" else None
    (run_dir / "reward").mkdir(parents=True)
    (run_dir / "reward" / "config.json").write_text(make_card(model, run.pipeline, buckets).model_dump_json())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return Fitted(run=run, backbone=backbone, model=model, run_dir=run_dir)


@pytest.fixture(scope="module")
def fitted(place: Place) -> Callable[[str], Fitted]:
    """The fit of a preset, made once."""
    return cache(lambda preset: fit_on_meta(place.fit(preset), place.root / preset))


@pytest.mark.parametrize("preset", FITS)
def test_a_preset_can_be_encoded_and_fitted(fitted: Callable[[str], Fitted], preset: str) -> None:
    """What encode and fit check, and a forward of one sample: taps, head, text length and sizes go together."""
    fit = fitted(preset)
    pipeline = check_fit_inputs(fit.run, fit.backbone).pipeline
    tokens, width, pooled = fit.backbone.prompt_shape
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16, enabled=fit.run.fit.autocast):
        latents = torch.empty(1, *fit.backbone.latent_shape(pipeline.height, pipeline.width))
        prompt = PromptEmbeds(
            embeds=torch.empty(1, tokens, width, dtype=fit.backbone.dtype),
            pooled=torch.empty(1, pooled, dtype=fit.backbone.dtype),
        )
        assert fit.model.score(latents, torch.empty(1), prompt).shape == (1,)


@pytest.mark.parametrize(("fit", "preset"), ALIGNS)
def test_a_preset_can_be_aligned_with_the_reward_that_it_names(
    place: Place, fitted: Callable[[str], Fitted], fit: str, preset: str
) -> None:
    """That is what its chain fits, by its run directory, or the published one."""
    named = load(AlignRun, ["--config", str(CONFIGS / f"{preset}.yaml")], program="test").rewards.dina
    made = load(FitRun, ["--config", str(CONFIGS / f"{fit}.yaml")], program="test").run_dir / "reward"
    assert named is not None
    assert named.path in (str(made), PUBLISHED_REWARD)
    reward = published_reward(place) if named.path == PUBLISHED_REWARD else fitted(fit).reward
    align.preflight(place.align(preset, reward))


@pytest.mark.parametrize("preset", WITHOUT_FIT)
def test_a_preset_can_be_aligned_without_a_fit(place: Place, preset: str) -> None:
    run = place.align(preset, None)
    assert run.rewards.dina is None
    align.preflight(run)


@pytest.mark.parametrize("preset", FITS)
def test_what_a_preset_fits_can_be_evaluated(place: Place, fitted: Callable[[str], Fitted], preset: str) -> None:
    words = ["--runs", str(fitted(preset).run_dir), "--sets.hpdv3.path", str(place.root / "hpdv3")]
    (scorer,) = evaluate.preflight(load(EvaluateRun, words, program="test")).scorers
    reward = fitted(preset).run.reward
    assert scorer.main.levels == (reward.single_level,)
    assert scorer.thurstone == reward.thurstone


def test_the_fit_of_released_code_can_stand_in_for_the_published_reward(
    place: Place, fitted: Callable[[str], Fitted]
) -> None:
    """Their cards are the same, so that whatever takes one takes the other."""
    ours, theirs = read_card(fitted("reward_sd35m_official_code").reward), read_card(published_reward(place))
    assert ours.reward.thurstone.sigma_u == pytest.approx(theirs.reward.thurstone.sigma_u, rel=1e-4)
    same = {"thurstone": theirs.reward.thurstone}
    unmarked = {name: dict(theirs)[name] for name in ("pipeline", "revision", "fingerprint", "pictures")}
    assert ours.model_copy(update={**unmarked, "reward": ours.reward.model_copy(update=same)}) == theirs
    assert ours.max_sequence_length == PUBLISHED_TEXT_TOKENS


def published_reward(place: Place) -> Path:
    """What of the published layout says what it is: its configuration, and the adapter's first tensor."""
    directory = place.root / "published"
    adapter = directory / "checkpoint" / "backbone_lora"
    adapter.mkdir(parents=True, exist_ok=True)
    model = {
        "model_type": "thurstone",
        "backbone_model_id": "stabilityai/stable-diffusion-3.5-medium",
        "num_transformer_layers": 12,
        "freeze_backbone": False,
        "use_lora": True,
        "visual_head_idx": [4, 8, 12],
        "text_head_idx": [4, 8, 12],
        "reward_head": {"num_queries": 4, "num_attn_heads": 8},
    }
    (directory / "config.json").write_text(json.dumps({"model": model}))
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 128}))
    tensor = {f"{PEFT_PREFIX}transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(64, 1536)}
    save_file(tensor, adapter / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize("preset", LOCAL)
def test_a_local_preset_is_a_chain_in_itself(place: Place, preset: str) -> None:
    run = load(LocalRun, ["--config", str(CONFIGS / f"{preset}.yaml")], program="test")
    fit = fit_on_meta(run.fit_run(place.root / "hpdv3", place.root / preset), place.root / preset)
    check_fit_inputs(fit.run, fit.backbone)
    align.preflight(run.align_run(fit.reward, place.root / preset / "align"))
