"""The kinds of input: what is whole, how it is damaged, and who reads it, as the commands do.

Where a command as a whole would take seconds of a processor (models are loaded, pictures drawn), its readers are
called under the same handling of errors instead.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz import kept_readers, readers, worlds
from benchmarks.fuzz.mutations import Damage

Task = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of input.

    Args:
        whole: makes what is damaged below a directory; it may use what others have made there.
        damaged: a damaged copy in a trial's root, and what reads it.
        options: whether the input is the user's own options, which may lead anywhere.
    """

    whole: tuple[Callable[[Path], object], ...]
    damaged: Callable[[random.Random, Damage, Path, Path], Task]
    options: bool = False


KINDS: Mapping[str, Kind] = {
    "configs": Kind(whole=(worlds.pipeline, worlds.reward), damaged=readers.configs, options=True),
    "options": Kind(whole=(worlds.pipeline, worlds.reward), damaged=readers.options, options=True),
    "sets": Kind(whole=(worlds.pipeline, worlds.sets), damaged=readers.sets),
    "parquet": Kind(whole=(worlds.pipeline, worlds.parquet_sets, worlds.bomb), damaged=readers.parquet_sets),
    "images": Kind(whole=(worlds.pipeline, worlds.sets, worlds.pictures), damaged=readers.images),
    "manifests": Kind(whole=(worlds.sets, worlds.pictures), damaged=readers.manifests),
    "prompts": Kind(whole=(worlds.prompt_files,), damaged=readers.prompts),
    "latents": Kind(whole=(worlds.pipeline, worlds.sets, worlds.encoded, worlds.bomb), damaged=kept_readers.latents),
    "rewards": Kind(whole=(worlds.pipeline, worlds.reward), damaged=kept_readers.rewards),
    "adapters": Kind(whole=(worlds.pipeline, worlds.adapters), damaged=kept_readers.adapters),
    "pipelines": Kind(whole=(worlds.pipeline,), damaged=kept_readers.pipelines),
    "published": Kind(whole=(worlds.published,), damaged=kept_readers.published),
    "encoded runs": Kind(whole=(worlds.pipeline, worlds.sets, worlds.encoded), damaged=kept_readers.encoded_runs),
    "fits": Kind(whole=(worlds.pipeline, worlds.sets, worlds.encoded, worlds.fit), damaged=kept_readers.fits),
    "alignments": Kind(whole=(worlds.pipeline, worlds.reward, worlds.alignment), damaged=kept_readers.alignments),
    "requests": Kind(whole=(worlds.pipeline, worlds.reward), damaged=kept_readers.requests),
}
