"""What each number of a step means, and what is normal for it: one table for the report and for docs/metrics.md."""

from __future__ import annotations

from dataclasses import dataclass

METRICS_PAGE = "docs/metrics.md"
"""The page that says more about each of them, below a heading of its name."""
REWARD_PREFIX = "reward/"
PHASE_PREFIX = "perf/seconds_"
VALUE_SETTLES_AFTER = 20
"""Steps that a new value head needs before its numbers say anything about the settings: it begins knowing nothing."""


@dataclass(frozen=True, slots=True)
class MetricNote:
    """One metric: what it is, in which unit, what is normal, and outside of which bounds it is worth a look.

    `low` and `high` are bounds of the mean over some steps, not of one step, and both belong to what is normal; None is no bound.
    """

    name: str
    label: str
    """A few words, for the head of a chart."""
    unit: str
    """Empty for numbers without one: scores, ratios, shares, losses."""
    about: str
    """One sentence: what is measured."""
    normal: str
    """One or two sentences: what a healthy run shows."""
    low: float | None = None
    high: float | None = None
    below: str = ""
    """What a number below `low` means."""
    above: str = ""
    """What a number above `high` means."""
    settles_after: int = 0
    """Steps in which a healthy run may be outside of the bounds."""

    def remark(self, value: float | None, steps: int) -> str:
        """What is unusual about this value after so many steps; empty when nothing is, or when there is no value."""
        if value is None or steps < self.settles_after:
            return ""
        if self.low is not None and value < self.low:
            return self.below
        return self.above if self.high is not None and value > self.high else ""


_NO_SAMPLES = (
    "A KL can't be negative, so these responses aren't samples of the policy as it is scored "
    "(top_p, top_k, responses of your own)."
)

