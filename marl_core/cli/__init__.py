"""The command line: `marl`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return its exit code."""
    from marl_core.cli import app

    return app.main(arguments)
