"""Draw docs/figures/tower.svg and docs/figures/prompts-way.svg: the rooms with who imports whom, and one step's stations.

    python docs/make_architecture.py

Imports are read from the code, those for type checkers included. tests/house/test_arrows.py holds the order of ROOMS,
tests/house/test_architecture.py that the pictures are up to date and that a step goes through STATIONS in this order.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"

ROOMS = {
    "cli": "the command line, loaded on call",
    "testing": "the contract for authors of plugins",
    "run": "a run from start to end: runner, roles, evaluation, replay",
    "report": "the page, charts, model card: knows a run folder, nothing else",
    "safety": "pre-flight, checks of every step, watch on plugins, dumps",
    "store": "folder, checkpoints, lock, provenance: whole or not at all",
    "parallel": "one run as several processes",
    "data": "prompts, written as the model reads them",
    "ppo": "the step and its mathematics: sample, score, advantages, update",
    "bank": "one base, many adapters: views, heads, merging, identity, speed",
    "plan": "the config with its strategies, before any weight is read",
    "config": "what was asked for, and how it is read",
    "registry": "who offers what: families, strategies, hooks, catalog",
    "artifacts": "what files on disk say; no torch",
    "errors": "errors with exit codes, warnings",
    "logs": "the logger of milestones and phases",
}
"""From the top of the tower to the ground, each with its one idea. A room imports itself and those below it."""

CONTRACT = ("registry.hooks", "registry.hookspecs")
"""The contract with plugins: for type checkers alone it names what hooks are given and give, which lives further up."""


@dataclass(frozen=True)
class Station:
    """Where a step passes: a file, the function in it, and what it makes of what."""

    file: str
    function: str
    does: str


STATIONS = (
    Station("data/prompts.py", "PromptData.batch", "rows of data -> Prompts, left-padded"),
    Station("run/runner.py", "Runner.step", "the five lines of the algorithm"),
    Station("ppo/step.py", "Step.sample", "Prompts -> Rollout, shared out over the ranks"),
    Station("ppo/sampling/sampler.py", "PolicySampler.__call__", "the engine: its own loop, or transformers"),
    Station("ppo/sampling/decode.py", "decode", "a token a place: its id, and a PolicyOutput"),
    Station("ppo/step.py", "Step.score", "Rollout -> ScoredRollout: every role's numbers"),
    Station("ppo/scoring.py", "view_output", "policy, reference: log-probs through a view of the base"),
    Station("ppo/rewards.py", "score_all", "each source's scores, and their weighted sum"),
    Station("ppo/shaping.py", "shape", "scores -> shaped_scores"),
    Station("safety/step_checks.py", "StepChecks.check_scored", "finite, plausible, or an error that names the row"),
    Station("ppo/step.py", "Step.advantages", "ScoredRollout -> Advantages, by the estimator"),
    Station("ppo/update.py", "Update.run", "epochs, minibatches, optimizer steps -> UpdateStats"),
    Station("ppo/objectives.py", "policy_loss", "the clipped loss of a microbatch"),
    Station("ppo/metrics.py", "step_stats", "-> StepStats: the numbers under the field's names"),
)


def modules() -> dict[str, Path]:
    """Modules of the core, without `marl_core.`, by file."""
    core = ROOT / "marl_core"
    found = {}
    for file in sorted(core.rglob("*.py")):
        name = ".".join(file.relative_to(core).with_suffix("").parts).removesuffix(".__init__")
        if name.split(".")[0] in ROOMS:
            found[name] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the core that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("marl_core"):
            source = (node.module or "").removeprefix("marl_core").removeprefix(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".removeprefix(".")
                yield inner if inner in known else source
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("marl_core.") for a in node.names if a.name.startswith("marl_core."))


def room(module: str) -> str:
    """The room of a module."""
    return module.split(".")[0]


def graph() -> dict[str, set[str]]:
    """Each module with those that it imports. What the contract with plugins names further up is left out."""
    known, order = modules(), list(ROOMS)
    found: dict[str, set[str]] = {}
    for module, file in known.items():
        targets = {target for target in imports(file, known) if target in known and target != module}
        if module in CONTRACT:
            targets = {target for target in targets if order.index(room(target)) >= order.index(room(module))}
        found[module] = targets
    return found


def arrows() -> set[tuple[str, str]]:
    """Which room imports which other."""
    return {(room(module), room(target)) for module, targets in graph().items() for target in targets} - {
        (name, name) for name in ROOMS
    }


STYLE = """
text { font: 13px ui-sans-serif, system-ui, sans-serif; fill: #1f2328 }
.name { font-weight: 600 } .small { font-size: 11px; fill: #57606a } .code { font-family: ui-monospace, monospace; font-size: 12px }
.room { fill: #f6f8fa; stroke: #d0d7de } .cell { fill: #2563eb } .line { stroke: #d0d7de } .way { stroke: #2563eb; stroke-width: 2 }
"""


def svg(width: int, height: int, title: str, body: list[str]) -> str:
    """One picture, on a white ground: pages may be dark."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            *body,
            "</svg>",
            "",
        ]
    )


ROW, LEFT, CELL = 40, 470, 26


def tower() -> str:
    """Rooms one above the other; on the right a dot for each room that it imports."""
    found, names = arrows(), list(ROOMS)
    body = []
    for i, name in enumerate(names):
        top = 70 + i * ROW
        body += [
            f'<rect class="room" x="12" y="{top}" width="{LEFT - 24}" height="{ROW - 6}" rx="5"/>',
            f'<text class="name" x="24" y="{top + 15}">{name}</text>',
            f'<text class="small" x="24" y="{top + 29}">{escape(ROOMS[name])}</text>',
            f'<line class="line" x1="{LEFT}" x2="{LEFT + CELL * len(names)}" y1="{top + ROW - 3}" y2="{top + ROW - 3}"/>',
        ]
        for j, below in enumerate(names):
            x = LEFT + j * CELL
            if i == 0:
                body.append(
                    f'<text class="small" transform="translate({x + 17},62) rotate(-60)">{escape(below)}</text>'
                )
            if i == j:
                body.append(f'<rect x="{x + 4}" y="{top + 8}" width="18" height="18" rx="3" class="room"/>')
            if (name, below) in found:
                body.append(f'<circle class="cell" cx="{x + 13}" cy="{top + 17}" r="6"/>')
    height = 70 + len(names) * ROW + 10
    return svg(LEFT + CELL * len(names) + 40, height, "The rooms of marl_core and the imports between them", body)


def way() -> str:
    """The stations of one step, downwards."""
    body = [f'<line class="way" x1="26" x2="26" y1="28" y2="{28 + (len(STATIONS) - 1) * 36}"/>']
    for i, station in enumerate(STATIONS):
        y = 28 + i * 36
        body += [
            f'<circle cx="26" cy="{y}" r="10" fill="#2563eb"/>',
            f'<text x="26" y="{y + 4}" text-anchor="middle" style="fill:#ffffff;font-size:11px">{i + 1}</text>',
            f'<text class="code" x="50" y="{y + 4}">{escape(station.file)}</text>',
            f'<text class="code" x="250" y="{y + 4}">{escape(station.function.removesuffix(".__call__"))}</text>',
            f'<text class="small" x="440" y="{y + 4}">{escape(station.does)}</text>',
        ]
    return svg(780, 28 + len(STATIONS) * 36, "A prompt's way through one step", body)


FILES = {"tower.svg": tower, "prompts-way.svg": way}


def main() -> None:
    """Write both pictures."""
    for name, draw in FILES.items():
        (FIGURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
