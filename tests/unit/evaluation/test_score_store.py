"""Scoring, its cache and what is dropped: real classes on the miniature SD3.5, in this process."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dina_rl.checkpoint import load_tensors
from dina_rl.config import DatasetConfig, EvaluateRun, FilterConfig, PictureScorerConfig
from dina_rl.data.buckets import PUBLISHED, PUBLISHED_MIN_AREA, Bucketing
from dina_rl.evaluation.named_scorers import PLAIN, named_scorer
from dina_rl.evaluation.requests import View
from dina_rl.evaluation.results import measured
from dina_rl.evaluation.score_store import ScoreStore, ScoringJob
from dina_rl.evaluation.sets import EvaluationSet, check_malformed, read_sets
from dina_rl.evaluation.worker import InlineWorkers, read_image
from dina_rl.scoring import NoiseKey, open_scorer
from tests.tensors import assert_same_tensors
from tests.tiny_clip import save_tiny_clip
from tests.tiny_reward import write_preferences

SINGLE, REPEATED = View(levels=(0.4,)), View(levels=(0.2, 0.6), draws=3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("preferences") / "tiny"
    write_preferences(directory, train=1, test=5)
    return directory


def evaluation(cache: Path, dataset: Path, **values) -> EvaluateRun:
    defaults = {"records_per_part": 2, "batch_size": 4, "encode_batch_size": 4, "max_broken": 0.5}
    return EvaluateRun.model_validate({"cache": cache, "sets": {"test": {"path": str(dataset)}}, **defaults, **values})


def scored(run: EvaluateRun, scorer: PictureScorerConfig, *views: View) -> tuple[ScoreStore, ScoringJob]:
    """The store with the scores of all views on the run's set."""
    (data,) = read_sets(run.sets, seed=run.seed)
    store, job = ScoreStore(run), named_scorer("scorer", scorer).job(data, views)
    store.fill(store.missing([job]), InlineWorkers())
    return store, job


def flat(store: ScoreStore, job: ScoringJob, view: View) -> torch.Tensor:
    """Scores [draws, records, 2]."""
    scores = store.read(job, view)
    return torch.stack([scores.scores[record.index] for record in scores.records], 1)


@pytest.fixture
def dina(tiny_reward: Path) -> PictureScorerConfig:
    return PictureScorerConfig(path=str(tiny_reward))


def test_scores_are_the_scorers_own(tmp_path, dataset, dina) -> None:
    store, job = scored(evaluation(tmp_path, dataset), dina, SINGLE, REPEATED)
    record = job.data.records[3]
    scorer = open_scorer(dina)
    latents = scorer.encode(torch.stack([read_image(job.data.source, key, size=(32, 32)) for key in record.images]))
    for view in (SINGLE, REPEATED):
        kept = store.read(job, view).scores[record.index]
        assert kept.shape == (view.draws, 2)
        for draw in range(view.draws):
            keys = [NoiseKey(group=("hpdv3", "test", record.index, draw), member=member) for member in range(2)]
            expected = scorer.at(view.levels).score_latents(latents, [record.prompt] * 2, keys)
            torch.testing.assert_close(kept[draw], expected, rtol=1e-4, atol=1e-5)


def test_batches_and_parts_do_not_change_scores(tmp_path, dataset, dina) -> None:
    first = flat(*scored(evaluation(tmp_path / "a", dataset), dina, REPEATED), REPEATED)
    other = evaluation(tmp_path / "b", dataset, records_per_part=5, batch_size=3, encode_batch_size=7)
    torch.testing.assert_close(flat(*scored(other, dina, REPEATED), REPEATED), first, rtol=1e-4, atol=1e-5)


def tensors_of(part: Path) -> dict[str, torch.Tensor]:
    """What a file holds; its bytes differ, since their writer orders the metadata by chance."""
    return {name: tensor.clone() for name, tensor in load_tensors(part).items()}


def test_nothing_is_scored_twice(tmp_path, dataset, dina) -> None:
    run = evaluation(tmp_path, dataset)
    _, job = scored(run, dina, SINGLE)
    part = next((tmp_path / "scores").glob("*/part-00001.safetensors"))
    content = tensors_of(part)
    part.unlink()
    again = ScoreStore(run)
    (missing,) = again.missing([job])
    assert [record.index for record in missing.records] == [2, 3]  # the interrupted part alone
    before = part.parent.joinpath("part-00000.safetensors").stat().st_mtime_ns
    again.fill([missing], InlineWorkers())
    assert part.parent.joinpath("part-00000.safetensors").stat().st_mtime_ns == before
    assert_same_tensors(tensors_of(part), content)
    assert again.missing([job]) == []


