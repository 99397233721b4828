"""How a job that was started by hand or by `ray job submit` gets its Ray."""

import logging
import os

import ray
from ray.data import DataContext


def start_ray() -> None:
    """Join the cluster this job was submitted to, else start Ray on this machine's loopback; nothing if it runs."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )


def quiet_ray_data() -> None:
    """Keep Ray Data's bars and progress lines off the console, where the job shows its own; its log files keep them."""
    DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        rays = type(handler).__module__.startswith("ray.")  # others' may hang there too, pytest's for one
        if rays and isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


def visible_gpus(gpus: float) -> dict[str, dict[str, str]]:
    """Runtime environment of a process that was given `gpus`: one without any must not find the machine's own.

    Ray leaves all GPUs visible to a process that asked for none, and torch would use them.
    """
    return {} if gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
