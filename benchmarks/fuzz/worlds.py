"""Whole inputs of every kind, small, and made by the commands themselves where these make them.

Each function makes its own part below a directory, and nothing where that is there already.
"""

import csv
import io
import json
import random
from collections import OrderedDict
from pathlib import Path

import pyarrow
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from benchmarks.fuzz.hostile import archived_code, bomb_archive, hostile_pictures, pickled_code, write_bomb
from benchmarks.untrained import save_untrained
from dina_rl.config import LoRAConfig, PipelineConfig, PolicyLoRAConfig, RewardModelConfig
from dina_rl.shapes.pipeline import build_pipeline
from jobs import align, encode, fit_reward

PIPELINE, REWARD, SETS, PARQUET, PICTURES, PROMPTS = "pipeline", "reward", "sets", "parquet", "pictures", "prompts"
ENCODED, FIT, ALIGNMENT, ADAPTERS, PUBLISHED = "encoded", "fit", "alignment", "adapters", "published"
REWARD_PRESET = Path(__file__).resolve().parents[2] / "configs" / "shapes_reward.yaml"
TAPS = (
    "--config",
    str(REWARD_PRESET),
    "--reward.taps",
    "1",
    "2",
    "--reward.num-heads",
    "4",
    "--reward.lora.rank",
    "4",
    "--reward.lora.alpha",
    "8",
)
WORDS = ("a red circle", "a blue ring", "a green cross", "a small black ring on cyan")
FORMATS = ("png", "jpg", "webp", "gif", "tif", "bmp", "ppm", "jp2", "avif")
BOMB, BOMB_MIB = "bomb", 640


def pipeline(world: Path) -> None:
    """The miniature SD3.5."""
    if not (world / PIPELINE).exists():
        build_pipeline(0).save_pretrained(world / PIPELINE)


def reward(world: Path) -> None:
    if not (world / REWARD).exists():
        config = RewardModelConfig(taps=(1, 2), num_heads=4, lora=LoRAConfig(rank=4, alpha=8))
        save_untrained(world / REWARD, PipelineConfig(path=str(world / PIPELINE)), config)


def picture(seed: int, kind: str, side: int = 32) -> bytes:
    """Noise in a format."""
    made = io.BytesIO()
    pixels = Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))
    names = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    pixels.save(made, names.get(kind, kind.upper()))
    return made.getvalue()


def sets(world: Path) -> None:
    """The published JSON sets, each with train and test, 4 pairs and 2, over the same pictures."""
    for kind in ("hpdv3", "hpdv2", "imagereward"):
        root = world / SETS / kind
        if root.exists():
            continue
        (root / "images").mkdir(parents=True)
        for number in range(12):
            (root / "images" / f"{number}.png").write_bytes(picture(number, "png"))
        for split, numbers in (("train", range(4)), ("test", range(4, 6))):
            records = [
                _record(kind, number, f"images/{2 * number}.png", f"images/{2 * number + 1}.png") for number in numbers
            ]
            (root / f"{split}.json").write_text(json.dumps(records))


def _record(kind: str, number: int, one: str, other: str) -> dict[str, object]:
    prompt = {"prompt": WORDS[number % len(WORDS)]}
    if kind == "hpdv2":
        return {**prompt, "file_path": [one, other], "human_preference": [1, 0]}
    if kind == "imagereward":
        return {**prompt, "id": str(number), "generations": [one, other], "ranking": [1, 2]}
    votes = {"choice_dist": [9, 1], "confidence": 0.9, "model1": "a", "model2": "b", "probability": 0.8}
    return {**prompt, "path1": one, "path2": other, **votes}


def parquet_sets(world: Path) -> None:
    """Pick-a-Pic and GenAI-Bench, 4 rows a split."""
    root = world / PARQUET
    if root.exists():
        return
    root.mkdir(parents=True)
    images = [picture(number, "jpg") for number in range(8)]
    cells = [{"bytes": each, "path": f"{number}.jpg"} for number, each in enumerate(images)]
    prompts = [WORDS[number % len(WORDS)] for number in range(4)]
    pick = {
        "caption": prompts,
        "jpg_0": images[:4],
        "jpg_1": images[4:],
        "label_0": [1.0, 0.0, 0.5, 1.0],
        "label_1": [0.0, 1.0, 0.5, 0.0],
        "has_label": [True] * 4,
        "model_0": ["a"] * 4,
        "model_1": ["b"] * 4,
    }
    bench = {
        "prompt": prompts,
        "left_model": ["a"] * 4,
        "left_image": cells[:4],
        "right_model": ["b"] * 4,
        "right_image": cells[4:],
        "vote_type": ["leftvote", "rightvote", "tievote", "bothbad_vote"],
    }
    for kind, columns in (("pickapic", pick), ("genai_bench", bench)):
        (root / kind).mkdir()
        for split in ("train", "test"):
            parquet.write_table(pyarrow.table(columns), root / kind / f"{split}-00000-of-00001.parquet")