NOTES: tuple[MetricNote, ...] = (
    MetricNote(
        "objective/scores",
        "reward",
        "",
        "Mean score of the step's responses, as the rewards gave it, before shaping.",
        "It rises, with noise from step to step; how high it can get depends on your reward. Read the samples whenever it rises fast.",
    ),
    MetricNote(
        "objective/scores_std",
        "spread of the reward",
        "",
        "Standard deviation of the scores over the step's responses.",
        "Above 0: PPO learns from differences. It often falls as the reward gets near its maximum.",
        low=1e-8,
        below="All responses get the same score, so there is nothing to learn from: look at the reward and at the samples.",
    ),
    MetricNote(
        "objective/shaped_scores",
        "reward after shaping",
        "",
        "Mean score after `shaping` (penalty for answers that never end, normalization, clip): what PPO learns from.",
        "It equals the reward where `shaping` changes nothing; near 0 where shaping centres the scores.",
    ),
    MetricNote(
        "objective/rlhf_reward",
        "reward minus KL penalty",
        "",
        "Mean over responses of the sum of all token rewards: the shaped score minus the KL penalty.",
        "It rises. If it falls while the reward rises, the KL penalty grows faster than the reward.",
    ),
    MetricNote(
        "objective/kl",
        "KL to the reference",
        "nats a response",
        "How far the policy has moved from the reference: log-prob of the policy minus that of the reference, summed over a response (k1).",
        "It starts at 0 where policy and reference start alike, rises slowly and levels off. "
        "As an estimate it may be a little below 0 at first.",
        low=-2.0,
        below=_NO_SAMPLES,
    ),
    MetricNote(
        "objective/kl_k2",
        "KL, estimator k2",
        "nats a response",
        "Half the squared log-ratio of policy and reference, summed over a response: an estimate with little noise and some bias.",
        "Near `objective/kl` while both are small.",
    ),
    MetricNote(
        "objective/kl_k3",
        "KL, estimator k3",
        "nats a response",
        "r - 1 - log r with r = reference / policy, summed over a response: without bias and never negative.",
        "Near `objective/kl`. Much larger than it: a few tokens are far from the reference.",
    ),
    MetricNote(
        "objective/kl_per_token",
        "KL to the reference",
        "nats a token",
        "The KL to the reference as a mean over tokens, so that responses of any length compare.",
        "Below 0.5 in most runs; a text is hardly the reference's any more above 1.",
        low=-0.5,
        high=1.0,
        below=_NO_SAMPLES,
        above="Far from the reference: read the samples. To stay nearer, raise ppo.kl.coef, lower ppo.learning_rate, or set ppo.max_kl.",
    ),
    MetricNote(
        "objective/kl_coef",
        "KL coefficient",
        "",
        "What the KL penalty was multiplied by in this step (`ppo.kl.coef`).",
        "Constant; with `ppo.kl.target` it moves until the KL is near the target.",
    ),
    MetricNote(
        "objective/entropy",
        "entropy",
        "nats a token",
        "How undecided the policy is about the next token, as a mean over the tokens of the responses.",
        "It falls slowly. 1 to 4 is usual for free text; short, certain answers have less.",
        low=0.1,
        below="The policy hardly varies its texts any more, so it can't find better ones: "
        "lower ppo.learning_rate, raise ppo.kl.coef, or set ppo.entropy_coef.",
    ),
    MetricNote(
        REWARD_PREFIX + "NAME",
        "reward of one source",
        "",
        "Mean score of the reward source NAME, before its weight. Responses that it abstained from don't count.",
        "Each source that you want more of rises. One that falls while the sum rises is being traded for another.",
    ),
    MetricNote(
        "policy/loss",
        "policy loss",
        "",
        "The clipped surrogate loss, as a mean over tokens and updates.",
        "Small, around 0, of either sign. It need not fall: unlike a loss in supervised training it doesn't measure progress.",
    ),
    MetricNote(
        "policy/clipfrac",
        "clip fraction",
        "",
        "Share of tokens whose update PPO's clipping held back.",
        "0.01 to 0.2 while it learns. 0 for a whole run: the steps are very small.",
        high=0.3,
        above="Updates are too large for PPO's clipping: lower ppo.learning_rate or ppo.epochs, or set ppo.max_kl.",
    ),
    MetricNote(
        "policy/approx_kl",
        "KL old to new policy",
        "nats a token",
        "How far one step's updates moved the policy from the one that wrote the responses: half the mean squared log-ratio.",
        "0.001 to 0.05.",
        high=0.1,
        above="One step moves the policy far: lower ppo.learning_rate or ppo.epochs, or set ppo.max_kl.",
    ),
    MetricNote(
        "policy/ratio_mean",
        "mean ratio",
        "",
        "Mean over tokens of new / old probability during the updates.",
        "Very near 1.",
        low=0.9,
        high=1.1,
        below="The policy makes its own tokens less likely on average: the update steps are too long. Lower ppo.learning_rate.",
        above="A few tokens have become much more likely: the update steps are too long. Lower ppo.learning_rate.",
    ),
    MetricNote(
        "policy/ratio_std",
        "spread of the ratio",
        "",
        "Standard deviation of new / old probability over the tokens.",
        "Below 0.3.",
        high=0.5,
        above="Updates are long: lower ppo.learning_rate or ppo.epochs, or set ppo.max_kl.",
    ),
    MetricNote(
        "policy/ratio_min",
        "smallest ratio",
        "",
        "The smallest new / old probability of a token in the step.",
        "0.3 to 1; single tokens may be lower.",
        low=0.01,
        below="Single tokens become a hundred times less likely in one step: lower ppo.learning_rate or ppo.epochs.",
    ),
    MetricNote(
        "policy/ratio_max",
        "largest ratio",
        "",
        "The largest new / old probability of a token in the step.",
        "1 to 5; single tokens may be higher.",
        high=100.0,
        above="Single tokens become a hundred times likelier in one step: lower ppo.learning_rate or ppo.epochs, or set ppo.max_kl.",
    ),
    MetricNote(
        "policy/first_ratio_error",
        "error of the first ratio",
        "",
        "Largest distance from 1 of a ratio in the first minibatch, before any update: both log-probs are of the same weights.",
        "0 or rounding: up to 0.01 in float32, up to 0.35 in bfloat16.",
        high=0.35,
        above="The pass that trains doesn't compute what the pass that scored did: see the page on what to do when it goes wrong.",
    ),
    MetricNote(
        "policy/grad_norm",
        "gradient norm, policy",
        "",
        "Norm of the policy's gradient before clipping to `ppo.max_grad_norm`, as a mean over optimizer steps.",
        "Steady, 0.1 to 10. Sudden peaks are cut by the clipping.",
        high=1000.0,
        above="Very large gradients: look at the size of your scores (shaping.clip, shaping.normalize) and lower ppo.learning_rate.",
    ),
    MetricNote(
        "policy/learning_rate",
        "learning rate",
        "",
        "Learning rate of the policy's optimizer in this step.",
        "What `ppo.learning_rate`, `ppo.schedule` and `ppo.warmup_steps` say.",
    ),
    MetricNote(
        "policy/optimizer_steps",
        "optimizer steps",
        "optimizer steps",
        "Optimizer steps in this PPO step.",
        "epochs x batch / minibatch; fewer where `ppo.max_kl` stopped the updates.",
    ),
    MetricNote(
        "policy/stopped_early",
        "stopped by max_kl",
        "",
        "1 where `ppo.max_kl` ended the step's updates before the last epoch, else 0.",
        "0, or 1 now and then. 1 in every step: the learning rate is too high for this `ppo.max_kl`.",
        high=0.9,
        above="Nearly every step is ended by ppo.max_kl: lower ppo.learning_rate or ppo.epochs.",
    ),
    MetricNote(
        "val/loss",
        "value loss",
        "",
        "Half the squared error of the value function, clipped, as a mean over tokens and updates; 0 without a value function.",
        "It falls in the first steps and then follows the size of your scores.",
    ),
    MetricNote(
        "val/clipfrac",
        "clip fraction, value",
        "",
        "Share of tokens whose value update was clipped (`ppo.value_clip`).",
        "Below 0.3; more in the first steps. 0 without a value function.",
        high=0.6,
        settles_after=VALUE_SETTLES_AFTER,
        above="Most value updates are clipped, so the value learns slowly: raise or switch off ppo.value_clip, or make the scores smaller.",
    ),
    MetricNote(
        "val/grad_norm",
        "gradient norm, value",
        "",
        "Norm of the value's gradient before clipping, as a mean over optimizer steps; 0 without a value function.",
        "Steady. It grows with the size of your scores.",
    ),
    MetricNote(
        "val/explained_var",
        "explained variance of the value",
        "",
        "How much of the returns' variance the value function explains: 1 is all, 0 is what the mean explains.",
        "It starts near 0 or below and rises to 0.3 to 0.9 in some tens of steps.",
        low=0.0,
        settles_after=VALUE_SETTLES_AFTER,
        below="The value function is worse than the mean. Usual in the first steps; "
        "if it stays: raise value.learning_rate, or make the scores smaller.",
    ),
    MetricNote(
        "val/mean",
        "mean value",
        "",
        "Mean over tokens of the value function before the update: the return that it expects.",
        "It follows `val/returns_mean`.",
    ),
    MetricNote(
        "val/returns_mean",
        "mean return",
        "",
        "Mean over tokens of the returns that the value function learns.",
        "It follows the reward.",
    ),
    MetricNote(
        "tokens/mean_length",
        "response length",
        "tokens",
        "Mean length of the responses.",
        "It changes slowly. Rising together with the reward, without better texts, is the commonest way to cheat a reward.",
    ),
    MetricNote(
        "tokens/finished",
        "share that stopped by itself",
        "",
        "Share of responses that ended with a stop token, not at `sampling.max_new_tokens`.",
        "Near 1 for questions and answers; near 0 is right where texts are continued up to the limit.",
    ),
    MetricNote(
        "perf/seconds",
        "seconds a step",
        "seconds",
        "Time of the step: sampling, scoring, update. Evaluations and checkpoints aren't in it.",
        "Steady. It follows the length of the responses.",
    ),
    MetricNote(
        PHASE_PREFIX + "PHASE",
        "seconds of one phase",
        "seconds",
        "Time of one phase of the step: generate, score or update.",
        "Steady. The page on speed says which phase can be made faster by what.",
    ),
    MetricNote(
        "perf/tokens_per_second",
        "response tokens a second",
        "tokens a second",
        "Tokens of the responses divided by the time of the whole step, so a speed of training, not of sampling alone.",
        "Steady.",
    ),
)
"""Every metric that `step_stats` writes. A name in capitals stands for any: a reward source, a phase."""

_BY_NAME = {note.name: note for note in NOTES}
_PREFIXES = {
    prefix: _BY_NAME[prefix + any_name] for prefix, any_name in ((REWARD_PREFIX, "NAME"), (PHASE_PREFIX, "PHASE"))
}


def note_of(metric: str) -> MetricNote | None:
    """The note on a metric; None for what a reward function logged under a name of its own."""
    found = _BY_NAME.get(metric)
    return found or next((note for prefix, note in _PREFIXES.items() if metric.startswith(prefix)), None)
