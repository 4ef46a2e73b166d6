"""The dialog of `marl init`: asks on a terminal, and takes options in place of answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

import typer

from marl_core import ConfigError
from marl_plugins.init_answers import Problem, is_at_hub


class RefusedError(ConfigError):
    """All options that can't stand in a config, told at once: nothing is to be added."""


class Dialog:
    """Asks on a terminal, and takes options in place of answers; without a terminal nothing is asked.

    Without a terminal wrong options are gathered in `wrong`, so that all of them can be told at once.
    """

    def __init__(self, options: Mapping[str, str | None]) -> None:
        self._options = options
        self.is_interactive = sys.stdin is not None and sys.stdin.isatty()
        self.wrong: list[tuple[str | None, str]] = []
        """Options that can't stand in a config, by name, each with the sentence that tells it; None: it is about several."""

    def answer(self, name: str, question: str, problem: Problem, default: str | None = None) -> str:
        """The option `--name`, or what is asked, until it can stand in a config; `default` for an empty answer, or where nobody asks."""
        given = self._options[name]
        if given is not None:
            return self._given(name, given.strip(), problem)
        if not self.is_interactive:
            if default is None:
                raise ConfigError(f"--{name}: an answer is needed, and there is no terminal to ask on. {question}?")
            return default
        while True:
            answer = str(typer.prompt(question, default=default or "", show_default=bool(default))).strip()
            reason = problem(answer)
            if reason is None:
                return answer
            typer.echo(f"  {reason}")

    def place(
        self,
        name: str,
        question: str,
        problem: Problem,
        default: str | None = None,
        is_elsewhere: Callable[[str], bool] = is_at_hub,
    ) -> str:
        """As `answer`, for what may be a name on the hub: of one that isn't here a person is asked; of an option `marl check` tells it."""
        while True:
            answer = self.answer(name, question, problem, default)
            if not answer or self.is_wrong(name) or not is_elsewhere(answer):
                return answer
            if self._options[name] is not None:
                return answer
            asked = f"Nothing here is called {answer!r}. Is it a name on the hub?"
            if self.agreed(None, asked, "/" in answer):
                return answer

    def is_given(self, name: str) -> bool:
        """Whether an option answers, and not with nothing."""
        return bool((self._options[name] or "").strip())

    def agreed(self, given: bool | None, question: str, default: bool) -> bool:
        """A yes or no: the option, or what is asked, or the default."""
        if given is not None or not self.is_interactive:
            return default if given is None else given
        while True:
            asked = f"{question} [{'Y/n' if default else 'y/N'}]"
            answer = str(typer.prompt(asked, default="y" if default else "n", show_default=False)).strip().lower()
            if answer in ("y", "yes", "n", "no"):
                return answer.startswith("y")
            typer.echo("  Answer y or n.")

    def is_wrong(self, name: str) -> bool:
        """Whether the option `--name` can't stand in a config."""
        return any(option == name for option, _ in self.wrong)

    def complain(self, name: str, reason: str) -> None:
        """The option `--name` can't stand in a config: ConfigError on a terminal, else it is told with all others."""
        self.wrong.append((name, f"--{name}: {reason}"))
        if self.is_interactive:
            self.refuse()

    def refuse(self) -> None:
        """RefusedError with all options that can't stand in a config, if there are any."""
        sentences = [sentence for _, sentence in self.wrong]
        if len(sentences) > 1:
            raise RefusedError(
                "\n".join(["marl init: these answers can't stand in a config:", *(f"  {one}" for one in sentences)])
            )
        if sentences:
            raise RefusedError(sentences[0])

    def _given(self, name: str, answer: str, problem: Problem) -> str:
        reason = problem(answer)
        if reason:
            self.complain(name, reason)
        return answer
