"""TensorBoard's page of an alignment run: by its HTTP API, and in a real browser where there is one."""

import io
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard import program

from dina_rl.alignment.advantage import Advantages
from dina_rl.alignment.measurement import Measurement
from dina_rl.alignment.record import Recorder
from dina_rl.config import AlignRun
from dina_rl.types import PolicyWeights

ITERATIONS = 4
LONG = "a photograph of <lora:style> *two* red | circles " + 30 * "and another one " + "at the end"
PROMPTS = ("a small red circle", LONG, "\u4e00\u53ea\u732b", "a blue square")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WEIGHTS = PolicyWeights(version=0, tensors={"weight": torch.zeros(1)})
METRICS = {"ratio_mean": 1.0, "clip_low": 0.1, "clip_high": 0.2, "learning_rate": 1e-3, "updates": 2}


def measurement(scale: float, golden: float) -> Measurement:
    return Measurement(
        guidance_scale=scale,
        golden=(golden, golden + 0.1),
        parts={"shape": golden},
        proxy=(-golden, -golden + 0.3),
        proxy_parts={"dina": -golden},
        images=torch.full((len(PROMPTS), 3, 32, 32), 128, dtype=torch.uint8),
        prompts=PROMPTS,
    )


def iterate(recorder: Recorder, iterations: range) -> None:
    for number in recorder.progress(iterations):
        for stage in ("rollout", "update", "publish"):
            with recorder.timed(stage):
                pass
        scores = torch.tensor([[0.1, 0.2], [0.3, 0.5]])
        advantages = Advantages(values=scores, kept=torch.tensor([True, True]), failed=0, constant=0)
        recorder.iteration(number, {"dina": scores}, advantages, METRICS, beside={})
        recorder.measured(number + 1, measurement(1.0, 0.5 + 0.05 * number), WEIGHTS)
        recorder.settle()
        recorder.checkpoint(number + 1, {"weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """What a run of a few iterations, interrupted once, leaves to look at."""
    directory = tmp_path_factory.mktemp("looked_at") / "run"
    run = AlignRun.model_validate({"iterations": ITERATIONS, "run_dir": directory})
    first = Recorder(run, directory, lambda directory, tensors: directory)
    first.restore()
    first.base([measurement(1.0, 0.4), measurement(4.5, 0.6)])
    first.measured(0, measurement(1.0, 0.4), WEIGHTS)
    iterate(first, range(2))
    first.settle()
    resumed = Recorder(run, directory, lambda directory, tensors: directory)
    assert resumed.restore()[0] == 2
    iterate(resumed, range(2, ITERATIONS))
    resumed.aligned([measurement(1.0, 0.7)])
    resumed.export(WEIGHTS)
    return directory


@pytest.fixture(scope="module")
def server(run_dir) -> str:
    """TensorBoard itself on that run, once it has read it."""
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", str(run_dir), "--port", "0", "--load_fast", "false"])
    url = board.launch()
    deadline = time.monotonic() + 30
    while "result/text_summary" not in ask(url, "text/tags").get("tensorboard", []):
        assert time.monotonic() < deadline, "TensorBoard does not read the run"
        time.sleep(0.1)
    return url


def ask(url: str, path: str) -> Any:
    with urlopen(f"{url}data/plugin/{path}", timeout=30) as answer:
        return json.load(answer)


def text_of(url: str, tag: str) -> str:
    """The newest text, as HTML."""
    return ask(url, f"text/text?run=tensorboard&tag={quote(tag + '/text_summary')}")[-1]["text"]


def test_golden_and_proxy_are_runs_of_their_own(server):
    """TensorBoard colours by run: the same tag in two of them is one chart with two colours."""
    tags = ask(server, "scalars/tags")
    assert set(tags) == {"tensorboard", "tensorboard/golden", "tensorboard/proxy"}
    assert set(tags["tensorboard/golden"]) == {"gain", "golden/dev", "golden_parts/shape"}
    assert set(tags["tensorboard/proxy"]) == {"gain", "proxy/dev", "proxy_parts/dina"}
    assert {"train/reward_mean", "update/ratio_mean", "learner/learning_rate"} <= set(tags["tensorboard"])
    for curve in ("golden", "proxy"):
        points = ask(server, f"scalars/scalars?run=tensorboard/{curve}&tag=gain")
        assert [step for _, step, _ in points] == list(range(ITERATIONS + 1))


def test_custom_scalars_have_one_tag_a_chart_but_for_the_two_curves(server):
    (category,) = ask(server, "custom_scalars/layout")["category"]
    charts = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    assert charts.pop("proxy and golden: gain over the base, in its standard deviations") == ["gain$"]
    assert {"mean policy ratio", "share clipped below", "share clipped above"} <= set(charts)
    runs = [f"tensorboard{curve}" for curve in ("", "/golden", "/proxy")]
    for title in ("golden (held out)", "proxy (optimised)", "reward of the rollouts", "mean policy ratio"):
        (tag,) = charts[title]
        found = [ask(server, f"custom_scalars/scalars?run={run}&tag={quote(tag)}")["tag_to_events"] for run in runs]
        assert sum(len(matches) for matches in found) == 1, title


def test_prompts_config_and_result_are_told_as_text(server):
    config = text_of(server, "config")
    assert "<code>" in config
    assert f"iterations: {ITERATIONS}" in config
    prompts = " ".join(text_of(server, "prompts/dev").split())
    assert "1 a small red circle" in prompts
    assert "&lt;lora:style&gt; *two* red | circles" in prompts, "as they stand"
    assert "at the end 3 \u4e00\u53ea\u732b" in prompts, "whole"
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", text_of(server, "result"))
    assert cells[:5] == ["guidance", "golden, base", "golden, aligned", "proxy, base", "proxy, aligned"]
    assert cells[5:] == ["1", "0.450", "0.750", "-0.250", "-0.550", "4.5", "0.650", "", "-0.450", ""]


def test_pictures_have_their_prompts_below(server):
    tags = ask(server, "images/tags")["tensorboard"]
    assert {"samples/dev", "samples_test/base_guidance_4.5", "samples_test/aligned_guidance_1"} <= set(tags)
    newest = ask(server, "images/images?run=tensorboard&tag=samples/dev&sample=0")[-1]
    with urlopen(f"{server}data/plugin/images/individualImage?{newest['query']}", timeout=30) as answer:
        picture = np.asarray(Image.open(io.BytesIO(answer.read())).convert("L"))
    assert picture.shape[1] == 4 * (96 + 4)
    below = picture[2 + 96 + 2 :]
    ink = [(below[:, start : start + 100] < 100).sum() for start in range(0, 400, 100)]
    assert min(ink) > 0, "something below each"
    assert max(ink) == ink[1], "most below the longest"


def gain_card(page: str, profile: Path) -> str:
    """What a browser makes of the chart called gain. A crowded machine may cut it short before it has drawn."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    options += ["--virtual-time-budget=30000", "--window-size=1600,1400", "--dump-dom"]
    for _ in range(3):
        dom = subprocess.run([BROWSER, *options, page], capture_output=True, text=True, timeout=90).stdout
        cards = [part for part in dom.split("<scalar-card ")[1:] if 'title="gain"' in part]
        if cards and "background-color" in cards[0]:  # the legend comes last
            return cards[0]
    pytest.fail(f"the browser draws no chart: {dom[:2000]}")


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
def test_a_browser_shows_the_two_curves_in_two_colours(server, tmp_path):
    card = gain_card(f"{server}?forceSVG=true#timeseries", tmp_path)  # as SVG, curves are elements of the document
    curves = re.findall(r"<path[^>]*stroke: (rgb\([^)]*\)); opacity: 1;", card)
    legend = re.findall(r"background-color: (rgb\([^)]*\));.*?(tensorboard/\w+)", card, re.DOTALL)
    assert {run for _, run in legend} == {"tensorboard/golden", "tensorboard/proxy"}
    assert sorted(curves) == sorted(colour for colour, _ in legend)
    assert len(set(curves)) == 2
