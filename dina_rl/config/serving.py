"""Settings of a scorer that answers over HTTP."""

import ipaddress
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from dina_rl.config.base import NonNegative, Positive, Rate, Section
from dina_rl.config.scoring import PictureScorerConfig


class ServeRun(Section):
    """Answer over HTTP what a scorer says of latents or pictures."""

    scorer: PictureScorerConfig = PictureScorerConfig()
    """levels and draws hold where a request names none"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0: every one that this machine has"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    """0: a free one, which is said"""
    token: bool = True
    """who asks must show the token: DINA_RL_SERVE_TOKEN of the environment, or else that of token_file"""
    token_file: Path = Path("~/dina_rl/serve_token")
    """file of the token, for its owner alone; drawn and written where there is none"""
    max_batch: Positive = 16
    """rows of a forward: samples times levels, but always one sample whole"""
    wait_ms: Annotated[float, Field(ge=0)] = 5.0
    """how long a sample waits for others to share a forward with"""
    same_bits: bool = False
    """dina: every forward has all its rows, the last sample repeated where there are fewer. A score is then the same to
    the bit whatever is scored beside it, and a single sample costs what a full batch does"""
    max_samples: Positive = 1024
    """samples of a request"""
    max_levels: Positive = 8
    """levels that a request may ask for"""
    max_draws: Positive = 16
    """noise draws that a request may ask for"""
    max_requests: Positive = 64
    """requests that are read, wait or are scored at a time; any more are refused for the moment (HTTP 503)"""
    max_body_mib: Positive = 64
    """size of a request (HTTP 413 beyond)"""
    max_held_mib: Positive = 512
    """size of all requests together that are read, wait or are scored (HTTP 503 beyond)"""
    read_timeout_s: Rate = 10.0
    """time for a request to arrive whole (HTTP 408 beyond)"""
    timeout_s: Rate = 120.0
    """time from there to its scores (HTTP 504 beyond), and for what is under way when the server is told to stop"""
    seed: NonNegative = 0
    """seed of the noise where a request names none"""

    @model_validator(mode="after")
    def _nobody_reaches_it_without_a_token(self) -> Self:
        if not self.token and not _is_loopback(self.host):
            raise ValueError(f"token: others reach {self.host}; without a token it is 127.0.0.1 alone")
        return self

    @model_validator(mode="after")
    def _limits_fit(self) -> Self:
        if self.scorer.noise == "independent":
            raise ValueError("scorer.noise: a request does not name its samples, which then share their prompt's noise")
        if len(self.scorer.levels or ()) > self.max_levels or self.scorer.draws > self.max_draws:
            raise ValueError("scorer.levels and scorer.draws are beyond max_levels and max_draws")
        if self.max_held_mib < self.max_body_mib:
            raise ValueError(f"max_held_mib ({self.max_held_mib}) has no room for a request of {self.max_body_mib} MiB")
        if self.same_bits and self.scorer.kind != "dina":
            raise ValueError(f"same_bits: only a dina scorer has that; kind is {self.scorer.kind}")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
