"""Configuration: what the files say, what overrides change, and one clear line for every mistake."""

from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel

from dina_rl.checkpoint import open_run_dir
from dina_rl.cli import load
from dina_rl.config import (
    AlignRun,
    EvaluateRun,
    FitConfig,
    FitRun,
    LocalRun,
    RewardModelConfig,
    ScoreRun,
    ThurstoneConfig,
    TimestepConfig,
)
from dina_rl.reward.thurstone import comparison_variance

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = {"local": LocalRun, "reward": FitRun, "shapes_reward": FitRun}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_validates(file):
    model = next((m for name, m in MODELS.items() if file.stem.startswith(name)), AlignRun)
    load(model, ["--config", str(file)], program="test")


def test_overrides_reach_every_depth(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nlearner: {learning_rate: 1e-4}\n")
    run = load(
        AlignRun,
        ["--config", str(file), "--learner.lora.rank", "8", "--golden.guidances", "1", "2.5", "--run-dir=there",
         "--rewards.dina.levels", "0.3", "--resume", "--learner.no-gradient-checkpointing"],
        program="test",
    )  # fmt: skip
    assert (run.seed, run.learner.learning_rate, run.learner.lora.rank) == (3, 1e-4, 8)
    assert run.golden.guidances == (1.0, 2.5)
    assert run.rewards.dina.levels == (0.3,)
    assert run.run_dir == Path("there")
    assert run.resume
    assert not run.learner.gradient_checkpointing


def test_a_fit_is_never_compiled(capsys):
    run = load(LocalRun, ["--pipeline.compile"], program="test")
    assert run.align_run(Path("reward"), Path("run")).pipeline.compile
    assert not run.fit_run(Path("set"), Path("run")).pipeline.compile
    with pytest.raises(SystemExit) as ending:
        load(FitRun, ["--pipeline.compile"], program="test")
    assert ending.value.code == 2
    assert "pipeline.compile is of the alignment" in capsys.readouterr().err


def test_text_is_taken_literally():
    argv = ["--prompt", "a: b, [c", "--images", "1.png", "yes", "~", "--root", "7", "--scorer.path", "on", "--out=None"]
    run = load(ScoreRun, argv, program="test")
    assert (run.prompt, run.images, run.root) == ("a: b, [c", ("1.png", "yes", "~"), Path("7"))
    assert (run.scorer.path, run.out) == ("on", None)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learner.learning_rat", "1"], "--learner.learning_rat: unknown key; did you mean --learner.learning_rate?"),
        (["--iterations", "many"], "iterations: Input should be a valid integer"),
        (["--iterations", "0"], "iterations: Input should be greater than 0 (got 0)"),
        (["--rollout.window_steps", "10"], "rollout: SDE window [0, 10) must end before the last of the 10 steps"),
        (["--learner.micro_batch_size", "7"], "a minibatch of 576 samples does not split into"),
        (["--rollout.group_size", "1"], "Flow-GRPO needs 2 or more"),
        (["--rollout.window_range", "0", "10"], "window_range [0, 10) must hold window_steps (3) and end before"),
        (["--learner.keep", "3"], "learner.keep: Input should be a multiple of 2"),
        (["--learner.keep", "20"], "learner.keep 20 exceeds the 18 samples of rollout.group_size"),
        (["--learner.keep", "10"], "a minibatch of 320 samples does not split into"),
        (
            ["--algorithm", "refl", "--refl.stop_range", "5", "9", "--learner.keep", "2"],
            "learner.keep 2 chooses by advantage; refl weighs all samples alike and has none",
        ),
        (["--algorithm", "refl"], "refl.stop_range [30, 39] must ascend and lie within the 10 steps"),
        (
            ["--algorithm", "refl", "--refl.stop_range", "5", "9", "--learner.updates_per_iteration", "2"],
            "which hold for one update: learner.updates_per_iteration x learner.epochs is 2",
        ),
        (["--grpo.judge_after", "2"], "grpo.judge_after 2 must lie behind the 3 steps that hold the trained ones"),
        (["--grpo.judge_after", "10"], "and before the last of the 10"),
        (["--grpo.judge_after", "6", "--rewards.grid.weight", "1"], "judge_after needs rewards.dina and no other"),
        (
            ["--grpo.judge_after", "6", "--rewards.dina.draws", "2", "--rewards.dina.uncertainty_weight", "1"],
            "a state brings its own noise, and is scored once",
        ),
        (["--grpo.guard", "--rollout.dynamics", "cps"], "grpo.guard normalises ratios of an SDE's steps"),
        (["--grpo.guard", "--grpo.old_log_probs", "rollout"], "grpo.guard needs the old means"),
        (["--pipeline.compile", "--grpo.old_log_probs", "rollout"], "set grpo.old_log_probs to auto or recompute"),
        (["--pipeline.compile", "--learner.zero_stage", "3"], "use learner.zero_stage 2"),
        (["--watch.action", "raise_kl", "--grpo.kl_weight", "0"], "raise_kl multiplies grpo.kl_weight, which is 0"),
        (["--learner.guidance_in_loss"], "rollout.guidance_scale is 1"),
        (["--rewards.dina.uncertainty_weight", "1"], "needs a spread: draws is 1"),
        (["--learner.updates_per_iteration", "5"], "must divide rollout.prompts_per_iteration"),
        (["--rollout.dynamics", "ode"], "rollout.dynamics ode has no log-probability"),
        (
            ["--algorithm", "refl", "--rollout.dynamics", "cps", "--rollout.num-steps", "40"],
            "refl denoises along the ODE",
        ),
        (["--algorithm", "nft", "--rollout.group_size", "1"], "DiffusionNFT needs 2 or more"),
        (["--algorithm", "nft", "--rollout.dynamics", "cps"], "nft samples along the ODE; rollout.dynamics cps is for"),
        (["--algorithm", "nft", "--nft.levels", "11"], "nft.levels 11 exceeds the 10 noise levels"),
        (
            ["--algorithm", "nft", "--learner.guidance_in_loss", "--rollout.guidance_scale", "2"],
            "learner.guidance_in_loss: nft trains the conditional velocity alone",
        ),
        (["--algorithm", "nft", "--nft.old_most", "1"], "nft.old_most: Input should be less than 1"),
        (["--learner.zero_stage", "4"], "learner.zero_stage: Input should be less than or equal to 3"),
        (["--learner.zero_stage", "3", "--pipeline.dtype", "bfloat16"], "learner.zero_stage 3 rounds a bfloat16"),
        (["--workers.gpus_per_rank", "0.5"], "may put two of the 2 learner ranks on one GPU"),
        (["--golden.path", "somewhere"], "golden.scorer shapes uses none"),
        (["--golden.guidances", "0.5"], "golden.guidances.0: Input should be greater than or equal to 1"),
        (["--rewards.dina.levels", "1.0"], "rewards.dina.levels.0: Input should be less than 1"),
        (["--rewards.dina.levels", "["], "--rewards.dina.levels [: not valid YAML"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
        (["--iterations", "yes"], "iterations: Input should be a number, not a boolean"),
        (["--learner.learning-rate", "on"], "learner.learning_rate: Input should be a number, not a boolean"),
        (["--golden.guidances", "1", "true"], "golden.guidances: Input should be a number, not a boolean"),
        (["--rewards.dina.levels"], "rewards.dina.levels: Input should be a number, not a boolean"),
        (["--iterations"], "iterations: Input should be a number, not a boolean"),
        (["--learner.lora", "{rank: 2, rank: 3}"], "the key rank is written twice, in lines 1 and 1"),
        (["stray"], "unexpected word 'stray'"),
    ],
)
def test_mistakes_end_with_one_clear_line_and_exit_code_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        load(AlignRun, argv, program="test")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_unknown_keys_in_a_file_are_all_reported(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("stepz: 1\nlearner: {lr: 1}\n")
    with pytest.raises(SystemExit):
        load(AlignRun, ["--config", str(file)], program="test")
    assert capsys.readouterr().err == "error: learner.lr: unknown key\nerror: stepz: unknown key\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"seed: 1\nlearner: {epochs: 2}\nlearner:\n  lora: None\n",
            "key learner is written twice, in lines 2 and 3",
        ),
        (
            b"learner:\n  epochs: 1\n  lora: {rank: 1}\n  epochs: 2\n",
            "key epochs is written twice, in lines 2 and 4",
        ),
        (b"name: caf\xe9\n", "is not UTF-8 text (byte 9: invalid continuation byte); save it"),
        ("seed: 1\n".encode("utf-16"), "is not UTF-8 text (it looks like UTF-16); save it as UTF-8"),
    ],
)
def test_what_a_file_would_lose_or_garble_is_one_line_with_its_name(tmp_path, capsys, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        load(AlignRun, ["--config", str(file)], program="test")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert str(file) in error
    assert message in error
    assert error.count("\n") == 1


def test_merged_keys_and_a_byte_order_mark_are_no_mistakes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rewards:\n  dina: &a {weight: 2}\n  clip_score: {<<: *a, weight: 3, path: there}\n", "utf-8-sig")
    run = load(AlignRun, ["--config", str(file)], program="test")
    assert (run.rewards.dina.weight, run.rewards.clip_score.weight) == (2, 3)


def test_an_override_inside_what_the_file_gives_no_section_is_one_line(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("learner: 1\n")
    with pytest.raises(SystemExit):
        load(AlignRun, ["--config", str(file), "--learner.learning-rate", "1e-4"], program="test")
    expected = "error: --learner.learning_rate: learner is no section in the config file, but 1\n"
    assert capsys.readouterr().err == expected


def test_every_field_is_documented():
    def undocumented(model, prefix=""):
        from dina_rl.config.keys import section_of

        for name, field in model.model_fields.items():
            section = section_of(field.annotation)
            if section is None and not field.description:
                yield prefix + name
            elif section is not None:
                yield from undocumented(section, f"{prefix}{name}.")

    assert list(undocumented(LocalRun)) + list(undocumented(FitRun)) == []


def test_run_directories_are_never_silently_reused(tmp_path):
    run = AlignRun(run_dir=tmp_path / "run")
    directory = open_run_dir(run, run.run_dir, resume=False)
    assert yaml.safe_load((directory / "config.yaml").read_text())["learner"]["learning_rate"] == 3e-5
    assert "torch" in (directory / "versions.json").read_text()
    with pytest.raises(ValueError, match="add --resume"):
        open_run_dir(run, run.run_dir, resume=False)
    open_run_dir(run, run.run_dir, resume=True)
    with pytest.raises(ValueError, match="other values of: seed"):
        open_run_dir(run.model_copy(update={"seed": 1}), run.run_dir, resume=True)
    fewer = run.model_copy(update={"workers": run.workers.model_copy(update={"rollout_workers": 5})})
    open_run_dir(fewer, run.run_dir, resume=True)


def test_a_broken_configuration_of_a_run_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: [")
    with pytest.raises(ValueError, match="config.yaml is not valid YAML"):
        open_run_dir(AlignRun(), tmp_path, resume=True)


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        open_run_dir(AlignRun(), tmp_path, resume=False)


def test_the_reference_is_generated_from_the_schema():
    from dina_rl.reference import reference

    assert (CONFIGS / "REFERENCE.md").read_text() == reference(), "python -m dina_rl.reference > configs/REFERENCE.md"


@pytest.mark.parametrize(
    "row",
    [
        "| `rewards.pickscore.weight` | float | `1.0` | factor of the normalised score |",
        "| `sets.NAME.path` | str | required | directory of the set |",
        "| `training.split` | str | `test` | which part of it |",
        "| `images` | list of str | none | image files,",
    ],
)
def test_the_reference_shows_every_keys_own_default(row):
    from dina_rl.reference import reference

    assert f"\n{row}" in reference()


def test_the_reference_says_which_sections_are_off_and_how_to_switch_them():
    from dina_rl.reference import reference

    rows = {line.split("`")[1]: line for line in reference().splitlines() if "| section |" in line}
    assert "| off |" in rows["rewards.pickscore"]
    assert "`--rewards.pickscore {}`, or any of its keys, switches it on" in rows["rewards.pickscore"]
    assert "`--training.path PATH` switches it on" in rows["training"]
    assert "| on |" in rows["learner.lora"]
    assert "`--learner.lora None` switches it off" in rows["learner.lora"]
    on = load(AlignRun, ["--rewards.pickscore", "{}"], program="test").rewards
    off = load(AlignRun, ["--rewards.pickscore", "{}", "--rewards.dina", "None"], program="test").rewards
    assert (set(on.scorers), set(off.scorers)) == ({"dina", "pickscore"}, {"pickscore"})


@pytest.mark.parametrize("model", [LocalRun, FitRun, EvaluateRun, ScoreRun])
def test_a_section_given_in_part_keeps_the_defaults_of_its_other_keys(model):
    """So a key has one default, the one that reference and help show."""

    def sections(model):
        for field in model.model_fields.values():
            if isinstance(field.default, BaseModel):
                yield field.default
                yield from sections(type(field.default))

    found = list(sections(model))
    assert found
    assert [section for section in found if section != type(section)()] == []


def test_the_reference_names_files_that_its_programs_can_read():
    from dina_rl.reference import COMMANDS

    read = [command for command in COMMANDS if command.default_config is not None]
    assert [command.run for command in read] == [LocalRun, FitRun]
    for command in read:
        load(command.run, ["--config", str(CONFIGS.parent / command.default_config)], program="test")


def test_a_local_run_points_its_alignment_at_its_own_reward_and_latents(tmp_path):
    run = LocalRun.model_validate({"rewards": {"dina": {"draws": 2}}, "rollout": {"group_size": 36}})
    align = run.align_run(tmp_path / "fit" / "reward", tmp_path / "align")
    assert (align.rewards.dina.location, align.rewards.dina.draws) == (tmp_path / "fit" / "reward", 2)
    assert align.refl.pretraining_location == tmp_path / "fit" / "latents"
    without = LocalRun.model_validate({"rewards": {"dina": None, "clip_score": {}}, "rollout": {"group_size": 36}})
    assert set(without.align_run(tmp_path / "reward", tmp_path).rewards.scorers) == {"clip_score"}


def test_sections_by_names_of_the_users_own():
    argv = ["--sets.test.path", "a", "--sets.out_of_domain.path=b", "--sets.out_of_domain.kind", "hpdv2", "--runs", "x"]
    run = load(EvaluateRun, [*argv, "--scorers.mine.levels", "0.2", "0.5"], program="test")
    assert {name: (each.kind, each.path) for name, each in run.sets.items()} == {
        "test": ("hpdv3", "a"),
        "out_of_domain": ("hpdv2", "b"),
    }
    assert run.scorers["mine"].levels == (0.2, 0.5)
    assert run.runs == ("x",)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sets.test.pth", "a"], "--sets.test.pth: unknown key; did you mean --sets.NAME.path?"),
        (["--sets.test.path.more", "a"], "--sets.test.path.more: unknown key"),
        (["--sets.test.kind", "hpdv3"], "sets.test.path: Field required"),
        (["--sets", "a"], "sets: Input should be a valid dictionary (got 'a')"),
        (["--training.path", "a", "--training.max_records", "3"], "looks at the whole training set"),
        (["--paper", "table9"], "paper: Input should be 'table1'"),
    ],
)
def test_mistakes_in_named_sections_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as ending:
        load(EvaluateRun, argv, program="test")
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


REWARD_PRESET = CONFIGS / "reward_sd35m.yaml"


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("--reward.lora None", {"lora": None}),
        (
            "--reward.timestep.distribution fixed --reward.timestep.fixed 0.2",
            {"timestep": TimestepConfig(distribution="fixed", fixed=0.2)},
        ),
        ("--reward.timestep.distribution logit_normal", {"timestep": TimestepConfig(distribution="logit_normal")}),
        (
            "--reward.thurstone.variance fixed --reward.thurstone.sigma_u 0.5",
            {"thurstone": ThurstoneConfig(variance="fixed", sigma_u=0.5)},
        ),
        ("--reward.taps 1 2", {"taps": (1, 2)}),
        ("--reward.taps 12", {"taps": (12,)}),
    ],
)
def test_an_ablation_of_the_reward_is_one_line(override, changed):
    preset = load(FitRun, ["--config", str(REWARD_PRESET)], program="test")
    run = load(FitRun, ["--config", str(REWARD_PRESET), *override.split()], program="test")
    assert run == preset.model_copy(update={"reward": preset.reward.model_copy(update=changed)})


