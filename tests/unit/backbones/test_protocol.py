"""A family written to `base.Backbone` has all that the house reads of one."""

from pathlib import Path

import pytest
import yaml

from dina_rl.backbones import registry
from dina_rl.backbones.base import Backbone
from dina_rl.backbones.sd3 import SD3
from dina_rl.backbones.source import Options, Source
from jobs import align
from tests.tiny_clip import save_tiny_clip
from tests.tiny_run import tiny_run

DOCUMENTED = {name for name in (*Backbone.__annotations__, *vars(Backbone)) if not name.startswith("_")}


class Documented:
    """SD3 with what the Protocol names, and nothing else."""

    def __init__(self, source: Source, options: Options) -> None:
        self._family = SD3(source, options)

    def __getattr__(self, name: str) -> object:
        if name not in DOCUMENTED:
            raise AttributeError(f"{name} is read of a backbone, but base.Backbone does not name it")
        return getattr(self._family, name)


def test_the_protocol_is_all_that_an_alignment_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path, tiny_reward: Path
) -> None:
    """Rollouts, scorers of latents and of pictures, the learner, the golden metric and the exported adapter."""
    monkeypatch.setitem(registry.BACKBONES, "StableDiffusion3Pipeline", lambda: Documented)
    clip = str(save_tiny_clip(tmp_path / "clip"))
    run = tiny_run(
        tmp_path / "run",
        tiny_pipeline,
        tiny_reward,
        iterations=1,
        inline=True,
        golden={"guidances": [2.0]},
        rewards={"dina": {"path": str(tiny_reward)}, "pickscore": {"path": clip, "processor": clip}},
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    align.main(["--config", str(config)])
    assert (run.run_dir / "adapter").is_dir()
