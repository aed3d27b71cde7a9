"""Cells of scripts/bench/on_gpu/parts.py, answered in this process: a list as JSON on standard input,
a JSON line for each on standard output."""

import json
import sys
import warnings


def main() -> None:
    import jax

    warnings.simplefilter("ignore")
    cells = json.load(sys.stdin)
    if "client" in cells[0]:  # before the first device is asked for
        jax.config.update("jax_pjrt_client_create_options", cells[0]["client"])
    from scripts.bench.on_gpu import pictures, race, speed
    from zimage_jax.errors import ZImageError

    ways = race.WAYS | pictures.WAYS | speed.WAYS
    for cell in cells:
        try:
            answer = ways[cell["do"]](cell)
        except (ZImageError, jax.errors.JaxRuntimeError) as fault:
            answer = {"error": str(fault).strip().splitlines()[0]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
