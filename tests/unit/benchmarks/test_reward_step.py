"""The benchmarks' commands run, and the reward step's two loops do the same work."""

from pathlib import Path

import pytest
import torch

from benchmarks import forward, reward_step
from dina_rl.backbones.registry import open_backbone
from dina_rl.config import FitConfig, PipelineConfig
from dina_rl.reward.fit import RewardFit, fit, training_noise
from tests.tiny_reward import as_step, pair_batch, stirred_model

CONFIG = FitConfig(steps=4, batch_size=6, max_grad_norm=1e9)


def test_two_forwards_have_the_gradient_of_one(tiny_pipeline: Path) -> None:
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8)
    batch = pair_batch(6, 0)
    ours = RewardFit(stirred_model(backbone), CONFIG)
    step = as_step(batch)
    report = next(fit(ours, [step], backbone.load_text_encoder(), seed=0))
    plain = stirred_model(backbone)
    t, noise = training_noise(step, plain.config.timestep, seed=0, step=0)
    config = PipelineConfig(path=str(tiny_pipeline), max_sequence_length=8)
    prompt = reward_step.BatchTextEncoder(config)(batch.prompts)
    loss = reward_step.plain_loss(plain, batch, t, noise, prompt)
    loss.backward()
    assert loss.item() == pytest.approx(report.loss, rel=1e-5)
    assert len(ours.parameters) > 10
    for name, parameter in ours.parameters.items():
        torch.testing.assert_close(plain.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_command_prints_both_speeds_and_their_ratio(tiny_pipeline: Path, capsys: pytest.CaptureFixture) -> None:
    reward_step.main(
        [
            "--groups",
            "1",
            "--group-images",
            "3",
            "--group-pairs",
            "3",
            "--steps",
            "1",
            "--repeats",
            "2",
            "--threads",
            "1",
            "--pipeline.path",
            str(tiny_pipeline),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    speeds = {
        name.strip(): [float(value) for value in values]
        for name, *values in (line.rsplit(maxsplit=3) for line in lines[2:])
    }
    kinds = {"ours, new prompts", "ours, prompts seen before", "two forwards", "two forwards, embeddings given"}
    kinds |= {"ours in groups, new prompts", "ours in groups, prompts seen before"}
    assert {f"{kind}, pairs/s" for kind in kinds} <= set(speeds)
    assert {tuple(name.split(" / ")) for name in speeds if "pairs/s" not in name} == set(reward_step.RATIOS)
    assert all(len(values) == 3 and 0 < values[0] <= values[1] <= values[2] for values in speeds.values())


def test_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(SystemExit) as ending:
        reward_step.main(["--pipeline.path", str(tmp_path)])
    assert ending.value.code == 2
    assert "another family" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of torch, as it loads its compiler
def test_the_forwards_take_turns(tiny_pipeline: Path, capsys: pytest.CaptureFixture) -> None:
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
        forward.main(["--pipeline", str(tiny_pipeline), "--batch", "2", "--repeats", "2"])
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [name.strip() for name, *_ in rows] == [
        "adapter unmerged, ms",
        "merged, ms",
        "merged and compiled, ms",
        "adapter unmerged / merged",
        "adapter unmerged / merged and compiled",
    ]
    assert all(0 < float(low) <= float(middle) <= float(high) for _, low, middle, high in rows)


def test_a_pipeline_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ending:
        forward.main(["--pipeline", "/nowhere/sd3"])
    assert ending.value.code == 2
    assert "/nowhere/sd3" in capsys.readouterr().err
