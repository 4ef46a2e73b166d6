"""The command line: marl run | check | plugins | schema | merge | report | publish | ... Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from marl_core.cli.certify import certify
from marl_core.cli.chat import chat
from marl_core.cli.guests import add_commands
from marl_core.cli.log_lines import VERBOSE_OPTIONS, is_verbose, log_shown, verbosity
from marl_core.cli.new_plugin import new_plugin
from marl_core.cli.publish import publish
from marl_core.cli.warning_lines import MARL_WARNINGS, warnings_in_one_line
from marl_core.cli.wrapping import wrapped
from marl_core.config.device import device_of, machine_device
from marl_core.errors import ConfigError, MarlError, by_command
from marl_core.logs import LOADING, logger
from marl_core.registry.families import FAMILIES, family_named
from marl_core.registry.metadata import damaged_metadata_passed_over

if TYPE_CHECKING:
    from marl_core.config.run_config import RunConfig
    from marl_core.registry.catalog import Catalog

app = typer.Typer(
    name="marl",
    help="PPO for language models: policy, reference, reward and value share one frozen base through adapters.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

FileOrRun = Annotated[Path, typer.Argument(metavar="FILE", help="Config file (YAML), or the folder of a run.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. --set ppo.kl.coef=0.1. Repeatable."),
]
EXIT_INTERRUPTED = 130
Dtype = Literal["float32", "bfloat16", "float16"]


def _version(show: bool) -> None:
    if show:
        from marl_core import __version__

        typer.echo(f"marl-core {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Tell milestones, and what libraries say; -vv: phases with their seconds, too."
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options of all commands; `main` reads --debug and --verbose itself."""


@app.command()
def run(
    file: FileOrRun,
    sets: Sets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint; FILE may be the run folder.")
    ] = False,
    override: Annotated[bool, typer.Option("--override", help="Resume although the config was changed.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")] = False,
) -> None:
    """Train the policy that FILE describes."""
    from marl_core.cli.run_folder import told_where_it_started

    with (
        open(os.devnull, "w") if quiet else nullcontext(sys.stdout) as out,
        redirect_stdout(out),
        told_where_it_started(file),
    ):
        _run(file, sets, resume, override)


def _run(file: Path, sets: list[str] | None, resume: bool, override: bool) -> None:
    from marl_core.registry.catalog import Catalog

    catalog = Catalog.installed()
    if _is_folder(file) and not resume:
        from marl_core.cli.run_folder import not_started

        raise not_started(file)
    config, moved = _read(file, sets, catalog)
    from marl_core.artifacts.hub import require_hub
    from marl_core.cli.log_lines import start_shown
    from marl_core.cli.tables import show_notes, show_plan
    from marl_core.plan.describe import unseen
    from marl_core.plan.hub_names import hub_names
    from marl_core.plan.plan import Plan

    plan = Plan.of(config, catalog, command_line=True)
    plan.require()  # before the heavy imports: what can be known without weights is said at once
    is_first_rank = os.environ.get("RANK", "0") == "0"  # of several processes the first speaks
    if is_first_rank:
        _refuse_folder(config, resume, override)
    _set_up_process(device_of(config), config.speed.trim_memory)
    if moved is not None and is_first_rank:
        typer.echo(moved)
    if resume:
        from marl_core.store.finished import finished

        message = finished(config)
        if message is not None:
            if is_first_rank:
                typer.echo(message)
            return
    if is_first_rank:
        show_plan(plan)
    if unseen(plan):
        require_hub(config.model.path, "model.path", config.model.revision)
    for name in hub_names(plan):
        require_hub(name.name, name.key, name.revision)
    with start_shown():
        logger(LOADING).info("torch, transformers and peft")
        from marl_core.run.runner import Runner

        runner = Runner(plan, resume=resume, override=override)
        notes = runner.folder.notes if runner.folder is not None else []
        shown = show_notes(notes)
        runner.prepare()
        show_notes(notes[shown:])
    runner.train()


def _refuse_folder(config: RunConfig, resume: bool, override: bool) -> None:
    """What the Runner refuses of the run's folder, where that needs no weights: a run in it, or on resume another config."""
    if config.run.folder is None:
        return
    from marl_core.store.before_weights import CONFIG_FILE, refuse_taken
    from marl_core.store.config_diff import changed_keys

    folder = Path(config.run.folder).expanduser()
    if not resume:
        refuse_taken(folder)
    elif os.path.isfile(folder / CONFIG_FILE):
        changed_keys(folder / CONFIG_FILE, config, override=override)


