"""The miniature world's pixel reward: its two losses, and that what is fitted is a PickScore."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from benchmarks.pixel_reward import cost, fit, pretrain
from benchmarks.untrained import save_untrained
from dina_rl.config import PickScoreConfig, PipelineConfig, RewardModelConfig
from dina_rl.scorers.clip import load_clip, open_clip_scorer
from dina_rl.seeding import generator
from dina_rl.shapes.grammar import prompts, spec_tensor
from dina_rl.shapes.pipeline import SHIPPED_PIPELINE
from dina_rl.shapes.preferences import write_preferences
from dina_rl.shapes.render import crawl


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "preferences"
    write_preferences(
        SHIPPED_PIPELINE, out, train_groups=3, test_groups=2, seed=0, generator_fraction=0, progress=False
    )
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pixels") / "clip"
    pretrain.main(["--out", str(out), "--steps", "1", "--batch-size", "2"])
    return out


def test_the_contrastive_loss_is_stock_clips() -> None:
    model = pretrain.new_model(0)
    loss = pretrain.contrastive_loss(model, 4, generator("test"))
    draws = generator("test")
    rows = torch.randperm(464, generator=draws)[:4]
    images = crawl(spec_tensor(prompts("train"))[rows], draws)
    stock = model(
        input_ids=pretrain.tokenized(SHIPPED_PIPELINE / "tokenizer", [prompts("train")[row] for row in rows]),
        pixel_values=pretrain.normalised(images),
        return_loss=True,
    ).loss
    torch.testing.assert_close(loss, stock)


def test_the_fits_loss_is_pickscores(preferences: Path, pretrained: Path) -> None:
    """-log of the preferred one's share in the softmax of both scores, as the scorer of a run gives them."""
    pairs = fit.read_pairs(preferences, "train")
    records = json.loads((preferences / "train.json").read_text())
    assert pairs.prompts == tuple(record["prompt"] for record in records)
    model = load_clip(str(pretrained), "cpu")
    model.logit_scale.fill_(3.0)  # a scale at which the loss is not that of a tossed coin
    loss = fit.preference_loss(model, pairs, pretrain.tokenized(pretrained, pairs.prompts), 5, generator("test"))
    groups = torch.randint(0, 3, (5,), generator=generator("test")).tolist()
    batch = [6 * group + position for group in groups for position in range(6)]
    scorer = open_clip_scorer(
        PickScoreConfig(path=str(pretrained), processor=str(pretrained)), learned_scale=True, device="cpu"
    )
    scorer._model.logit_scale.fill_(3.0)
    scores = torch.stack(
        [
            scorer.score(pairs.pixels[side[batch]] / 255, tuple(pairs.prompts[row] for row in batch))
            for side in (pairs.chosen, pairs.rejected)
        ]
    )
    torch.testing.assert_close(loss, -scores.log_softmax(0)[0].mean())
    assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_what_is_fitted_is_loaded_measured_and_counted(
    preferences: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pretrained", str(pretrained), "--preferences", str(preferences), "--out", str(tmp_path / "reward")]
    fit.main([*words, "--steps", "2", "--groups", "1"])
    before, after = (CLIPModel.from_pretrained(each).logit_scale for each in (pretrained, tmp_path / "reward"))
    assert before != after
    card = json.loads((tmp_path / "reward" / "card.json").read_text())
    assert card["pretraining"]["steps"] == 1
    assert card["fit"]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        fit.main(words)
    assert "exists: choose a new directory" in capsys.readouterr().err


def test_what_a_score_costs_is_measured_of_both(pretrained: Path, tmp_path: Path) -> None:
    dina = save_untrained(tmp_path / "dina", PipelineConfig(), RewardModelConfig(taps=(1,), num_heads=4))
    spent = cost.measure(cost.CostRun(dina=dina, pixel=pretrained, samples=2, repeats=2))
    assert {len(times) for times in spent.values()} == {2}
    assert spent[cost.PIXEL + cost.GRADIENT] > spent[cost.PIXEL], "the gradient is on top"
    assert f"{cost.PIXEL} / {cost.DINA}{cost.GRADIENT}" in cost.table(spent)
