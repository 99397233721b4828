"""Which settings do not decide what comes out, and what follows from their marks."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel

from dina_rl.config import (
    AlignRun,
    CompareRuns,
    DatasetConfig,
    EvaluateRun,
    EvaluationWorkersConfig,
    ExportRun,
    FitConfig,
    FitRun,
    GoldenConfig,
    LabelRun,
    LearnerConfig,
    LocalRun,
    PictureScorerConfig,
    PipelineConfig,
    RolloutConfig,
    ScoreRun,
    ServerConfig,
    ServeRun,
    UnifiedRewardConfig,
    UnifiedRewardThinkConfig,
    WorkersConfig,
)
from dina_rl.config.base import Section
from dina_rl.config.evaluation import BootstrapConfig, SetConfig
from dina_rl.config.keys import Mark, covers, dump_without, marked, section_of
from dina_rl.config.labelling import TeacherConfig, ValidationConfig

RUNS: tuple[type[BaseModel], ...] = (
    FitRun,
    AlignRun,
    LocalRun,
    EvaluateRun,
    ScoreRun,
    ExportRun,
    CompareRuns,
    ServeRun,
    LabelRun,
)
DECIDES = None
PINNED: dict[type[BaseModel], dict[Mark | None, str]] = {
    FitRun: {Mark.PROCESS: "inline", Mark.PLACE: "run_dir resume", DECIDES: "seed latents"},
    DatasetConfig: {
        Mark.PROCESS: "max_skipped prompt_embeddings max_pixels",
        Mark.FILES: "encode_batch_size batches_per_shard",
        DECIDES: "kind path train test buckets latent_dtype",
    },
    FitConfig: {
        Mark.PROCESS: "num_workers cpus_per_worker gpus_per_worker threads_per_worker start_timeout_s max_failures "
        "checkpoint_every checkpoint_keep micro_batch_size gradient_checkpointing evaluation_batch_size",
        Mark.REPORT: "evaluate_every held_out",
        DECIDES: "steps batch_of batch_size bucket_batch learning_rate weight_decay warmup_steps decay_start "
        "max_grad_norm ema_decay autocast labels",
    },
    AlignRun: {
        Mark.PROCESS: "plan_tflops plan_gib inline checkpoint_every checkpoint_keep workers",
        Mark.PLACE: "run_dir resume",
        DECIDES: "seed algorithm plan iterations",
    },
    PipelineConfig: {
        Mark.PROCESS: "decode_batch",
        DECIDES: "path revision variant dtype compile height width max_sequence_length distilled_guidance vae_tiling",
    },
    RolloutConfig: {
        Mark.PROCESS: "max_failed",
        DECIDES: "num_steps guidance_scale negative_prompt dynamics noise_level window_start window_range window_steps "
        "prompts_per_iteration group_size groups_per_call",
    },
    LearnerConfig: {
        Mark.PROCESS: "gradient_checkpointing engine zero_stage",
        DECIDES: "learning_rate warmup_updates schedule weight_decay max_grad_norm updates_per_iteration keep epochs "
        "micro_batch_size ema_decay guidance_in_loss",
    },
    WorkersConfig: {
        Mark.PROCESS: "layout gpus sleep rollout_workers text_workers scorers learner_ranks cpus_per_actor "
        "gpus_per_rollout gpus_per_scorer gpus_per_rank threads_per_actor start_timeout_s call_timeout_s "
        "weights_part_mib snapshot_every max_restarts"
    },
    UnifiedRewardConfig: {
        Mark.PROCESS: "concurrency timeout_s retries",
        Mark.PLACE: "path",
        DECIDES: "weight mean std processor",
    },
    UnifiedRewardThinkConfig: {
        Mark.PROCESS: "concurrency timeout_s retries",
        Mark.PLACE: "path",
        DECIDES: "weight mean std processor min_compared",
    },
    ServerConfig: {Mark.PROCESS: "concurrency timeout_s retries"},
    GoldenConfig: {
        Mark.PROCESS: "server",
        DECIDES: "scorer path processor every dev_samples test_samples guidances aligned_guidances num_steps "
        "batch_size",
    },
    PictureScorerConfig: {
        Mark.PROCESS: "server",
        DECIDES: "kind path processor levels draws noise normalisation pipeline revision variant dtype "
        "max_sequence_length height width",
    },
    TeacherConfig: {
        Mark.PROCESS: "server",
        DECIDES: "weight mean std kind path processor levels draws noise normalisation pipeline revision variant dtype "
        "max_sequence_length height width",
    },
    EvaluateRun: {
        Mark.PROCESS: "inline max_broken workers",
        Mark.PLACE: "run_dir resume cache",
        Mark.REPORT: "pool_data_sets convention bootstrap bins",
        DECIDES: "seed paper runs noise levels buckets encode_batch_size batch_size records_per_part",
    },
    SetConfig: {Mark.PROCESS: "max_pixels", DECIDES: "kind path split max_records"},
    EvaluationWorkersConfig: {
        Mark.PROCESS: "num_workers cpus_per_actor gpus_per_actor threads_per_actor start_timeout_s call_timeout_s "
        "max_restarts"
    },
    LabelRun: {
        Mark.PROCESS: "inline max_broken workers",
        Mark.PLACE: "run_dir resume",
        DECIDES: "seed plan split scale median_confidence batch_size encode_batch_size records_per_part",
    },
    ValidationConfig: {Mark.PROCESS: "max_pixels", DECIDES: "kind path split max_records"},
    BootstrapConfig: {Mark.REPORT: "resamples confidence"},
}
"""The settings of every section that has a mark or lies under one: a new one there is a decision to be made here.

