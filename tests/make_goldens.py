"""Write tests/goldens/*.npz: what the PyTorch classes give for every small configuration and ControlNet. Needs the
reference extra.

python -m tests.make_goldens
"""

from pathlib import Path

import numpy as np

from tests import reference
from tests.small import CONFIGS

TESTS = Path(__file__).resolve().parent


def main() -> None:
    for name in (*CONFIGS, "control"):
        path = TESTS / "goldens" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        found = reference.controlled() if name == "control" else reference.outputs(name)
        # bfloat16 results only serve to measure PyTorch's own error, so half precision holds them
        # well enough
        np.savez_compressed(
            path,
            **{k: v.astype(np.float16) if k.endswith("_bf16") else v for k, v in found.items()},
        )
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