@app.command()
def check(
    file: FileOrRun,
    sets: Sets = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate memory per role, and of four separate models.")
    ] = False,
    show: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Print the first N prompts as the model reads them.")
    ] = 0,
    all_rows: Annotated[
        bool, typer.Option("--all-rows", help="Check all rows of the prompts, not only the first 1,000.")
    ] = False,
) -> None:
    """Say everything about FILE that can be known without weights."""
    from marl_core.cli.prompts_shown import show_prompts
    from marl_core.cli.tables import console, show_memory, show_plan, show_unseen, show_warnings
    from marl_core.cli.without_torch import torch_kept_out
    from marl_core.data.check import ROWS_CHECKED, check_inputs
    from marl_core.plan.describe import unseen
    from marl_core.plan.hub_names import hub_names, not_here
    from marl_core.plan.plan import Plan, require_none
    from marl_core.registry.catalog import Catalog

    catalog = Catalog.installed()
    config, _ = _read(file, sets, catalog)
    plan = Plan.of(config, catalog, command_line=True)
    findings = plan.findings()
    with torch_kept_out():
        inputs = check_inputs(plan, findings, None if all_rows else max(ROWS_CHECKED, show))
        if show:
            show_prompts(inputs, show, console())
    require_none([*findings, *inputs.findings])
    show_plan(plan)
    stopping = plan.remarks_here()
    show_warnings([*inputs.remarks, *stopping])
    missing = [note for note in (unseen(plan), *not_here(plan), *inputs.unseen) if note]
    for note in missing:
        show_unseen(note)
    if memory:
        from marl_core.plan.memory import estimate

        show_memory(estimate(plan))
    as_far = ", as far as could be checked" if missing or hub_names(plan) else ""
    as_it_is = ", but it can't start on this machine as it is: see the warnings" if stopping else ""
    typer.echo(f"{file}: nothing speaks against this run{as_far}{as_it_is}.")


@app.command()
def plugins(
    family: Annotated[
        str | None, typer.Option("--family", metavar="|".join(FAMILIES), help="Only this kind of choice.")
    ] = None,
) -> None:
    """List the strategies installed here; broken ones in red."""
    families = list(FAMILIES.values()) if family is None else [family_named(family)]
    from marl_core.cli.tables import show_plugins
    from marl_core.registry.catalog import Catalog

    show_plugins(Catalog.installed(), families)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a config, the options of installed strategies included."""
    from marl_core.config.schema import json_schema
    from marl_core.registry.catalog import Catalog

    typer.echo(json.dumps(json_schema(Catalog.installed()), indent=2))


@app.command()
def merge(
    model: Annotated[str, typer.Option("--model", help="Folder or hub name of the base model.")],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the PEFT adapter.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the merged model; must not exist yet.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Dtype of the merged weights.")] = "float32",
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision of the base.")] = None,
) -> None:
    """Merge an adapter into its base, write a standalone model, and measure what the rounding changed."""
    from marl_core.artifacts.adapter_files import read_adapter
    from marl_core.artifacts.hub import is_hub_adapter
    from marl_core.artifacts.hub_models import require_model
    from marl_core.artifacts.new_folder import require_new_folder

    require_new_folder(out.expanduser(), "--out")  # before the heavy imports: what can be known without weights
    require_model(model, "--model", revision)
    if not is_hub_adapter(str(adapter)):
        read_adapter(adapter, "--adapter")
    _set_up_process("cpu")
    from marl_core.bank.merge import merge_adapter

    report = merge_adapter(model, str(adapter), out, dtype=dtype, revision=revision)
    typer.echo(
        f"{report.out}: merged in {report.seconds:.1f} s; against base + adapter the logits differ by at most "
        f"{report.max_logit_difference:.3g}, mean KL {report.mean_kl_nats:.3g} nats per token"
    )


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are laid over each other.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; RUN/report.html or RUN/comparison.html when absent.")
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Write every number of every step into this CSV file; a page too only with --out."),
    ] = None,
) -> None:
    """Write one HTML page about one or several runs, or their numbers as a CSV file."""
    if csv is not None:
        from marl_core.report.values import write_csv

        typer.echo(str(write_csv(folders, csv)))
        if out is None:
            return
    from marl_core.report.page import write_report

    typer.echo(str(write_report(folders, out)))


@app.command()
def replay(
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="Folder RUN/dumps/step-NNNNNN-PHASE.")],
    sets: Sets = None,
) -> None:
    """Repeat the phase that a run failed in, on the dumped batch and weights. Ends with the error's exit code, if it comes."""
    from marl_core.store.before_weights import require_dump

    require_dump(dump.expanduser())
    _set_up_process(machine_device())
    from marl_core.run.replay import replay as replay_dump

    outcome = replay_dump(dump, sets=sets or ())
    typer.echo(f"{dump}: step {outcome.step}, {outcome.phase}. Then: {outcome.then}")
    if outcome.now is not None:
        raise outcome.now
    again = " ".join(f"--set {shlex.quote(text)}" for text in sets or ())
    run_again = f"marl run {shlex.quote(str(dump.parent.parent))} --resume --override {again}".rstrip()
    typer.echo(f"Now it passes: {outcome.detail}.")
    typer.echo(f"Go on with the run: {run_again} (--override: what it was started with has changed)")