def test_the_papers_reward_preset_says_what_the_defaults_are():
    """Table 7 and section 5.1 are the defaults of the schema too; the preset adds the machine."""
    preset = load(FitRun, ["--config", str(REWARD_PRESET)], program="test")
    assert preset.reward == RewardModelConfig()
    assert (preset.reward.lora.rank, preset.reward.lora.alpha) == (64, 128)
    for name in ("steps", "batch_size", "learning_rate", "weight_decay", "ema_decay", "warmup_steps", "decay_start"):
        assert getattr(preset.fit, name) == getattr(FitConfig(), name), name


def test_the_official_reward_preset_has_the_codes_variance():
    preset = load(FitRun, ["--config", str(CONFIGS / "reward_sd35m_official_code.yaml")], program="test")
    t = torch.tensor([0.0, 0.3, 1.0])
    torch.testing.assert_close(comparison_variance(t, preset.reward.thurstone), 2 * t**2 + 0.05)
    assert (preset.fit.batch_size, preset.fit.ema_decay, preset.pipeline.max_sequence_length) == (32, 0, 128)


def test_held_out_sets_are_named_on_the_command_line(capsys):
    for words in (["{ood: ~/stores/ood, other: there}"], ["ood", "~/stores/ood", "other", "there"]):
        run = load(FitRun, ["--fit.held_out", *words], program="test")
        assert run.fit.held_out == {"ood": "~/stores/ood", "other": "there"}
    with pytest.raises(SystemExit):
        load(FitRun, ["--fit.held_out", "ood", "~/stores/ood", "other"], program="test")
    assert "fit.held_out: Input should be a valid dictionary" in capsys.readouterr().err
    for name in ("test", "a/b"):
        with pytest.raises(SystemExit):
            load(FitRun, ["--fit.held_out", f"{{{name}: somewhere}}"], program="test")
        assert f"held_out: {name!r} must be letters, digits" in capsys.readouterr().err
