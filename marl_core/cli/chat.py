"""`marl chat`: a trained policy and the model that it started from, side by side."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from marl_core.run.talk import Answer, Messages, Talk

SIDE_BY_SIDE_WIDTH = 90
"""Columns of the terminal from which two answers stand beside each other."""
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COMMAND = re.compile(r"/[a-z?]*")
"""What is typed as a command; a path or a sentence that begins with a slash is something to say."""
HELP = "/reset begins anew, /quit ends (so do Ctrl-D and Ctrl-C)."


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or an adapter folder with --model.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or hub name of the base, for an adapter folder.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision of --model.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Dtype of --model; a run has its own.")
    ] = "float32",
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None,
        typer.Option("--device", help="Where the base lives; the run's own when absent."),
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", help="The checkpoint of this step; the newest when absent.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Ask this and end. Repeatable; each is a new one."),
    ] = None,
    as_chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain", help="Write prompts by the chat template, or as they are; as the run did when absent."
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="System message of a chat; the run's own when absent."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 takes the likeliest token; the run's own when absent.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer; the run's own when absent.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the answers, the same for both.")] = 0,
    score: Annotated[bool, typer.Option("--score", help="Score each answer by the run's reward.")] = False,
) -> None:
    """Talk to a run's policy and to the model that it started from, side by side."""
    from marl_core.artifacts.adapter_files import read_adapter
    from marl_core.artifacts.hub_models import require_model
    from marl_core.errors import ConfigError
    from marl_core.store.before_weights import require_run

    folder = run.expanduser()
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.yaml").is_file()
    if is_adapter and model is None:
        raise ConfigError(f"chat: {run} is an adapter. Give the base it was trained on: --model BASE.")
    if is_adapter and (step is not None or score):
        raise ConfigError(
            f"chat: {run} is an adapter, so there is no {'--step' if step is not None else '--score'}; a run folder has."
        )
    if not is_adapter and (model is None or not folder.is_dir()):
        require_run(folder, "chat")
    if not is_adapter and model is not None:
        raise ConfigError(f"chat: {run} is no adapter folder, and a run has its own base. Leave --model out.")
    if model is not None:
        require_model(model, "--model", revision)
        read_adapter(folder, "chat")
    from marl_core.run.host import quiet_libraries

    quiet_libraries()
    from marl_core.run.talk import Talk

    if model is None:
        talk = Talk.of_run(folder, step, device)
    else:
        talk = Talk.of_adapter(str(folder), model, dtype=dtype, revision=revision, device=device or "auto")
    talk = talk.with_sampling(temperature=temperature, max_new_tokens=max_tokens)
    if score:
        _score_by_run(talk, folder)
    _Dialog(talk, as_chat, system, seed).hold(prompt)


def _score_by_run(talk: Talk, folder: Path) -> None:
    from marl_core.cli.run_folder import config_of_run
    from marl_core.plan.plan import Plan
    from marl_core.registry.catalog import Catalog

    catalog = Catalog.installed()
    config, _ = config_of_run(folder, (), catalog)
    talk.score_by(Plan.of(config, catalog))


