"""Compiled blocks: the same numbers to rounding, one graph for every batch size and for weights that change."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dina_rl.backbones.compiling import compile_blocks, repeated_blocks
from dina_rl.backbones.registry import open_backbone
from dina_rl.runtime import device
from dina_rl.seeding import normal
from dina_rl.types import PromptEmbeds


@pytest.mark.parametrize(
    ("pipeline", "kinds"),
    [
        ("tiny_pipeline", {"JointTransformerBlock"}),
        ("tiny_flux", {"FluxTransformerBlock", "FluxSingleTransformerBlock"}),
        ("tiny_z_image", {"ZImageTransformerBlock"}),
    ],
)
def test_the_repeated_blocks_of_every_family_are_found(
    pipeline: str, kinds: set[str], request: pytest.FixtureRequest
) -> None:
    transformer = open_backbone(request.getfixturevalue(pipeline), max_sequence_length=8).empty_transformer()
    found = repeated_blocks(transformer)
    assert {type(block).__name__ for block in found} == kinds
    assert len(found) == sum(type(each).__name__ in kinds for each in transformer.modules())


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",  # traced as for inductor, whose own compiler takes half a minute at its first start
        pytest.param("inductor", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, as it compiles
def test_compiled_blocks_compute_the_same_in_one_graph(
    backend: str, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    place = device() if backend == "inductor" else "cpu"
    backbone = open_backbone(tiny_pipeline, max_sequence_length=8, device=place)
    eager, compiled = (backbone.load_transformer() for _ in range(2))
    for module in (eager, compiled):  # the last block alone: it has the least to compile
        module.transformer_blocks = module.transformer_blocks[-1:]
    compile_blocks(compiled)
    tokens, width, pooled = backbone.prompt_shape
    prompt = PromptEmbeds(embeds=normal((3, tokens, width), "text"), pooled=normal((3, pooled), "pooled")).to(place)
    latents = normal((3, *backbone.latent_shape(32, 32)), "latents").to(place)
    sigma = torch.tensor([0.2, 0.5, 0.9], device=place)

    @torch.no_grad()
    def velocity(module: nn.Module, count: int) -> torch.Tensor:
        rows = slice(count)
        return backbone.velocity(module, latents[rows], sigma[rows], prompt.select(rows))

    before = counters["stats"]["unique_graphs"]
    first = velocity(compiled, 3)
    torch.testing.assert_close(first, velocity(eager, 3), rtol=1e-5, atol=1e-5)
    for module in (eager, compiled):
        module.transformer_blocks[0].attn.to_q.weight.mul_(1.5)  # in place, as a merged adapter changes it
    for count in (3, 2):
        torch.testing.assert_close(velocity(compiled, count), velocity(eager, count), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(velocity(compiled, 3), first, atol=1e-4)
    assert counters["stats"]["unique_graphs"] - before == 1
    assert compiled.state_dict().keys() == eager.state_dict().keys()
