"""Write the metrics in docs/metrics.md: `python docs/make_metrics_page.py`.

What a metric is and what is normal is said once, in marl_core/report/metric_notes.py, for the report and for this page. Formulas are here,
because a report has no room for them.
"""

from __future__ import annotations

import re
from pathlib import Path

from marl_core.report.metric_notes import NOTES, MetricNote

PAGE = Path(__file__).with_name("metrics.md")
BEGIN, END = "<!-- metrics -->", "<!-- /metrics -->"
GROUPS = {
    "objective": "What is optimized: reward, KL to the reference, entropy. Measured on the step's responses, before the update.",
    "reward": "One number for each reward source, by the name it has in the config (`name`, or else its strategy's).",
    "policy": "What the update did to the policy. Means over all minibatches of all epochs of the step.",
    "val": "The value function. Absent or 0 where the advantage estimator needs none (`rloo`, `grpo`).",
    "tokens": "The responses.",
    "perf": "Where the time went.",
}
FORMULAS = {
    "objective/scores": "`mean_i S_i`, `S_i = sum_k weight_k · score_k(i)` over the reward sources `k`",
    "objective/scores_std": "`sqrt(sum_i (S_i - mean S)² / (B - 1))`; 0 for one response",
    "objective/shaped_scores": "`mean_i R_i`, `R_i = clip((S_i - penalty_i - mean) / std)`, each part only where `shaping` asks for it",
    "objective/rlhf_reward": "`mean_i sum_t r_t`. With `ppo.kl.into: reward` that is `mean_i (R_i - coef · sum_t k_t)`, where `k_t` is "
    "`ppo.kl.estimator`'s estimate; with `into: loss` it is `mean_i R_i`",
    "objective/kl": "k1: `mean_i sum_t (log π(y_t) - log π_ref(y_t))`; 0 where no reference is asked",
    "objective/kl_k2": "`mean_i sum_t (log π_ref(y_t) - log π(y_t))² / 2`",
    "objective/kl_k3": "`mean_i sum_t (r_t - 1 - log r_t)`, `r_t = π_ref(y_t) / π(y_t)`",
    "objective/kl_per_token": "`sum_i sum_t (log π(y_t) - log π_ref(y_t)) / number of tokens`",
    "objective/kl_coef": "`ppo.kl.coef`; with `ppo.kl.target`, after each step "
    "`coef · (1 + clip(kl / target - 1, -0.2, 0.2) · B / horizon)`",
    "objective/entropy": "`- sum_v π(v) log π(v)` over the whole vocabulary at `sampling.temperature`, mean over tokens",
    "reward/NAME": "`mean_i score_k(i)` over the responses that it judged",
    "policy/loss": "`mean of -min(ρ_t A_t, clip(ρ_t, 1 - low, 1 + high) A_t)`, `ρ_t = π(y_t) / π_old(y_t)`. "
    "A KL or entropy term of the loss isn't in it",
    "policy/clipfrac": "share of tokens where the clipped loss is the larger one (or the bound of `ppo.dual_clip` holds)",
    "policy/approx_kl": "`mean of (log π(y_t) - log π_old(y_t))² / 2`",
    "policy/ratio_mean": "`mean of ρ_t`",
    "policy/ratio_std": "`sqrt(mean of ρ_t² - (mean of ρ_t)²)`",
    "policy/ratio_min": "`min of ρ_t`",
    "policy/ratio_max": "`max of ρ_t`",
    "policy/first_ratio_error": "`max of |ρ_t - 1|` over the first minibatch",
    "policy/grad_norm": "`sqrt(sum of g²)` over the policy adapter's gradient, mean over optimizer steps",
    "policy/learning_rate": "`ppo.learning_rate` times the schedule's factor at this step",
    "policy/optimizer_steps": "a count; at most `epochs · batch / minibatch`, the last minibatch of an epoch may be smaller",
    "policy/stopped_early": "0 or 1",
    "val/loss": "`mean of max((V_t - G_t)², (clip(V_t, V_old - c, V_old + c) - G_t)²) / 2`, `c = ppo.value_clip`, `G_t` the return",
    "val/clipfrac": "share of tokens where the clipped error is the larger one",
    "val/grad_norm": "`sqrt(sum of g²)` over the value head (and the value's adapter with `value.on: own`), mean over optimizer steps",
    "val/explained_var": "`1 - Var(G - V_old) / Var(G)` over all tokens of the step, `V_old` the values before the update; "
    "0 where the returns don't vary",
    "val/mean": "`mean of V_old`, the values before the update",
    "val/returns_mean": "`mean of G_t`, `G_t = A_t + V_t` of generalized advantage estimation, before whitening",
    "tokens/mean_length": "number of tokens / `B`; a stop token counts",
    "tokens/finished": "responses with a stop token or stop string / `B`",
    "perf/seconds": "sum of the phases' seconds",
    "perf/seconds_PHASE": "wall-clock seconds: `generate` (sampling), `score` (policy, reference, value, rewards), `update`",
    "perf/tokens_per_second": "number of tokens / `perf/seconds`",
}
"""Of each metric, as marl_core/ppo/metrics.py, objectives.py and update.py compute it."""


def main() -> None:
    """Write what stands between the two marks."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The page with its metrics as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{metrics()}\n{END}{rest.split(END)[1]}"


def metrics() -> str:
    """A section for each group, and in it one for each metric."""
    parts = []
    for group, about in GROUPS.items():
        parts.append(f"## {group}/\n\n{about}")
        parts += [section(note) for note in NOTES if note.name.startswith(f"{group}/")]
    return "\n\n".join(parts)


def section(note: MetricNote) -> str:
    """One metric: what it is, its formula, what is normal, what to do when it isn't."""
    lines = [
        f"### `{note.name}`",
        f"**{note.label[0].upper()}{note.label[1:]}**, {note.unit or 'no unit'}. {note.about}",
        f"- Formula: {FORMULAS[note.name]}.",
        f"- Normal: {note.normal}",
    ]
    if note.low is not None:
        lines.append(f"- Below {number(note.low)}: {keys(note.below)}")
    if note.high is not None:
        lines.append(f"- Above {number(note.high)}: {keys(note.above)}")
    head, about, *bullets = lines
    return f"{head}\n\n{about}\n\n" + "\n".join(bullets)


def number(value: float) -> str:
    """A bound in words: one that is there to tell 0 from anything else is 0."""
    return f"{value:g}" if abs(value) > 1e-6 else "or at 0" if value else "0"


def keys(text: str) -> str:
    """Config keys as code; the report shows the same sentence as plain text."""
    return re.sub(
        r"(?<![`\w])((?:ppo|value|shaping|sampling|policy)\.[a-z_]+(?:\.[a-z_]+)?)(?=[\s,.:;)]|$)", r"`\1`", text
    )


if __name__ == "__main__":
    main()
