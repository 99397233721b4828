"""How a job that was started by hand or by `ray job submit` gets its Ray."""

import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import ray
from ray._private import ray_constants
from ray.data import DataContext

from dina_rl.cli import fail
from dina_rl.config import FitConfig
from dina_rl.termination import listen
from jobs.ray_watch import watch

CONNECT_TIMEOUT_S = 10.0
USAGE_STATS = "RAY_USAGE_STATS_ENABLED"
AUTH_MODE = "RAY_AUTH_MODE"


def start_ray(run_dir: Path) -> None:
    """Join the cluster this job was submitted to, else start Ray on this machine's loopback; nothing if it runs.

    Where Ray is lost later, the process ends with one line that says how to continue the run in `run_dir`.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        os.environ.setdefault(USAGE_STATS, "0")  # Ray's own reports of it to its makers; who wants them sets 1
        # Off Linux Ray stays on the loopback interface by this switch, which it reads from the environment when it is
        # imported. Otherwise it takes 127.0.0.1 for the machine's own address, and listens on all of them.
        ray_constants.ENABLE_RAY_CLUSTER = False
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
        )
    else:
        try:
            check_address(address)
            join()
        except (ConnectionError, ValueError) as error:
            fail(f"RAY_ADDRESS {address}: {' '.join(str(error).split())}")
    listen()  # Ray has set its own handler of SIGTERM
    watch(run_dir)


def join() -> None:
    """Join the cluster at RAY_ADDRESS.

    Raises:
        ConnectionError: it is none, or does not let this process in.
        ValueError: as Ray says.
    """
    try:
        ray.init(log_to_driver=False)
    except ConnectionError as error:
        if AUTH_MODE in os.environ:
            raise
        # `ray start` asks for a token wherever there is one, and a job of this machine alone leaves one in ~/.ray.
        raise ConnectionError(f"{error}; if it asks for a token: export {AUTH_MODE}=token") from error


def check_address(address: str) -> None:
    """Find out in seconds what Ray itself tries for minutes.

    Raises:
        ConnectionError: nothing answers there.
        ValueError: it is no address of a cluster.
    """
    scheme, separator, place = address.rpartition("://")
    if scheme in ("http", "https"):
        raise ValueError(
            "this is where `ray job submit` finds the dashboard; a job started by hand joins the cluster at host:6379. "
            "Unset it to run on this machine alone"
        )
    if address in ("", "auto", "local") or (separator and scheme != "ray"):
        return  # Ray's own words
    try:
        split = urlsplit(f"//{place}")
        host, port = split.hostname, split.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise ValueError("no address of the form host:port")
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers there ({error}); start one there, or unset RAY_ADDRESS to run on this machine"
        ) from error


def quiet_ray_data() -> None:
    """Keep Ray Data's bars and progress lines off the console, where the job shows its own; its log files keep them."""
    DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        rays = type(handler).__module__.startswith("ray.")  # others' may hang there too, pytest's for one
        if rays and isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def resources_of(fit: FitConfig) -> dict[str, float]:
    """What Ray reserves for one worker of a fit, or one encoding actor."""
    return {"CPU": fit.cpus_per_worker} | ({"GPU": fit.gpus_per_worker} if fit.gpus_per_worker else {})


def visible_gpus(gpus: float) -> dict[str, dict[str, str]]:
    """Runtime environment of a process that was given `gpus`: one without any must not find the machine's own.

    Ray leaves all GPUs visible to a process that asked for none, and torch would use them.
    """
    return {} if gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