`LocalRun` adds sections alone to `AlignRun`. A section without marks decides what comes out with all it has.
"""


Marks = dict[str, Mark | None]


def sections(model: type[BaseModel], above: Mark | None = None) -> Iterator[tuple[type[BaseModel], Marks]]:
    """Every section of a run, itself included: its settings and marked sections, and their marks."""
    marks: Marks = {}
    for name, field in model.model_fields.items():
        own = [mark for mark in field.metadata if isinstance(mark, Mark)]
        assert len(own) <= 1, f"{model.__name__}.{name} has two marks"
        mark = own[0] if own else above
        inner = section_of(field.annotation)
        if inner is not None:
            yield from sections(inner, mark)
        if inner is None or own:
            marks[name] = mark
    yield model, marks


def test_every_setting_is_marked_or_decides() -> None:
    found = {section: marks for run in RUNS for section, marks in sections(run) if any(marks.values())}
    expected_of = PINNED | {LocalRun: PINNED[AlignRun]}
    assert set(found) == set(expected_of)
    for section, pinned in expected_of.items():
        expected = {name: mark for mark, names in pinned.items() for name in names.split()}
        assert found[section] == expected, section.__name__


class Inner(Section):
    here: Annotated[int, Mark.PROCESS] = 0
    there: int = 0


class Outer(Section):
    one: Inner = Inner()
    maybe: Inner | None = None
    named: dict[str, Inner] = {}
    whole: Annotated[Inner | None, Mark.PLACE] = Inner()
    words: Annotated[dict[str, str], Mark.REPORT] = {}


def test_marks_are_found_in_every_kind_of_section() -> None:
    assert list(marked(Outer, Mark.PROCESS)) == ["one.here", "maybe.here", "named.NAME.here", "whole.here"]
    assert list(marked(Outer, Mark.PLACE, Mark.REPORT)) == ["whole", "words"]
    values = Outer(maybe=Inner(), named={"a": Inner(here=1, there=2)}, words={"x": "y"})
    assert dump_without(values, *Mark) == {
        "one": {"there": 0},
        "maybe": {"there": 0},
        "named": {"a": {"there": 2}},
    }
    assert dump_without(Outer(), Mark.PROCESS)["maybe"] is None


def test_a_key_is_covered_by_itself_its_section_and_names() -> None:
    keys = ("fit.held_out", "sets.NAME.path")
    assert all(covers(keys, key) for key in ("fit.held_out", "fit.held_out.other", "sets.mine.path"))
    assert not any(covers(keys, key) for key in ("fit", "fit.held", "fit.held_out_too", "sets.mine.kind", "sets.mine"))
