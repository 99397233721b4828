"""Types of actors' handles and results, as far as Ray says them: calls of methods marked `@ray.method` are checked."""

from typing import Any, Protocol, TypeVar, cast

import ray
from ray.actor import ActorHandle

Actor = TypeVar("Actor")
First = TypeVar("First")
Second = TypeVar("Second")
Handle = ActorHandle[Actor] | type[Actor]
"""What `ray.remote(Actor).remote()` returns, in Ray's own words: methods are found on the class."""

AnyRef = ray.ObjectRef[Any]
"""Of a value that is waited for but not looked at."""


class _Ready(Protocol):
    def remote(self) -> ray.ObjectRef[bool]: ...


class _Startable(Protocol):
    @property
    def __ray_ready__(self) -> _Ready: ...


def ready(handle: Handle[Actor]) -> ray.ObjectRef[bool]:
    """Done when the actor's constructor is."""
    return cast(_Startable, handle).__ray_ready__.remote()  # a method that Ray adds to every actor, but not to its type


def kill(handle: Handle[Actor]) -> None:
    """End the actor's process; its calls fail."""
    assert isinstance(handle, ActorHandle)
    ray.kill(handle)


def both(results: ray.ObjectRef[tuple[First, Second]]) -> tuple[ray.ObjectRef[First], ray.ObjectRef[Second]]:
    """The results of a method with `num_returns=2`, which Ray returns apart although it types them as one."""
    first, second = cast(list[AnyRef], results)
    return first, second
