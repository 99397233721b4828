"""What a cluster on Kubernetes is made of: manifests that a server takes, and that agree with presets and image."""

import re
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest
from pydantic import BaseModel, ValidationError

import dina_rl
from dina_rl.alignment.layout import layout_of
from dina_rl.cli import load
from dina_rl.config import AlignRun, FitRun
from dina_rl.run_directory import run_directory
from tests import kuberay
from tests.kuberay import GPU, Cluster, RayCluster, RayJob, StorageClaim, gibibytes

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE, IGNORED = DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.dockerignore"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
PROGRAMS: dict[str, type[BaseModel]] = {"jobs.encode": FitRun, "jobs.fit_reward": FitRun, "jobs.align": AlignRun}
SPOT_TAINTS = {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
INSTRUCTIONS = ("ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "ADD", "USER")  # that ours may have
MIB = 2**20

Kind = TypeVar("Kind", RayCluster, RayJob, StorageClaim)


def manifest(kind: type[Kind], name: str) -> Kind:
    found = kuberay.read((DEPLOY / f"{name}.yaml").read_text())
    assert isinstance(found, kind)
    return found


@cache
def jobs() -> dict[str, RayJob]:
    return {name: manifest(RayJob, name) for name in ("encode", "fit", "align")}


@cache
def cluster() -> Cluster:
    return manifest(RayCluster, "cluster").spec


def run_of(job: RayJob) -> BaseModel:
    """The configuration that an entrypoint's words make, read by the job's own parser from this checkout."""
    python, minus_m, module, *words = shlex.split(job.spec.entrypoint)
    assert (python, minus_m) == ("python", "-m")
    here = [word.replace(f"{instructions('WORKDIR')[0]}/", f"{ROOT}/") for word in words]
    assert here != words, "the image's presets"
    return load(PROGRAMS[module], here, program=module)


def instructions(kind: str) -> list[str]:
    """The arguments of every instruction of a kind in the Dockerfile, continued lines as one."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    parsed = [re.fullmatch(rf"({'|'.join(INSTRUCTIONS)}) (.+)", line) for line in lines if line.strip()]
    assert all(parsed), lines
    return [found[2] for found in parsed if found is not None and found[1] == kind]


def context() -> list[str]:
    """The files that the image's build sees: `*`, then exceptions that are files or directories of the top."""
    first, *rules = [line for line in IGNORED.read_text().splitlines() if line and not line.startswith("#")]
    assert first == "*"
    assert rules.pop() == "**/__pycache__"
    assert all(re.fullmatch(r"![\w.]+", rule) and (ROOT / rule[1:]).exists() for rule in rules)
    files = (file for rule in rules for file in [ROOT / rule[1:], *(ROOT / rule[1:]).rglob("*")])
    return [str(file.relative_to(ROOT)) for file in files if file.is_file() and "__pycache__" not in file.parts]


def test_every_manifest_is_one_that_a_server_takes() -> None:
    names = {type(kuberay.read(file.read_text())): file.stem for file in MANIFESTS}
    assert names.keys() == {RayCluster, RayJob, StorageClaim}
    assert {file.stem for file in MANIFESTS} == {"align", "cluster", "encode", "fit", "storage"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("backoffLimit:", "backofLimit:"),
        lambda text: text.replace("mode: token", "mode: disabled"),
        lambda text: text.replace("memory: 32Gi", "memory: 32GB"),
        lambda text: text.replace("replicas: 1\n", "replicas: 2\n", 1),
        lambda text: text.replace("name: shared, mountPath", "name: other, mountPath"),
        lambda text: text.replace("containerPort: 8265", 'containerPort: "8265"'),
        lambda text: text.replace("0.2.0-cuda", "0.2.0 cuda"),
        lambda text: text.replace("name: dina-rl-align", "name: 2-dina-rl-align"),
        lambda text: text.replace("name: dina-rl-align", f"name: dina-rl-align{'-x' * 18}"),
        lambda text: text.replace("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false"),
        lambda text: text.replace('"2.60.0"', '"2.51.0"'),
    ],
)
def test_a_damaged_one_is_refused(damage: Callable[[str], str]) -> None:
    text = (DEPLOY / "align.yaml").read_text()
    assert damage(text) != text
    with pytest.raises(ValidationError):
        kuberay.read(damage(text))


def test_all_jobs_have_the_same_cluster() -> None:
    assert {name: job.spec.ray_cluster_spec for name, job in jobs().items()} == dict.fromkeys(jobs(), cluster())


def test_its_ray_and_its_image_are_the_locks() -> None:
    assert f"\nray=={cluster().ray_version}\n" in (ROOT / "requirements.lock").read_text()
    pods = [cluster().head_group_spec.template, *(group.template for group in cluster().worker_group_specs)]
    assert {pod.spec.container.image.rpartition(":")[2] for pod in pods} == {f"{dina_rl.__version__}-cuda"}
    for device in ("cuda", "cpu"):
        assert f"DEVICE={device} -t registry.example/dina_rl:{dina_rl.__version__}-{device}" in DOCKERFILE.read_text()


def test_a_jobs_command_is_one_that_its_program_understands_and_leaves_results_on_shared_storage() -> None:
    (home,) = re.findall(r"HOME=(\S+)", instructions("ENV")[0].split("HF_HOME")[0])
    for job in jobs().values():
        run = run_of(job)
        assert isinstance(run, AlignRun | FitRun)
        assert run.resume, "one command begins and goes on"
        assert run.run_dir.parts[:2] == ("~", "dina_rl")
        for pod in (job.spec.ray_cluster_spec.head_group_spec, *job.spec.ray_cluster_spec.worker_group_specs):
            mounts = {mount.name: mount.mount_path for mount in pod.template.spec.container.volume_mounts}
            assert mounts == {"shared": f"{home}/dina_rl", "memory": "/dev/shm"}


def test_a_first_start_and_a_restart_are_one_command(tmp_path: Path) -> None:
    for _ in range(2):
        with run_directory(FitRun(resume=True), tmp_path / "run", resume=True) as run_dir:
            (run_dir / "work").touch()
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_gpus_are_as_many_as_the_presets_lay_out() -> None:
    runs = {name: run_of(job) for name, job in jobs().items()}
    assert isinstance(runs["align"], AlignRun)
    assert cluster().total(GPU) == len(layout_of(runs["align"].workers).gpus())
    for name in ("encode", "fit"):
        run = runs[name]
        assert isinstance(run, FitRun)
        assert cluster().total(GPU) == run.fit.num_workers * run.fit.gpus_per_worker
        assert cluster().total("cpu") >= run.fit.num_workers * (run.fit.cpus_per_worker + 1), "some for Ray Data"


def test_pods_are_bounded_and_may_do_little() -> None:
    head = cluster().head_group_spec
    for pod in (head.template.spec, *(group.template.spec for group in cluster().worker_group_specs)):
        assert pod.container.resources.requests == pod.container.resources.limits
        (shared_memory,) = (volume.empty_dir.size_limit for volume in pod.volumes if volume.empty_dir)
        assert gibibytes(shared_memory) < gibibytes(pod.container.resources.limits["memory"]) / 2
        assert pod.security_context.run_as_non_root
        assert instructions("USER") == [f"{pod.security_context.run_as_user}:{pod.security_context.run_as_group}"]
        assert not pod.container.security_context.allow_privilege_escalation
        assert not pod.automount_service_account_token
    for params in (head.ray_start_params, *(group.ray_start_params for group in cluster().worker_group_specs)):
        assert params.keys() <= kuberay.RAY_START
    assert head.ray_start_params == {"num-cpus": "0", "num-gpus": "0"}


def test_workers_may_be_taken_back_and_the_head_may_not() -> None:
    head = cluster().head_group_spec.template.spec
    (term,) = head.affinity.node_affinity.required.node_selector_terms if head.affinity else ()
    assert {each.key for each in term.match_expressions if each.operator == "NotIn"} >= SPOT_TAINTS
    assert not head.tolerations
    for group in cluster().worker_group_specs:
        assert {each.key for each in group.template.spec.tolerations} == {GPU, *SPOT_TAINTS}
        assert group.template.spec.termination_grace_period_seconds >= 120
    assert all(job.spec.backoff_limit and job.spec.shutdown_after_job_finishes for job in jobs().values())


def test_secrets_are_named_and_never_written() -> None:
    assert cluster().auth_options.secret_name == "dina-rl-ray-token"
    for group in (cluster().head_group_spec, *cluster().worker_group_specs):
        assert all(variable.value is None for variable in group.template.spec.container.env)
    guide = (ROOT / "docs" / "cluster.md").read_text()
    assert {"dina-rl-ray-token", "dina-rl-huggingface"} <= set(re.findall(r"create secret generic ([\w-]+)", guide))


def test_storage_is_what_the_pods_mount() -> None:
    claim = manifest(StorageClaim, "storage")
    assert claim.spec.access_modes == ["ReadWriteMany"]
    pods = [group.template.spec for group in (cluster().head_group_spec, *cluster().worker_group_specs)]
    claims = [volume.persistent_volume_claim for pod in pods for volume in pod.volumes if volume.name == "shared"]
    assert {each.claim_name for each in claims if each} == {claim.metadata.name}


def test_the_image_is_pinned_small_and_without_root() -> None:
    (base,) = instructions("FROM")
    python, device = instructions("ARG")
    assert base == "python:${PYTHON}-slim-bookworm"
    assert re.fullmatch(r"PYTHON=3\.11\.\d+", python)
    assert device == "DEVICE=cuda"
    assert not instructions("ADD")
    text = DOCKERFILE.read_text()
    assert text.rindex("\nUSER ") > text.rindex("\nRUN ")
    installs = [each for run in instructions("RUN") for each in re.findall(r"pip install ([^;&]+)", run)]
    assert len(installs) == 2
    for options in installs:  # a version of its own has nothing
        assert "-c requirements.lock" in options or "--no-deps" in options or "'^torch==' requirements.lock" in options


def test_in_the_image_nothing_else_is_taken_for_the_package_and_anybody_may_read_it() -> None:
    """The volume is called dina_rl, and lies where a shell begins."""
    (top,) = instructions("WORKDIR")
    assert f"PYTHONPATH={top}" in instructions("ENV")
    text = DOCKERFILE.read_text()
    assert text.rindex("\nCOPY ") < text.index("\nRUN chmod -R a+rX .\n") < text.index("\nUSER ")


def test_what_the_image_runs_is_shell_and_what_it_sets_has_a_name() -> None:
    assert instructions("RUN")
    for line in instructions("RUN"):
        parsed = subprocess.run(["sh", "-n", "-c", line], capture_output=True, text=True, timeout=30, check=False)
        assert (parsed.returncode, parsed.stderr) == (0, ""), line
    for line in (*instructions("ARG"), *instructions("ENV")):
        assert all(re.fullmatch(r"[A-Z_]+=\S+", word) for word in shlex.split(line)), line


def test_the_image_copies_what_a_job_reads_and_sees_little_else() -> None:
    seen = context()
    assert sum((ROOT / file).stat().st_size for file in seen) < 10 * MIB
    copied = [source for copy in instructions("COPY") for source in copy.split()[:-1]]
    for file in seen:
        assert any(file == source or file.startswith(f"{source}/") for source in copied), f"{file} is not copied"
    assert all(any(file == source or file.startswith(f"{source}/") for file in seen) for source in copied)
    assert {"jobs/align.py", "configs/reward_sd35m.yaml", "dina_rl/shapes/pipeline/model_index.json"} <= set(seen)
