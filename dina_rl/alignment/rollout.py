"""The generator's side of the loop: prompts in, trajectories out."""

from collections.abc import Sequence

import torch

from dina_rl.alignment.golden import open_metric
from dina_rl.alignment.measurement import EvaluationItem, EvaluationSamples
from dina_rl.alignment.pretraining import PretrainingDraws
from dina_rl.backbones.trained import check_names, copy_in, make_trainable, trained_parameters
from dina_rl.config import AlignRun
from dina_rl.flow.sampler import Denoised, Velocity, denoise, denoise_until, guided, predict_clean
from dina_rl.runtime import open_pipeline
from dina_rl.seeding import generator, normal
from dina_rl.types import PolicyWeights, PromptEmbeds, StoppedGroup, Trajectory, WorkItem


class RolloutWorker:
    """The policy as a sampler, with text encoder and VAE. Holds no state between calls but the weights."""

    def __init__(self, run: AlignRun) -> None:
        self._run = run
        self._backbone = open_pipeline(run.pipeline)
        self._transformer = self._backbone.load_transformer()
        make_trainable(self._transformer, run.learner.lora, targets=self._backbone.lora_targets, seed=run.seed)
        self._transformer.requires_grad_(False)
        self._text = self._backbone.load_text_encoder()
        self._codec = self._backbone.load_codec()
        self._metric = open_metric(run.golden)
        self._shape = self._backbone.latent_shape(run.pipeline.height, run.pipeline.width)
        wants_real = run.algorithm == "refl" and run.refl.pretraining_weight
        self._real = PretrainingDraws(run, self._shape) if wants_real else None
        self._sigmas = self._backbone.sigmas(run.rollout.num_steps, run.pipeline.height, run.pipeline.width)
        self._version = 0
        self._next_part = 0
        self._loaded: set[str] = set()  # names of the weights that came in parts

    def load_weights(self, weights: PolicyWeights) -> int:
        """Sample with `weights` from now on; they may come in parts, in order. Returns their version.

        Raises:
            ValueError: a part is missing, or the weights are not those of this policy.
        """
        if weights.part != self._next_part:
            raise ValueError(f"part {weights.part} of the policy's weights came where {self._next_part} was due")
        parameters = trained_parameters(self._transformer)
        self._loaded = set(weights.tensors) | (self._loaded if weights.part else set())
        check_names(self._loaded & set(parameters), self._loaded)
        for name, tensor in weights.tensors.items():
            copy_in(parameters[name], tensor)
        self._next_part = (weights.part + 1) % weights.parts
        if self._next_part == 0:
            check_names(self._loaded, set(parameters))
            self._version = weights.version
        return self._version

    def rollout(self, items: Sequence[WorkItem]) -> list[Trajectory] | list[StoppedGroup]:
        """One rollout per group, all groups in one batch. Depends on the items and the weights alone.

        All groups must belong to one iteration: they share its window or its stop step.
        """
        assert len({item.step for item in items}) == 1, "groups of one call belong to one iteration"
        return self._stop(items) if self._run.algorithm == "refl" else self._trajectories(items)

    def _trajectories(self, items: Sequence[WorkItem]) -> list[Trajectory]:
        run = self._run.rollout
        noise = self._noise(items, 1 + run.window_steps)
        rows, prompt = self._prompts(items)
        start = window_start(self._run, items[0].step)
        result = self._denoise(noise[0], prompt, run.guidance_scale, window_start=start, window_noise=noise[1:])
        negative = self._text([""]).to("cpu") if self._run.learner.guidance_in_loss else None
        trajectories, first = [], 0
        for i, item in enumerate(items):
            group = slice(first, first + item.group_size)
            first += item.group_size
            trajectories.append(
                Trajectory(
                    item=item,
                    policy_version=self._version,
                    sigmas=self._sigmas,
                    window_start=start,
                    dynamics=self._run.dynamics,
                    noise_level=run.noise_level,
                    states=result.states[:, group].cpu().clone(),  # a view would be sent with its whole batch
                    log_probs=result.log_probs[:, group].cpu().clone(),
                    latents=result.latents[group].cpu().clone(),
                    prompt=rows.select(slice(i, i + 1)).to("cpu"),
                    guidance_scale=run.guidance_scale,
                    negative=negative,
                )
            )
        return trajectories

    def _stop(self, items: Sequence[WorkItem]) -> list[StoppedGroup]:
        run, learner, device = self._run.rollout, self._run.learner, self._backbone.device
        noise = self._noise(items, 1)[0]
        rows, prompt = self._prompts(items)
        stop = stop_step(self._run, items[0].step)
        conditional, unconditional = self._velocities(prompt, run.guidance_scale)
        sigmas = self._sigmas.to(device)
        stopped = denoise_until(
            noise.to(device), sigmas, conditional, unconditional, guidance_scale=run.guidance_scale, stop=stop
        )
        with torch.no_grad():
            sigma = sigmas[stop].expand(len(stopped))
            velocity = conditional(stopped, sigma)
            if learner.guidance_in_loss:
                velocity = guided(velocity, unconditional(stopped, sigma), run.guidance_scale)
        clean = predict_clean(stopped, velocity, float(self._sigmas[stop]))
        negative = self._text([""]).to("cpu") if learner.guidance_in_loss else None
        sizes = [item.group_size for item in items]
        return [
            StoppedGroup(
                item=item,
                policy_version=self._version,
                sigma=float(self._sigmas[stop]),
                stopped=before.cpu().clone(),
                latents=after.cpu().clone(),
                prompt=rows.select(slice(i, i + 1)).to("cpu"),
                guidance_scale=run.guidance_scale,
                negative=negative,
                pretraining=None if self._real is None else self._real.draw(item, self._text),
            )
            for i, (item, before, after) in enumerate(zip(items, stopped.split(sizes), clean.split(sizes), strict=True))
        ]

    def _noise(self, items: Sequence[WorkItem], count: int) -> torch.Tensor:
        """`count` draws for every sample of the groups [count, B, C, H, W]: the initial noise, then the window's."""
        shape = count, *self._shape
        return torch.stack(
            [
                normal(shape, self._run.seed, "rollout", item.step, item.prompt_id, sample)
                for item in items
                for sample in range(item.group_size)
            ],
            1,
        )

    def _prompts(self, items: Sequence[WorkItem]) -> tuple[PromptEmbeds, PromptEmbeds]:
        """Embeddings of the groups' prompts, one row each, and one row per sample."""
        rows = self._text([item.prompt for item in items])
        sizes = [item.group_size for item in items]
        return rows, PromptEmbeds.cat([rows.select(slice(i, i + 1)).repeat(size) for i, size in enumerate(sizes)])

    def _velocities(self, prompt: PromptEmbeds, guidance_scale: float) -> tuple[Velocity, Velocity | None]:
        """The current policy's conditional velocity and, under guidance, the empty prompt's."""

        def velocity_for(text: PromptEmbeds) -> Velocity:
            return lambda latents, sigma: self._backbone.velocity(self._transformer, latents, sigma, text)

        if guidance_scale == 1:
            return velocity_for(prompt), None
        return velocity_for(prompt), velocity_for(self._text([""]).repeat(len(prompt)))

    def evaluate(self, item: EvaluationItem) -> EvaluationSamples:
        """ODE samples of the current policy at fixed noise, decoded and measured by the golden metric."""
        noise = torch.stack(
            [
                normal(self._shape, "evaluation", item.split, prompt_id, sample_id)
                for prompt_id, sample_id in zip(item.prompt_ids, item.sample_ids, strict=True)
            ]
        )
        prompt = self._text(item.prompts)
        latents = self._denoise(noise, prompt, item.guidance_scale).latents
        with torch.no_grad():
            images = self._codec.decode(latents).cpu()
        return EvaluationSamples(
            item=item,
            golden=self._metric(images, item.prompts),
            latents=latents.cpu(),
            prompt=prompt.to("cpu"),
            images=(images * 255).round().to(torch.uint8),
        )

    def _denoise(
        self,
        noise: torch.Tensor,
        prompt: PromptEmbeds,
        guidance_scale: float,
        *,
        window_start: int = 0,
        window_noise: torch.Tensor | None = None,
    ) -> Denoised:
        device = self._backbone.device
        conditional, unconditional = self._velocities(prompt, guidance_scale)
        return denoise(
            noise.to(device),
            self._sigmas.to(device),
            conditional,
            unconditional,
            guidance_scale=guidance_scale,
            window_start=window_start,
            dynamics=self._run.dynamics,
            noise_level=self._run.rollout.noise_level,
            window_noise=None if window_noise is None else window_noise.to(device),
            guided_density=self._run.learner.guidance_in_loss,
        )


def stop_step(run: AlignRun, step: int) -> int:
    """The step at which iteration `step` of ReFL stops denoising, drawn from `refl.stop_range`, ends included."""
    first, last = run.refl.stop_range
    return first + int(torch.randint(last - first + 1, (), generator=generator(run.seed, "stop", step)))


def window_start(run: AlignRun, step: int) -> int:
    """First SDE step of iteration `step`: fixed, or drawn within `rollout.window_range`.

    One window for all groups of an iteration: different windows inside a group would compare rewards of different
    amounts of exploration, and one schedule per minibatch keeps its forwards whole.
    """
    rollout = run.rollout
    if rollout.window_range is None:
        return rollout.window_start
    first, end = rollout.window_range
    choices = end - first - rollout.window_steps + 1
    return first + int(torch.randint(choices, (), generator=generator(run.seed, "window", step)))


def in_calls(items: Sequence[WorkItem], groups_per_call: int) -> list[list[WorkItem]]:
    """The work items in calls of equal geometry; the split depends on the configuration, never on the workers."""
    return [list(items[i : i + groups_per_call]) for i in range(0, len(items), groups_per_call)]
