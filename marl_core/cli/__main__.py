"""`python -m marl_core.cli`, as `accelerate launch -m` and `torchrun -m` start it."""

from marl_core.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
