"""The reward model's job through real Ray Data and Ray Train, on a handful of noise images."""

import json
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dina_rl.config import FitRun
from dina_rl.data.encode import LATENTS, SKIPPED_FILE
from dina_rl.data.images import load_image
from dina_rl.data.stores.latents import LatentStore
from dina_rl.errors import BadInput, RunStopped
from dina_rl.reward.fit import REWARD, RewardFit, fit
from dina_rl.reward.inline import fit_inline, training_batches
from dina_rl.reward.model import LatentRewardModel
from dina_rl.reward.outcome import LOG_FILE, METRICS_FILE, FitResult
from dina_rl.reward.session import REWARD_BEST, TENSORBOARD
from dina_rl.runtime import open_pipeline
from jobs import encode, fit_reward, training
from tests.processes import title_of
from tests.tiny_reward import TINY_REWARD, write_preferences, write_store


def tiny_fit(run_dir: Path, dataset: Path, pipeline: Path, other: Path, **fit_values: int | None) -> FitRun:
    """Two buckets of different batch sizes, accumulation, evaluations and a second held-out set."""
    return FitRun(
        run_dir=run_dir,
        pipeline={"path": str(pipeline)},
        dataset={"path": str(dataset), "max_skipped": 0.2, "encode_batch_size": 8, "buckets": [(32, 32), (32, 16)]},
        reward=TINY_REWARD,
        fit={
            "steps": 6,
            "batch_size": 4,
            "bucket_batch": "tokens",
            "micro_batch_size": 1,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "ema_decay": 0.9,
            "evaluate_every": 1,
            "held_out": {"other": str(other)},
            **fit_values,
        },
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training pairs, one malformed and one with an unreadable image, and 6 test pairs; every third is narrow."""
    directory = tmp_path_factory.mktemp("preferences") / "tiny"
    write_preferences(directory, train=24, test=6)
    for path in directory.glob("images/*.png"):
        if int(path.name.split("-")[1]) % 3 == 0:
            with Image.open(path) as image:
                image.crop((0, 0, 16, 32)).save(path)
    records = json.loads((directory / "train.json").read_text())
    records[3]["path2"] = None
    (directory / "train.json").write_text(json.dumps(records))
    (directory / records[5]["path1"]).write_bytes(b"not an image")
    return directory


@pytest.fixture(scope="module")
def other(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latent store of two buckets, to be held out."""
    directory = tmp_path_factory.mktemp("stores") / "other"
    write_store(directory, str(tiny_pipeline), train=(4, 4), test=(1, 2))
    return directory


@pytest.fixture(scope="module")
def finished(
    ray_local, dataset: Path, other: Path, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FitRun, FitResult]:
    """A fit of which one worker was killed after the first checkpoint: all tests of it say that nobody notices."""
    run = tiny_fit(tmp_path_factory.mktemp("fit") / "run", dataset, tiny_pipeline, other)
    killed = []

    def kill_after_the_first_checkpoint() -> None:
        while not list((run.run_dir / training.TRAIN).glob("step_*")):
            time.sleep(0.02)
        victim = next(p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in title_of(p))
        victim.kill()
        killed.append(victim.pid)

    killer = threading.Thread(target=kill_after_the_first_checkpoint, daemon=True)
    killer.start()
    result = fit_reward.fit_reward_model(run)
    assert killed
    return run, result


def log_of(run: FitRun) -> tuple[list[dict], dict[int, dict]]:
    """(lines of steps, held-out accuracies by step)."""
    lines = [json.loads(line) for line in (run.run_dir / LOG_FILE).read_text().splitlines()]
    held_out = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    return [line for line in lines if "loss" in line], held_out


def losses_of_one_process(run: FitRun) -> list[float]:
    """Every step's loss of the plain loop, without Ray, on the same data."""
    backbone = open_pipeline(run.pipeline)
    whole = run.fit.model_copy(update={"micro_batch_size": None})
    progress = RewardFit(LatentRewardModel(backbone, run.reward, seed=run.seed), whole)
    batches = training_batches(run, LatentStore(run.run_dir / LATENTS))
    return [report.loss for report in fit(progress, batches, backbone.load_text_encoder(), seed=run.seed)]


def test_bad_records_are_skipped_and_listed(finished) -> None:
    run, result = finished
    lines = [json.loads(line) for line in (run.run_dir / SKIPPED_FILE).read_text().splitlines()]
    assert [(line["file"], line["index"]) for line in lines] == [("train.json", 3), ("train.json", 5)]
    assert lines[0]["reason"].startswith("path2 must be")
    assert "unreadable image" in lines[1]["reason"]
    assert (result.skipped, result.train_pairs, result.test_pairs) == (2, 22, 6)


def test_every_image_is_encoded_once(finished, dataset: Path) -> None:
    run, _ = finished
    store = LatentStore(run.run_dir / LATENTS)
    assert len(store.images) == len(set(store.images)) == 2 * 28  # no images of the two unusable pairs
    assert store.info.rows == (2 * 19, 2 * 9)
    codec = open_pipeline(run.pipeline).load_codec()
    for row, (height, width) in ((0, (32, 32)), (2 * 19, (32, 16))):
        image = torch.tensor(load_image((dataset / store.images[row]).read_bytes(), height=height, width=width))
        expected = codec.encode(image.permute(2, 0, 1)[None].float() / 255)
        torch.testing.assert_close(store.latents(torch.tensor([row])), expected, rtol=1e-4, atol=1e-5)


def test_two_workers_of_which_one_is_killed_fit_what_one_process_fits(finished) -> None:
    """A step holds 4 pairs of 32x32 or 8 of 32x16: on two ranks in parts of one, in the plain loop whole.

    Same batches, same noise: losses differ by rounding alone (Adam would blow that up in the weights). That a fit goes
    on from its checkpoint bit for bit is in numerics/test_fit_resume.
    """
    run, _ = finished
    logged = log_of(run)[0][-1]
    losses = losses_of_one_process(run)
    assert logged["step"] == len(losses) == 6
    # It is the mean since the group began anew: at the checkpoint of step 2, or of 4 where that was there already.
    assert any(logged["loss"] == pytest.approx(sum(losses[since:]) / (6 - since), rel=1e-5) for since in (2, 4))


def test_the_fit_without_ray_is_a_complete_one(
    finished, dataset: Path, other: Path, tiny_pipeline: Path, tmp_path: Path
) -> None:
    run = tiny_fit(tmp_path / "run", dataset, tiny_pipeline, other, micro_batch_size=None)
    ours, theirs = fit_inline(run), finished[1]
    for name in ("label_ceiling", "train_pairs", "test_pairs", "skipped", "steps"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.accuracy_single == pytest.approx(theirs.accuracy_single, abs=1 / 6 + 1e-9)  # one pair of the six
    assert set(ours.held_out) == set(theirs.held_out) == {"test", "other"}
    (our_line,), our_accuracies = log_of(run)
    (their_line,), their_accuracies = log_of(finished[0])
    assert our_line["step"] == their_line["step"] == 6
    assert our_line["loss"] == pytest.approx(sum(losses_of_one_process(finished[0])) / 6, rel=1e-5)
    assert set(our_accuracies) == set(their_accuracies) == set(range(1, 7))
    assert (Path(ours.reward) / "head.safetensors").is_file()
    assert fit_inline(run.model_copy(update={"resume": True})) == ours


def test_the_best_and_the_last_weights_are_kept(finished) -> None:
    run, result = finished
    _, held_out = log_of(run)
    accuracies = {step: sets["test"]["accuracy_single"] for step, sets in held_out.items()}
    best = max(accuracies, key=lambda step: (accuracies[step], -step))  # the first of the best
    assert (result.best_step, result.best_accuracy_single) == (best, accuracies[best])
    assert result.held_out == held_out[6]
    last, kept = (load_file(run.run_dir / name / "head.safetensors") for name in (REWARD, REWARD_BEST))
    assert set(last) == set(kept) != set()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in last.items()) == (best == 6)


def test_result_is_written_and_bounded_by_the_ceiling(finished) -> None:
    run, result = finished
    metrics = json.loads((run.run_dir / METRICS_FILE).read_text())
    assert metrics["accuracy_single"] == result.accuracy_single
    assert 0 <= result.accuracy_single <= 1
    assert result.label_ceiling == 1.0  # the preferred test image is always the brighter one
    assert result.steps == 6


def test_curves_are_in_tensorboard(finished) -> None:
    run, result = finished
    events = EventAccumulator(str(run.run_dir / TENSORBOARD)).Reload()
    tags = set(events.Tags()["scalars"])
    curves = {"loss", "accuracy", "grad_norm", "learning_rate", "pairs_per_second"}
    assert {f"reward/{name}" for name in curves} <= tags
    assert events.Scalars("reward/test_accuracy_single")[-1].value == pytest.approx(result.accuracy_single)
    other = events.Scalars("reward/other_accuracy_ensemble")
    assert [event.step for event in other] == [1, 2, 3, 4, 5, 6]
    assert other[-1].value == pytest.approx(result.held_out["other"]["accuracy_ensemble"])


def test_the_command_fits_without_ray_on_a_shared_store(
    small_config, other: Path, tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = small_config + arguments(tmp_path / "run", tmp_path / "no-dataset", tiny_pipeline)
    argv += ["--inline", "--latents", str(other), "--fit.held_out", f"{{other: {other}}}"]
    argv += ["--fit.num_workers", "1", "--reward.lora.rank", "4"]
    fit_reward.main([*argv, "--fit.evaluate_every", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["test", "other"]
    assert lines[3].startswith("  reward_best/ holds step ")
    assert lines[-1] == f"reward model  {tmp_path / 'run' / REWARD}"
    assert "holds a run already; add --resume" in refused(fit_reward.main, argv, capsys)


def test_a_fit_that_cannot_go_on_ends_with_one_line(small_config, other, tiny_pipeline, tmp_path, capsys) -> None:
    """After a first step as large as this no score is a number."""
    argv = small_config + arguments(tmp_path / "run", tmp_path / "no-dataset", tiny_pipeline)
    argv += ["--inline", "--latents", str(other), "--fit.num_workers", "1", "--fit.learning_rate", "1e30"]
    with pytest.raises(SystemExit) as ending:
        fit_reward.main(argv)
    assert ending.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "the gradient norm of step 2 is nan" in lines[0]


def test_a_broken_shard_ends_a_fit_on_ray_at_once_with_its_line(ray_local, tiny_pipeline, tmp_path) -> None:
    """A task of Ray Data finds it, and a worker of Ray Train raises it, which is not tried again."""
    store = write_store(tmp_path / "store", str(tiny_pipeline), train=(8, 0), test=(2, 0))
    shard = store.directory / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-5])
    fit = {"steps": 2, "batch_size": 4, "num_workers": 1, "max_failures": 1000}
    run = FitRun(
        run_dir=tmp_path / "run",
        pipeline={"path": str(tiny_pipeline)},
        latents=store.directory,
        reward=TINY_REWARD,
        fit=fit,
    )
    with pytest.raises(BadInput, match=f"{shard} is broken"):
        fit_reward.fit_reward_model(run)


def test_a_fit_for_which_the_cluster_has_no_room_says_so_in_time(ray_local, dataset, tiny_pipeline, tmp_path) -> None:
    """Room for its workers alone is none: Ray Data, which feeds them, would never begin."""
    all_cpus = ray.cluster_resources()["CPU"]
    fit = {"steps": 1, "batch_size": 4, "num_workers": 1, "cpus_per_worker": all_cpus, "start_timeout_s": 0.5}
    shared = {"pipeline": {"path": str(tiny_pipeline)}, "reward": TINY_REWARD, "fit": fit}
    store = write_store(tmp_path / "store", str(tiny_pipeline), train=(8, 0), test=(2, 0))
    encoded = FitRun(run_dir=tmp_path / "fit", latents=store.directory, **shared)
    with pytest.raises(RunStopped, match=rf"no room for 1 x CPU {all_cpus:g} and 1 x CPU 1 within 0.5 s; cluster: "):
        fit_reward.fit_reward_model(encoded)
    fit["cpus_per_worker"] = 2 * all_cpus
    images = FitRun(run_dir=tmp_path / "encode", dataset={"path": str(dataset), "max_skipped": 0.2}, **shared)
    with pytest.raises(RunStopped, match=rf"no room for 1 x CPU {2 * all_cpus:g} within 0.5 s; cluster: "):
        fit_reward.fit_reward_model(images)


def test_a_finished_run_returns_its_result(finished) -> None:
    run, result = finished
    assert fit_reward.fit_reward_model(run.model_copy(update={"resume": True})) == result


def arguments(run_dir: Path, dataset: Path, pipeline: Path) -> list[str]:
    """A command line of the tiny fit."""
    return [
        *("--run_dir", str(run_dir), "--dataset.path", str(dataset), "--pipeline.path", str(pipeline)),
        *("--reward.taps", "1", "3", "--reward.num_heads", "4", "--fit.steps", "2", "--fit.batch_size", "4"),
    ]


@pytest.fixture
def small_config(tmp_path: Path) -> list[str]:
    (tmp_path / "empty.yaml").write_text("{}\n")
    return ["--config", str(tmp_path / "empty.yaml")]


def refused(main, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `main` ends with."""
    with pytest.raises(SystemExit) as ending:
        main(argv)
    assert ending.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    return lines[-1]


@pytest.mark.parametrize("main", [fit_reward.main, encode.main])
def test_missing_dataset(main, small_config, tmp_path, tiny_pipeline, capsys) -> None:
    argv = small_config + arguments(tmp_path / "run", tmp_path / "nowhere", tiny_pipeline)
    assert "nowhere does not exist" in refused(main, argv, capsys)
    assert not (tmp_path / "run").exists()


def test_missing_pipeline(small_config, tmp_path, dataset, capsys) -> None:
    argv = small_config + arguments(tmp_path / "run", dataset, tmp_path / "no-pipeline")
    argv += ["--dataset.max_skipped", "0.2"]
    assert "no-pipeline does not exist" in refused(fit_reward.main, argv, capsys)


def test_used_run_directory(small_config, finished, tiny_pipeline, dataset, capsys) -> None:
    argv = small_config + arguments(finished[0].run_dir, dataset, tiny_pipeline) + ["--dataset.max_skipped", "0.2"]
    assert "--resume" in refused(fit_reward.main, argv, capsys)


def test_taps_beyond_the_pipeline(small_config, tmp_path, dataset, tiny_pipeline, capsys) -> None:
    argv = small_config + arguments(tmp_path / "run", dataset, tiny_pipeline)
    argv += ["--reward.taps", "2", "4", "--dataset.max_skipped", "0.2"]
    assert "of its 4 blocks 1 to 3 can be tapped" in refused(fit_reward.main, argv, capsys)


def test_too_many_malformed_records(small_config, tmp_path, dataset, tiny_pipeline, capsys) -> None:
    argv = small_config + arguments(tmp_path / "run", dataset, tiny_pipeline)
    message = refused(fit_reward.main, argv, capsys)
    assert "1 of 30 records" in message
    assert "dataset.max_skipped = 0.01" in message


def test_too_many_unreadable_images(ray_local, small_config, tmp_path, tiny_pipeline, capsys) -> None:
    write_preferences(tmp_path / "data", train=10, test=2)
    for index in range(3):
        (tmp_path / "data" / "images" / f"train-{index}-dark.png").unlink()
    argv = small_config + arguments(tmp_path / "run", tmp_path / "data", tiny_pipeline)
    assert "3 of 12 records" in refused(encode.main, argv, capsys)
    listed = (tmp_path / "run" / SKIPPED_FILE).read_text().splitlines()
    assert [json.loads(line)["index"] for line in listed] == [0, 1, 2]
