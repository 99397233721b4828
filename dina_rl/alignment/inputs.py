"""What an alignment run is made from."""

from dataclasses import replace

from dina_rl.alignment.prompts import Prompts
from dina_rl.backbones.adapter_files import adapter_file
from dina_rl.checkpoint import Input
from dina_rl.config import AlignRun
from dina_rl.fingerprint import file_parts, pipeline_parts, repository_parts, store_parts, text_parts
from dina_rl.reward.home import find_home
from dina_rl.reward.published import local_directory
from dina_rl.scorers.registry import image_scorer_inputs


def align_inputs(run: AlignRun, prompts: Prompts) -> list[Input]:
    """Inputs by the keys of the settings that name them, once they were found to be there.

    Prompts count as they were read, whatever their files look like.
    """
    inputs = [Input(key="pipeline.path", path=run.pipeline.path, parts=pipeline_parts(*run.pipeline.place))]
    for split, read in (("train", prompts.train), ("dev", prompts.dev), ("test", prompts.test)):
        inputs.append(Input(key=f"prompts.{split}", path=dict(run.prompts)[split], parts=text_parts(read)))
    lora = run.learner.lora
    if lora is not None and lora.init is not None:
        inputs.append(Input(key="learner.lora.init", path=str(lora.init), parts=file_parts(adapter_file(lora.init))))
    dina = run.rewards.dina
    if dina is not None:
        weights = repository_parts(str(local_directory(dina.location)), "config.json")
        inputs.append(Input(key="rewards.dina.path", path=dina.path, parts=weights))
        home = find_home(dina, run.pipeline).pipeline
        inputs.append(Input(key="rewards.dina.pipeline", path=home.path, parts=pipeline_parts(*home.place)))
    if run.algorithm == "refl" and run.refl.pretraining_weight:
        store = run.refl.pretraining_location
        inputs.append(Input(key="refl.pretraining_latents", path=str(store), parts=store_parts(store)))
    sections = {f"rewards.{each.name}": each for each in run.rewards.of_images}
    if run.golden.of_images is not None:
        sections["golden"] = run.golden.of_images
    if run.probe_model is not None:
        sections["probes"] = run.probe_model
    for section, scorer in sections.items():
        inputs += [replace(each, key=f"{section}.{each.key}") for each in image_scorer_inputs(scorer)]
    return inputs
