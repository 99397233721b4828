"""The released MPS as safetensors, once: `python -m jobs.convert_mps MPS_overall_checkpoint.pth OUT.safetensors`.

It was published as a pickled module, which torch can only load by running what the pickle says. Here its tensors are
read without that, and no run ever opens the pickle.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dina_rl.cli import fail, stoppable
from dina_rl.scorers.mps import convert_mps

USAGE = "python -m jobs.convert_mps MPS_overall_checkpoint.pth OUT.safetensors"


def main(argv: Sequence[str]) -> None:
    if len(argv) != 2 or argv[0].startswith("-"):
        fail(f"usage: {USAGE}")
    released, out = (Path(word).expanduser() for word in argv)
    if out.suffix != ".safetensors":
        fail(f"{out} must end in .safetensors")
    try:
        with stoppable():
            count = convert_mps(released, out)
    except ValueError as error:
        fail(str(error))
    print(f"{count} tensors in {out}")


if __name__ == "__main__":
    main(sys.argv[1:])
