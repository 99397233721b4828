"""Over which of a machine's networks the ranks of a process group meet."""

import os

import psutil
import ray

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def meet_over_the_nodes_network() -> None:
    """Tell gloo, before a process group is formed, to listen where Ray's node does; what is set already stays.

    Left to itself gloo listens at the address that the machine's own name stands for. In the /etc/hosts of many a
    distribution that is one of the loopback network, where no rank on another machine finds it. NCCL looks for an
    interface that is none.
    """
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault(GLOO_INTERFACE, interface)


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has an address; None: it has none, as behind a NAT."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
