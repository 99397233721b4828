"""Where the Ray of a job by hand listens."""

import json
import subprocess
import sys
from ipaddress import ip_address

SCRIPT = """
import json
from pathlib import Path

import psutil
import ray

from jobs.cluster import start_ray

start_ray(Path())
tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
sockets = [each for process in tree for each in process.net_connections("inet") if each.status == "LISTEN"]
print(json.dumps([each.laddr.ip for each in sockets]))
"""


def test_it_listens_on_the_loopback_interface_alone() -> None:
    # In a process of its own: this one may have a Ray already.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=280, check=True)
    addresses = [ip_address(each) for each in json.loads(done.stdout.splitlines()[-1])]
    assert len(addresses) >= 4, "the head's, the raylet's, the agents'"
    assert {str(each.ipv4_mapped or each) if each.version == 6 else str(each) for each in addresses} == {"127.0.0.1"}