app.command("new-plugin")(new_plugin)
app.command("publish")(publish)
app.command("certify")(certify)
app.command("chat")(chat)


def _set_up_process(device: str, trim_memory: bool | None = None) -> None:
    """What the command line may do and the library may not: this process is marl's own. Before the libraries are imported.

    `trim_memory` as in the config. On CUDA memory is the device's, and nobody has measured what the C library's settings do there.
    """
    from marl_core.config.speed_config import is_on
    from marl_core.run.host import quiet_libraries, set_up_process

    if is_on(trim_memory, device):
        set_up_process()
    if not is_verbose():
        quiet_libraries()


def _is_folder(path: Path) -> bool:
    """Whether a folder is there; of a path that can't be one, no folder is."""
    return os.path.isdir(os.path.expanduser(path))


def _read(file: Path, sets: list[str] | None, catalog: Catalog) -> tuple[RunConfig, str | None]:
    """The config, and a sentence when it is that of a run folder which was moved.

    One from a file needs prompts.
    """
    from marl_core.config.load import load_config

    moved = None
    if _is_folder(file):
        from marl_core.cli.run_folder import config_of_run

        config, moved = config_of_run(file, sets or (), catalog)
    else:
        config = load_config(file, sets or (), catalog)
    if config.data is None:
        raise ConfigError(f"{file}: data: is needed, e.g. data: {{prompts: prompts.jsonl, field: prompt}}.")
    if not config.reward:
        raise ConfigError(
            f'{file}: reward: is needed, e.g. reward: {{use: function, target: "rewards.py:score"}}. '
            "Only a loop by hand, in Python, may bring its own scores."
        )
    return config, moved


with damaged_metadata_passed_over():
    add_commands(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code. Errors of the user's making are shown without a traceback."""
    argv = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in argv
    own = [argument for argument in argv if argument != "--debug" and argument not in VERBOSE_OPTIONS]
    try:
        with by_command(), damaged_metadata_passed_over(), warnings_in_one_line(), log_shown(verbosity(argv)):
            code = int(app(own, prog_name="marl", standalone_mode=False) or 0)
        return _fail("marl: interrupted", code, debug) if code == EXIT_INTERRUPTED else code  # typer swallows Ctrl-C
    except MarlError as error:
        return _fail(f"marl: {error}", error.exit_code, debug)
    except MARL_WARNINGS as warning:  # by -W error or PYTHONWARNINGS
        return _fail(f"marl: {warning} (A warning, which Python was told to treat as an error.)", 1, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("marl: interrupted", EXIT_INTERRUPTED, debug)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage, in whichever click typer carries
            error.show()
            return int(error.exit_code)
        from marl_core.artifacts.addresses import issues

        hint = "" if debug else " Run again with --debug for the traceback, and"
        where = issues()
        return _fail(
            f"marl: a bug in marl: {error!r}.{hint} please report it{f' at {where}' if where else ''}.", 1, debug
        )


def _fail(message: str, code: int, debug: bool) -> int:
    from marl_core.config.redact import redact

    text: str | None = (traceback.format_exc() if debug else "") + message
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one of several processes: the first cause is said once
        from marl_core.parallel.process_group import ending

        text, code = ending(sys.exc_info()[1], redact(str(text)), code)
    if text is not None:
        printable = redact(text).encode("utf-8", "backslashreplace").decode()  # half a surrogate can't be
        print(printable if debug else wrapped(printable, sys.stderr), file=sys.stderr)
    return code