class _Dialog:
    """What was said so far, by each voice, and how it is shown."""

    def __init__(self, talk: Talk, as_chat: bool | None, system: str | None, seed: int) -> None:
        from rich.console import Console

        from marl_core.errors import ConfigError

        self._talk, self._system, self._seed = talk, system, seed
        self._raw = as_chat is False  # as it is typed, without the run's own template of columns
        wanted = as_chat if as_chat is not None else talk.chats
        self._is_chat = talk.has_template if wanted is None else wanted
        if self._is_chat and not talk.has_template:
            raise ConfigError("chat: this model's tokenizer has no chat template. Ask with --plain.")
        if system is not None and not self._is_chat:
            raise ConfigError("chat: a system message belongs to a chat. Add --chat, or leave --system out.")
        self._console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        self._start_anew()

    def hold(self, prompts: Iterable[str] | None) -> None:
        """Ask the prompts given, or the lines of a pipe, each anew; at a terminal talk until the user ends it."""
        from marl_core.errors import MarlError

        if prompts is None and sys.stdin.isatty():
            self._show_head()
            for text in _typed():
                if text == "/reset":
                    self._start_anew()
                    self._console.print("begun anew", style="dim")
                    continue
                if COMMAND.fullmatch(text):
                    self._console.print(f"{text} is no command here. {HELP}", style="dim", markup=False)
                    continue
                try:
                    self._ask(text)
                except MarlError as error:
                    self._console.print(
                        f"marl: {error}", style="yellow", markup=False, soft_wrap=not self._console.is_terminal
                    )
                except KeyboardInterrupt:
                    self._console.print("no answer: interrupted", style="dim")
            return
        for text in sys.stdin if prompts is None else prompts:
            if text.strip():
                self._start_anew()
                self._ask(text.rstrip("\n"))

    def _start_anew(self) -> None:
        opened = self._talk.opened(self._system) if self._is_chat else []
        self._histories: list[Messages] = [list(opened) for _ in self._talk.voices]
        self._turn = 0

    def _ask(self, text: str) -> None:
        said = {"role": "user", "content": text}
        prompts = [
            [*history, said] if self._is_chat else text if self._raw else self._talk.prompt(text)
            for history in self._histories
        ]
        answers = [
            self._talk.answer(voice, prompt, self._seed + self._turn)
            for voice, prompt in zip(self._talk.voices, prompts, strict=True)
        ]
        for history, answer in zip(self._histories, answers, strict=True):
            history += [said, {"role": "assistant", "content": answer.text}]
        self._turn += 1
        self._show(text, answers)

    def _show_head(self) -> None:
        way = "chat" if self._is_chat else "plain text"
        for voice in self._talk.voices:
            self._console.print(
                f"{voice.name + ':':<8}{voice.about}", markup=False, soft_wrap=not self._console.is_terminal
            )
        sampling = self._talk.sampling
        drawn = "the likeliest token" if sampling.top_k == 1 else f"temperature {sampling.temperature:g}"
        self._console.print(f"{way}, {drawn}, at most {sampling.max_new_tokens} tokens. {HELP}", style="dim")

    def _show(self, asked: str, answers: list[Answer]) -> None:
        from rich.table import Table
        from rich.text import Text

        cells = [Text.assemble(_printable(answer.text) or "(nothing)", (_remark(answer), "dim")) for answer in answers]
        if self._console.is_terminal and self._console.width >= SIDE_BY_SIDE_WIDTH:
            table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True, header_style="bold")
            for voice in self._talk.voices:
                table.add_column(voice.name, ratio=1)
            table.add_row(*cells)
            self._console.print(table)
            self._tell_unscored(answers)
            return
        if not self._console.is_terminal:
            self._console.print(Text.assemble(("prompt: ", "bold"), asked), soft_wrap=True)
        for voice, cell in zip(self._talk.voices, cells, strict=True):
            self._console.print(
                Text.assemble((f"{voice.name}: ", "bold"), cell), soft_wrap=not self._console.is_terminal
            )
        self._tell_unscored(answers)

    def _tell_unscored(self, answers: list[Answer]) -> None:
        """Below the answers why there is no score, once where it is the same for both."""
        for reason in dict.fromkeys(answer.no_score for answer in answers if answer.no_score):
            self._console.print(
                f"[no score: {reason}]", style="yellow", markup=False, soft_wrap=not self._console.is_terminal
            )


def _printable(text: str) -> str:
    """An answer without what a terminal would take for a command: a model may say anything."""
    return CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text.strip("\n"))


def _remark(answer: Answer) -> str:
    """What there is to know of an answer beside its text."""
    cut = "" if answer.finished else f"  [cut at {answer.tokens} tokens]"
    return cut if answer.score is None else f"{cut}  [score {answer.score:.3f}]"


def _typed() -> Iterator[str]:
    """What is typed, line by line, until /quit, Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrows and history
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text:
            yield text