def bomb(world: Path) -> None:
    """Parquet files of zeros: a set with one picture, and a shard with one latent."""
    root = world / BOMB
    if root.exists():
        return
    root.mkdir()
    labels: dict[str, list[object]] = {
        "caption": ["a"],
        "jpg_1": [picture(0, "jpg")],
        "label_0": [1.0],
        "label_1": [0.0],
    }
    write_bomb(root / "jpg_0.parquet", "jpg_0", BOMB_MIB, labels)
    write_bomb(root / "latent.parquet", "latent", BOMB_MIB, {"problem": [None]})


def pictures(world: Path) -> None:
    """One of every format, and what was made to do harm."""
    root = world / PICTURES
    if root.exists():
        return
    (root / "hostile").mkdir(parents=True)
    for number, kind in enumerate(FORMATS):
        (root / f"{kind}.{kind}").write_bytes(picture(number, kind))
    for name, content in hostile_pictures().items():
        (root / "hostile" / name).write_bytes(content)


def prompt_files(world: Path) -> None:
    """One of every form."""
    root = world / PROMPTS
    if root.exists():
        return
    root.mkdir(parents=True)
    lines = [f"{word} {number}" for number in range(4) for word in WORDS]
    (root / "train.txt").write_text("\n".join(lines))
    (root / "train.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    (root / "train.json").write_text(json.dumps(lines))
    with (root / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "note"], *([line, "a, b"] for line in lines)])


def encoded(world: Path) -> None:
    """What `jobs.encode` leaves, prompt embeddings too."""
    if (world / ENCODED).exists():
        return
    places = ["--dataset.path", str(world / SETS / "hpdv3"), "--pipeline.path", str(world / PIPELINE)]
    encode.main(["--inline", "--run-dir", str(world / ENCODED), *places, *TAPS, "--dataset.prompt-embeddings"])


def fit_words(world: Path, latents: Path) -> list[str]:
    places = ["--latents", str(latents), "--pipeline.path", str(world / PIPELINE)]
    return ["--inline", *places, *TAPS, "--fit.steps", "2", "--fit.batch-size", "2", "--fit.checkpoint-every", "1"]


def fit(world: Path) -> None:
    """What `jobs.fit_reward` leaves."""
    if not (world / FIT).exists():
        fit_reward.main(["--run-dir", str(world / FIT), *fit_words(world, world / ENCODED / "latents")])


def align_words(world: Path) -> list[str]:
    places = ["--pipeline.path", str(world / PIPELINE), "--rewards.dina.path", str(world / REWARD)]
    steps = "--rollout.num-steps 4 --rollout.window-steps 2 --rollout.prompts-per-iteration 2 --rollout.group-size 2 "
    steps += "--rollout.groups-per-call 2 --learner.micro-batch-size 2"
    golden = "--golden.every 1 --golden.dev-samples 2 --golden.test-samples 2 --golden.batch-size 2"
    guidances = "--golden.guidances 1.0 --golden.aligned-guidances 1.0"
    short = "--iterations 2 --checkpoint-every 1 --learner.updates-per-iteration 1 --learner.lora.rank 2"
    settings = f"{steps} {golden} {guidances} {short} --workers.learner-ranks 1".split()
    return ["--config", str(PRESET), "--inline", *places, *settings]


PRESET = Path(__file__).resolve().parents[2] / "configs" / "shapes_flow_grpo_fast.yaml"


def alignment(world: Path) -> None:
    """What `jobs.align` leaves."""
    if not (world / ALIGNMENT).exists():
        align.main(["--run-dir", str(world / ALIGNMENT), *align_words(world)])


def adapters(world: Path) -> None:
    """An adapter as diffusers writes it, of rank 2."""
    root = world / ADAPTERS
    if root.exists():
        return
    from dina_rl.backbones.trained import make_trainable, trained_parameters
    from dina_rl.runtime import open_pipeline

    backbone = open_pipeline(PipelineConfig(path=str(world / PIPELINE)))
    module, lora = backbone.empty_transformer(), PolicyLoRAConfig(rank=2, alpha=4)
    make_trainable(module, lora, targets=backbone.lora_targets, seed=0)
    state = {name: torch.zeros(value.shape) for name, value in trained_parameters(module).items()}
    backbone.save_adapter(root, state, rank=2, alpha=4, targets=backbone.lora_targets)


def published(world: Path) -> None:
    """Weights as torch.save and safetensors keep them, pickled code under all names, and a bomb."""
    root = world / PUBLISHED
    if root.exists():
        return
    root.mkdir(parents=True)
    state = {"layers.0.weight": torch.zeros(4, 3), "layers.0.bias": torch.zeros(4)}
    save_file(state, root / "state.safetensors")
    torch.save(OrderedDict(state), root / "state.pth")
    torch.save({"state_dict": state}, root / "nested.pt")
    torch.save(state, root / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(3, 4), root / "module.pth")
    for name in ("code.pt", "code.safetensors", "code.bin"):
        (root / name).write_bytes(pickled_code())
    (root / "archive.pth").write_bytes(archived_code())
    (root / "bomb.pth").write_bytes(bomb_archive())
