"""`python -m jobs.score` as a person runs it, in this process: it starts none of its own."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dina_rl.scoring import open_scorer
from dina_rl.seeding import generator
from jobs.score import main
from tests.tiny_clip import save_tiny_clip
from tests.tiny_open_clip import save_hps, taught
from tests.tiny_reward import PROMPTS, latents


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two pictures, a latent, one file that is no picture, and a manifest of them all."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, size in (("a.png", 32), ("b.png", 48)):
        pixels = torch.randint(0, 256, (size, size, 3), generator=generator("picture", name), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    save_file({"latents": latents(1)[0]}, folder / "c.safetensors")
    (folder / "d.png").write_bytes(b"not a picture")
    names = ("a.png", "b.png", "c.safetensors", "d.png", "e.png")
    rows = [{"image": name, "prompt": PROMPTS[number % 2]} for number, name in enumerate(names)]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_table_of_a_directory(tiny_reward, pictures, capsys):
    prompt = "a small red circle on blue: really"
    main(["--scorer.path", str(tiny_reward), "--images", str(pictures), "--prompt", prompt])
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines] == [str(pictures / name) for name in ("a.png", "b.png", "c.safetensors")]
    assert all(line.endswith(prompt) for line in lines)
    assert f"skipped {pictures / 'd.png'}: " in shown.err
    assert f"skipped {pictures / 'list.jsonl'}: .jsonl is no ending of a picture" in shown.err
    assert "skipped 2 of 5 pictures" in shown.err


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_file_of_a_manifest_is_what_the_python_interface_says(tiny_reward, pictures, tmp_path, capsys, suffix):
    out = tmp_path / f"new/scores{suffix}"
    main(
        ["--scorer.path", str(tiny_reward), "--images", str(pictures / "list.jsonl"), "--out", str(out),
         "--batch-size", "2", "--scorer.levels", "0.2", "0.5", "--scorer.draws", "2"]
    )  # fmt: skip
    if suffix == ".csv":
        rows = list(csv.DictReader(out.open()))
    else:
        outcome = json.loads(out.read_text())
        rows = outcome["scores"]
        assert outcome["scorer"]["levels"] == [0.2, 0.5]
        assert (outcome["scorer"]["dtype"], outcome["scorer"]["max_sequence_length"]) == ("float32", 8)
        assert [each["image"] for each in outcome["skipped"]] == ["d.png", "e.png"]
    assert [(row["image"], row["prompt"]) for row in rows] == [
        ("a.png", PROMPTS[0]), ("b.png", PROMPTS[1]), ("c.safetensors", PROMPTS[0])
    ]  # fmt: skip
    scorer = open_scorer(tiny_reward).at((0.2, 0.5), draws=2)
    expected = scorer.score([pictures / row["image"] for row in rows], [row["prompt"] for row in rows])
    assert [float(row["score"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    listed = [json.loads(line) for line in out.with_suffix(".skipped.jsonl").read_text().splitlines()]
    assert [each["image"] for each in listed] == ["d.png", "e.png"]
    assert listed[1]["reason"] == "does not exist"
    assert f"3 scores in {out}" in capsys.readouterr().out


def test_a_clip_model_scores_pictures_too(pictures, tmp_path, capsys):
    clip = str(save_tiny_clip(tmp_path / "clip"))
    main(
        ["--scorer.kind", "pickscore", "--scorer.path", clip, "--scorer.processor", clip, "--prompt", PROMPTS[0],
         "--images", str(pictures)]
    )  # fmt: skip
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert "takes a pipeline" in shown.err  # the latent
    assert "skipped 3 of 5" in shown.err


def test_a_released_file_scores_pictures_too(pictures, tmp_path, capsys):
    clip, file = str(save_tiny_clip(tmp_path / "clip")), save_hps(taught(), tmp_path / "HPS_v2.1_compressed.pt")
    scorer = ["--scorer.kind", "hpsv2_1", "--scorer.path", str(file), "--scorer.processor", clip]
    main([*scorer, "--prompt", PROMPTS[0], "--images", str(pictures / "a.png"), str(pictures / "b.png")])
    scores = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 2
    assert all(-1 <= score <= 1 for score in scores)
    with pytest.raises(SystemExit) as end:
        main(["--scorer.kind", "hpsv2", *scorer[2:], "--prompt", "x", "--images", str(pictures), "--scorer.path", clip])
    assert end.value.code == 2
    assert f"error: {clip}/HPS_v2_compressed.pt does not exist" in capsys.readouterr().err


def test_latents_of_another_shape_are_skipped(tiny_reward, tmp_path, capsys):
    save_file({"x": torch.zeros(4, 8, 8)}, tmp_path / "channels.safetensors")
    save_file({"x": torch.zeros(16, 7, 8)}, tmp_path / "odd.safetensors")
    save_file({"x": torch.full((16, 8, 8), torch.nan)}, tmp_path / "nan.safetensors")
    save_file({"x": torch.zeros(16, 4, 8)}, tmp_path / "wide.safetensors")
    main(["--scorer.path", str(tiny_reward), "--images", str(tmp_path), "--prompt", "x"])
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    assert "[16, h, w], this is [4, 8, 8]" in shown.err
    assert "must be a multiple" in shown.err
    assert "its score is nan" in shown.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--images: name at least one picture"),
        (["--images", "a.png"], "a.png has no prompt"),
        (["--images", "a.png", "--prompt", "x", "--scorer.path", "/nowhere"], "reward model /nowhere does not exist"),
        (["--images", "a.png", "--prompt", "x", "--scorer.path", "TINY"], "none of the 1 pictures could be scored"),
        (["--images", "a.png", "--prompt", "x", "--out", "scores.txt"], "must end in .csv or .json"),
        (["--scorer.kind", "clip_score", "--scorer.levels", "0.2"], "only a dina scorer has that"),
        (["--image", "a.png"], "--image: unknown key; did you mean --images?"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(tiny_reward, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([str(tiny_reward) if word == "TINY" else word for word in argv])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
