"""Encode a preference set to latents: `python -m jobs.encode --config configs/...yaml`, by Ray Data or with --inline.

What to encode is decided first, from records and image headers (`dina_rl/data/plan.py`); then the VAE encodes shard
after shard of images. What is on disk already is not done again, so a killed encode continues with --resume. At the end
stands what became of every pair. With `dataset.prompt_embeddings`, also switched on later with --resume, the pairs'
prompts follow, in the same way. On a cluster, `run_dir` and the dataset must lie on storage that all nodes share.
"""

import sys
from collections.abc import Sequence

from dina_rl.backbones.base import Backbone
from dina_rl.cli import fail, interruptible, load
from dina_rl.config import FitRun
from dina_rl.data.encode import EncodeWork, EncodingHere, check_inputs, encode_dataset, encode_inputs
from dina_rl.run_directory import run_directory
from dina_rl.runtime import configure_process, open_pipeline
from jobs.submitted import check_results

DEFAULT_CONFIG = "configs/shapes_reward.yaml"
UNREAD = ("latents", "reward", "fit")
"""What the fit alone goes by; of `fit` only the numbers and sizes of Ray's workers are used here."""


def open_work(run: FitRun, backbone: Backbone) -> EncodeWork:
    """This process with `inline`, else Ray's."""
    if run.inline:
        configure_process(run.fit.threads_per_worker * run.fit.num_workers)
        return EncodingHere(backbone)
    from jobs.cluster import quiet_ray_data, start_ray
    from jobs.encoding import RayEncoding

    start_ray()
    quiet_ray_data()
    return RayEncoding()


def main(argv: Sequence[str]) -> None:
    run = load(FitRun, argv, program="python -m jobs.encode", default_config=DEFAULT_CONFIG)
    check_results(run_dir=run.run_dir)
    try:
        backbone = open_pipeline(run.pipeline)
        run = check_inputs(run, backbone)
        inputs = encode_inputs(run)
        with (
            interruptible(run.run_dir),
            run_directory(run, run.run_dir, resume=run.resume, unread=UNREAD, inputs=inputs) as run_dir,
        ):
            store = encode_dataset(run, run_dir, backbone, open_work(run, backbone))
    except ValueError as error:
        fail(str(error))
    print(f"{store.info.num_rows} images in {store.directory}; continue with jobs.fit_reward --resume")


if __name__ == "__main__":
    main(sys.argv[1:])
