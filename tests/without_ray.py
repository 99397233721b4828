"""Runs jobs in one process where, for all that imports and metadata can tell, ray and deepspeed are not installed.

python -m tests.without_ray '[["jobs.fit_reward", "--inline"], ["jobs.score", "--images", "a.png"]]'
"""

import importlib
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from types import ModuleType

ABSENT = ("ray", "deepspeed")


class Others(DistributionFinder):
    """Finds what the usual finders find, modules and distributions, but `ABSENT`."""

    def __init__(self) -> None:
        self._finders = tuple(sys.meta_path)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in ABSENT:
            return None
        specs = (finder.find_spec(name, path, target) for finder in self._finders)
        return next((spec for spec in specs if spec is not None), None)

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        found = MetadataPathFinder.find_distributions(context or DistributionFinder.Context())
        return (distribution for distribution in found if distribution.name not in ABSENT)


def main(commands: Sequence[Sequence[str]]) -> None:
    sys.meta_path[:] = [Others()]
    for module, *argv in commands:
        importlib.import_module(module).main(argv)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