def test_broken_scores_are_told_and_computed_again(tmp_path, dataset, dina, capsys) -> None:
    run = evaluation(tmp_path, dataset)
    store, job = scored(run, dina, SINGLE)
    parts = sorted((tmp_path / "scores").glob("*/part-*.safetensors"))
    content, kept = [part.read_bytes() for part in parts], [tensors_of(part) for part in parts]
    parts[0].write_bytes(content[0][:-1] + bytes([content[0][-1] ^ 64]))  # another number
    parts[1].write_bytes(content[1][:-3])
    missing = store.missing([job])
    assert [record.index for part in missing for record in part.records] == [0, 1, 2, 3]
    lines = [line for line in capsys.readouterr().err.splitlines() if "broken" in line]
    assert [str(part) in line for part, line in zip(parts, lines, strict=False)] == [True, True]
    store.fill(missing, InlineWorkers())
    for part, tensors in zip(parts, kept, strict=True):
        assert_same_tensors(tensors_of(part), tensors)
    assert store.missing([job]) == []


def test_what_decides_the_numbers_decides_the_cache(tmp_path, dataset, dina, tiny_reward) -> None:
    run = evaluation(tmp_path, dataset)
    _, job = scored(run, dina, SINGLE)
    changed = shutil.copytree(tiny_reward, tmp_path / "reward")
    (changed / "extra.txt").write_text("other content")
    for other in (
        run.model_copy(update={"seed": 1}),
        run.model_copy(update={"noise": "independent"}),
        run.model_copy(update={"batch_size": 5}),
    ):
        assert len(ScoreStore(other).missing([job])) == 3
    assert len(ScoreStore(run).missing([replace(job, views=(View(levels=(0.5,)),))])) == 3
    assert len(ScoreStore(run).missing([replace(job, scorer=PictureScorerConfig(path=str(changed)))])) == 3
    sampled = read_sets({"test": run.sets["test"].model_copy(update={"max_records": 4})}, seed=0)[0]
    assert len(ScoreStore(run).missing([replace(job, data=sampled)])) == 2
    assert ScoreStore(run.model_copy(update={"run_dir": Path("elsewhere")})).missing([job]) == []


def test_shared_noise_is_shared_and_independent_noise_is_not(tmp_path, dina) -> None:
    write_preferences(tmp_path / "set", train=1, test=3)
    for index in range(3):  # both images of a pair are the same picture
        images = tmp_path / "set" / "images"
        shutil.copy(images / f"test-{index}-bright.png", images / f"test-{index}-dark.png")
    shared = flat(*scored(evaluation(tmp_path / "a", tmp_path / "set"), dina, SINGLE), SINGLE)
    torch.testing.assert_close(shared[..., 0], shared[..., 1], rtol=1e-5, atol=1e-6)
    run = evaluation(tmp_path / "b", tmp_path / "set", noise="independent")
    independent = flat(*scored(run, dina, SINGLE), SINGLE)
    assert ((independent[..., 0] - independent[..., 1]).abs() > 1e-4).all()


@pytest.mark.parametrize("kind", ["dina", "pickscore"])
def test_unreadable_images_are_dropped_with_their_reason(kind, tmp_path, dataset, dina) -> None:
    broken = shutil.copytree(dataset, tmp_path / "set")
    (broken / "images" / "test-1-dark.png").write_bytes(b"not an image")
    scorer, view = dina, SINGLE
    if kind == "pickscore":
        clip = str(save_tiny_clip(tmp_path / "clip"))
        scorer, view = PictureScorerConfig(kind="pickscore", path=clip, processor=clip), PLAIN
    run = evaluation(tmp_path / "cache", broken)
    store, job = scored(run, scorer, view)
    scores = store.read(job, view)
    assert [record.index for record in scores.records] == [0, 2, 3, 4]
    assert [bool(torch.isfinite(values).all()) for values in scores.scores.values()] == [True] * 4
    assert [(image.record, image.image) for image in scores.dropped] == [(1, "images/test-1-dark.png")]
    assert "unreadable image" in scores.dropped[0].problem.reason
    result = measured(run, store, "scorer", job, view)
    assert (result.dropped_images, result.dropped_pairs, result.accuracy.pairs) == (1, 1, 4)
    with pytest.raises(ValueError, match="set test: .* 1 of the 5 scored have .* max_broken = 0.1 allows"):
        measured(run.model_copy(update={"max_broken": 0.1}), store, "scorer", job, view)


