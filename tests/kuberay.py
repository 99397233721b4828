"""The fields of a Kubernetes manifest that ours have, and no others: a misspelt one is refused, as by `kubectl apply`.

Names and kinds are those of KubeRay 1.6's reference of ray.io/v1 and of Kubernetes' core/v1. Of the fields' own rules
there stand those that a server or KubeRay's operator checks: names, quantities, modes, what goes with what.
"""

from decimal import Decimal
from typing import Annotated, Any, Literal, Self

from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from dina_rl.textfiles import parse_yaml

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
NAMES_STARTING_PODS = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
ClusterName = Annotated[str, Field(pattern=NAMES_STARTING_PODS, max_length=53)]
JobName = Annotated[str, Field(pattern=NAMES_STARTING_PODS, max_length=47)]
Quantity = Annotated[str, Field(pattern=r"^[1-9]\d*(m|Ki|Mi|Gi|Ti)?$")]
Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(gt=0, lt=65_536)]
Absolute = Annotated[str, Field(pattern=r"^/")]
GPU = "nvidia.com/gpu"
RAY_START = {"num-cpus", "num-gpus", "object-store-memory"}


class Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=AliasGenerator(validation_alias=to_camel)
    )


TOKENS_SINCE = (2, 52, 0)
"""Ray's version whose token the operator sets."""


class Metadata(Part):
    name: Name


class ClusterMetadata(Part):
    name: ClusterName


class JobMetadata(Part):
    name: JobName


class Key(Part):
    name: Name
    key: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    optional: bool = False


class Source(Part):
    secret_key_ref: Key


class Variable(Part):
    name: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
    value: str | None = None
    value_from: Source | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        assert (self.value is None) != (self.value_from is None)
        return self


class ContainerPort(Part):
    name: Annotated[Name, Field(max_length=15)]
    container_port: Port


class Resources(Part):
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]


class Capabilities(Part):
    drop: list[str]


class ContainerSecurity(Part):
    allow_privilege_escalation: bool
    capabilities: Capabilities


class Mount(Part):
    name: Name
    mount_path: Absolute


class Container(Part):
    name: Name
    image: Annotated[str, Field(pattern=r"^[\w.-]+(:\d+)?(/[\w.-]+)+:[\w.-]+$")]
    ports: list[ContainerPort] = []
    env: list[Variable] = []
    resources: Resources
    security_context: ContainerSecurity
    volume_mounts: list[Mount]


class Claim(Part):
    claim_name: Name


class EmptyDir(Part):
    medium: Literal["Memory"]
    size_limit: Quantity


class Volume(Part):
    name: Name
    persistent_volume_claim: Claim | None = None
    empty_dir: EmptyDir | None = None


class Seccomp(Part):
    type: Literal["RuntimeDefault"]


class PodSecurity(Part):
    run_as_non_root: bool
    run_as_user: Count
    run_as_group: Count
    fs_group: Count
    seccomp_profile: Seccomp


class Toleration(Part):
    key: str
    operator: Literal["Equal", "Exists"]
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"]


class Expression(Part):
    key: str
    operator: Literal["In", "NotIn"]
    values: list[str]


class Term(Part):
    match_expressions: list[Expression]


class Selector(Part):
    node_selector_terms: list[Term]


class NodeAffinity(Part):
    required: Annotated[Selector, Field(validation_alias="requiredDuringSchedulingIgnoredDuringExecution")]


class Affinity(Part):
    node_affinity: NodeAffinity


class PodSpec(Part):
    termination_grace_period_seconds: Count
    automount_service_account_token: bool
    security_context: PodSecurity
    affinity: Affinity | None = None
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    volumes: list[Volume]

    @property
    def container(self) -> Container:
        return self.containers[0]

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> Self:
        mounted = [mount.name for mount in self.container.volume_mounts]
        assert sorted(mounted) == sorted(volume.name for volume in self.volumes)
        return self


class Template(Part):
    spec: PodSpec


class Head(Part):
    ray_start_params: dict[str, str]
    template: Template


class Workers(Part):
    group_name: Name
    replicas: Count
    min_replicas: Count
    max_replicas: Count
    ray_start_params: dict[str, str]
    template: Template

    @model_validator(mode="after")
    def _as_many_as_may_be(self) -> Self:
        assert self.min_replicas <= self.replicas <= self.max_replicas
        return self


class Authentication(Part):
    mode: Literal["token"]
    secret_name: Name


class Cluster(Part):
    ray_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    auth_options: Authentication
    head_group_spec: Head
    worker_group_specs: list[Workers]

    @model_validator(mode="after")
    def _ray_knows_tokens(self) -> Self:
        assert tuple(map(int, self.ray_version.split("."))) >= TOKENS_SINCE
        return self

    def total(self, resource: str) -> int:
        """Of the workers, in whole ones."""
        asked = (
            (group.replicas, group.template.spec.container.resources.limits[resource])
            for group in self.worker_group_specs
        )
        return sum(replicas * int(amount) for replicas, amount in asked)


class RayCluster(Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: ClusterMetadata
    spec: Cluster


class Submitter(Part):
    backoff_limit: Count


class Job(Part):
    entrypoint: str
    backoff_limit: Count
    submitter_config: Submitter
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: Count
    ray_cluster_spec: Cluster

    @model_validator(mode="after")
    def _what_stays_a_while_ends(self) -> Self:
        assert self.shutdown_after_job_finishes or not self.ttl_seconds_after_finished
        return self


class RayJob(Part):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: JobMetadata
    spec: Job


class Requests(Part):
    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Part):
    access_modes: list[Literal["ReadWriteMany", "ReadWriteOnce", "ReadOnlyMany", "ReadWriteOncePod"]]
    storage_class_name: Name
    resources: Requests


class StorageClaim(Part):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


KINDS: dict[str, type[RayCluster] | type[RayJob] | type[StorageClaim]] = {
    "RayCluster": RayCluster,
    "RayJob": RayJob,
    "PersistentVolumeClaim": StorageClaim,
}


def read(text: str) -> RayCluster | RayJob | StorageClaim:
    """A manifest. Raises ValueError where a server or the operator would refuse it, or it is less safe than ours."""
    values: dict[str, Any] = parse_yaml(text)
    return KINDS[values["kind"]].model_validate(values)


def gibibytes(quantity: str) -> Decimal:
    """Of memory or storage."""
    unit = {"Mi": Decimal(1) / 1024, "Gi": Decimal(1), "Ti": Decimal(1024)}
    return Decimal(quantity[:-2]) * unit[quantity[-2:]]
