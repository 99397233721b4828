"""Ray Train's process group, whose ranks meet over the network of Ray's nodes.

Ray Train forms it before a worker's own first line, so that what has to be known by then is told here.
"""

from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch.config import TorchConfig, _TorchBackend

from actors.network import meet_over_the_nodes_network


class _Meeting(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchConfig)
        worker_group.execute(meet_over_the_nodes_network)
        super().on_start(worker_group, backend_config)


class MeetingRanks(TorchConfig):
    """`TorchConfig` of ranks that find each other where a node's name stands for a loopback address, too."""

    @property
    def backend_cls(self) -> type[_Meeting]:
        return _Meeting