def test_images_are_seen_in_buckets(tmp_path, dina) -> None:
    """A wide pair beside square ones; a pair of two shapes has no bucket, which breaks nothing."""
    write_preferences(tmp_path / "set", train=1, test=4)
    images = tmp_path / "set" / "images"
    for name in ("test-1-bright", "test-1-dark", "test-2-dark"):
        with Image.open(images / f"{name}.png") as image:
            image.resize((66, 33)).save(images / f"{name}.png")
    run = evaluation(tmp_path / "cache", tmp_path / "set", max_broken=0.0)
    (data,) = read_sets(run.sets, seed=0)
    scorer = named_scorer("scorer", dina, buckets=((32, 32), (32, 64)))
    store, job = ScoreStore(run), scorer.job(data, (SINGLE,))
    store.fill(store.missing([job]), InlineWorkers())
    scores = store.read(job, SINGLE)
    assert [record.index for record in scores.records] == [0, 1, 3]
    assert [(image.record, image.problem.broken) for image in scores.dropped] == [(2, False), (2, False)]
    result = measured(run, store, "scorer", job, SINGLE)
    assert (result.dropped_images, result.dropped_pairs, result.accuracy.pairs) == (2, 1, 3)
    opened, record = open_scorer(dina), data.records[1]
    latents = opened.encode(torch.stack([read_image(data.source, key, size=(32, 64)) for key in record.images]))
    keys = [NoiseKey(group=("hpdv3", "test", 1, 0), member=member) for member in range(2)]
    expected = opened.at((0.4,)).score_latents(latents, [record.prompt] * 2, keys)
    torch.testing.assert_close(scores.scores[1][0], expected, rtol=1e-4, atol=1e-5)


def with_buckets(reward: Path, directory: Path, buckets) -> PictureScorerConfig:
    """A copy of a reward model whose card names these buckets."""
    shutil.copytree(reward, directory)
    card = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(card | {"buckets": buckets, "fingerprint": None}))
    return PictureScorerConfig(path=str(directory))


def test_a_fit_on_latents_does_not_ask_images_for_exact_sizes(tmp_path, tiny_reward, tiny_flux) -> None:
    """Sizes and smallest area are those of the fit; the authors' files list the buckets in ascending order."""
    scorer = with_buckets(tiny_reward, tmp_path / "some", [[32, 16], [32, 32]])
    of_latents, of_images = (
        named_scorer("scorer", scorer, dataset=DatasetConfig(kind=kind, filter=FilterConfig(min_area=9))).bucketing
        for kind in ("preprocessed", "hpdv3")
    )
    assert of_latents == of_images == Bucketing(buckets=((32, 16), (32, 32)), stretch=False, min_area=9)
    ascending = with_buckets(tiny_reward, tmp_path / "all", sorted(PUBLISHED))
    ascending = ascending.model_copy(update={"pipeline": str(tiny_flux)})  # its positions reach that far
    found = named_scorer("scorer", ascending, dataset=DatasetConfig(kind="preprocessed")).bucketing
    assert found == Bucketing(buckets=PUBLISHED, stretch=False, min_area=PUBLISHED_MIN_AREA)


def test_a_sample_uses_the_latents_of_its_set(tmp_path, dataset, dina) -> None:
    run = evaluation(tmp_path, dataset)
    (data,) = read_sets(run.sets, seed=0)
    sample = data.sample(3, seed=0)
    assert len(sample.records) == 3
    assert sample.sample(9, seed=1).whole is data
    store = ScoreStore(run)
    scorer = named_scorer("scorer", dina)
    jobs = [scorer.job(each, (SINGLE,)) for each in (data, sample)]
    store.fill(store.missing(jobs), InlineWorkers())
    assert len(list((tmp_path / "latents").iterdir())) == 1
    whole, part = (store.read(job, SINGLE).scores for job in jobs)
    assert len(part) == 3
    for index, scores in part.items():
        torch.testing.assert_close(scores, whole[index], rtol=1e-4, atol=1e-5)


def test_sets_are_read_sampled_and_refused(tmp_path, dataset) -> None:
    def read(**values) -> EvaluationSet:
        run = evaluation(tmp_path, dataset, sets={"x": {"path": str(dataset), **values}})
        return read_sets(run.sets, seed=run.seed)[0]

    assert len(read().records) == 5
    assert len(read(max_records=3).records) == 3
    assert read(max_records=3).records == read(max_records=3).records
    with pytest.raises(ValueError, match="validation"):
        read(split="validation")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "test.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="set x: .* has no comparison in split test"):
        read(path=str(tmp_path / "empty"))


def test_the_broken_share_is_one_of_the_whole_split(tmp_path, dina) -> None:
    """2 of 20 records are malformed, and a sample of 3 is scored: no more than 1 in 10 is broken."""
    write_preferences(tmp_path / "set", train=1, test=20)
    file = tmp_path / "set" / "test.json"
    records = json.loads(file.read_text())
    file.write_text(json.dumps([{"prompt": ""} if number in (4, 9) else each for number, each in enumerate(records)]))
    sets = {"test": {"path": str(tmp_path / "set"), "max_records": 3}}
    run = evaluation(tmp_path / "cache", tmp_path / "set", sets=sets, max_broken=0.1)
    store, job = scored(run, dina, SINGLE)
    check_malformed(job.data, 0.1)
    assert measured(run, store, "scorer", job, SINGLE).malformed == 2
    assert job.data.sample(1, seed=0).malformed_share == 0.1
    with pytest.raises(ValueError, match="set test: 2 of 20 records are malformed, more than max_broken = 0.09"):
        check_malformed(job.data, 0.09)
