"""marl: PPO for language models where policy, reference, reward and value share one frozen base."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marl_core.artifacts.adapter_files import read_adapter
    from marl_core.artifacts.adapter_kinds import base_refusal, config_refusal, known_kind
    from marl_core.artifacts.hub import cached_adapter, hub_read, is_repo_name
    from marl_core.artifacts.messages import message_text
    from marl_core.artifacts.model_files import cached_model_config
    from marl_core.artifacts.rows import read_rows
    from marl_core.bank.adapters import AdapterBank
    from marl_core.bank.identity.certify import write_certificate
    from marl_core.bank.merge import merge_adapter, merge_into
    from marl_core.bank.room import position_limit
    from marl_core.bank.views import ScoreView, View
    from marl_core.config.flatten import flatten
    from marl_core.config.load import dump_config, load_config
    from marl_core.config.run_config import (
        ClipSection,
        DataSection,
        EvalSection,
        KLSection,
        ModelSection,
        PolicySection,
        PPOSection,
        RunConfig,
        RunSection,
        SamplingSection,
        ShapingSection,
        SpeedSection,
        ValueSection,
    )
    from marl_core.errors import (
        ConfigError,
        DataError,
        MarlDeprecationWarning,
        MarlError,
        MarlWarning,
        NumericError,
        OutOfMemoryError,
        PluginError,
        RankError,
        near_match,
        warn,
    )
    from marl_core.plan.plan import Plan
    from marl_core.ppo.response_logprobs import response_logprobs
    from marl_core.ppo.reward_context import RewardContext, reward_context
    from marl_core.ppo.roles import ReferenceFunction, RewardFunction
    from marl_core.ppo.texts import ResponseDecoder
    from marl_core.ppo.types import Evaluation, Prompts, Rollout, RunResult, ScoredRollout, StepStats
    from marl_core.registry.callables import FunctionTarget, callable_name
    from marl_core.registry.catalog import Catalog
    from marl_core.registry.path_text import PathText
    from marl_core.registry.raised_from import raised_from
    from marl_core.registry.strategy import (
        ANY_QUANTIZATION,
        API,
        Adapter,
        AdvantageInputs,
        Estimator,
        Quantization,
        StopRun,
        Strategy,
        hookimpl,
    )
    from marl_core.report.inline import show_report
    from marl_core.report.page import write_report
    from marl_core.run.host import quiet_libraries
    from marl_core.run.runner import Runner
    from marl_core.store.files import append_lines, strict_json

_HOMES = {
    "marl_core.errors": (
        "ConfigError",
        "DataError",
        "MarlDeprecationWarning",
        "MarlError",
        "MarlWarning",
        "NumericError",
        "OutOfMemoryError",
        "PluginError",
        "RankError",
        "near_match",
        "warn",
    ),
    "marl_core.registry.strategy": (
        "ANY_QUANTIZATION",
        "API",
        "Adapter",
        "AdvantageInputs",
        "Estimator",
        "Quantization",
        "StopRun",
        "Strategy",
        "hookimpl",
    ),
    "marl_core.registry.callables": ("FunctionTarget", "callable_name"),
    "marl_core.registry.catalog": ("Catalog",),
    "marl_core.registry.path_text": ("PathText",),
    "marl_core.registry.raised_from": ("raised_from",),
    "marl_core.artifacts.adapter_files": ("read_adapter",),
    "marl_core.artifacts.adapter_kinds": ("base_refusal", "config_refusal", "known_kind"),
    "marl_core.artifacts.hub": ("cached_adapter", "hub_read", "is_repo_name"),
    "marl_core.artifacts.messages": ("message_text",),
    "marl_core.artifacts.model_files": ("cached_model_config",),
    "marl_core.artifacts.rows": ("read_rows",),
    "marl_core.config.flatten": ("flatten",),
    "marl_core.config.load": ("dump_config", "load_config"),
    "marl_core.plan.plan": ("Plan",),
    "marl_core.config.run_config": (
        "ClipSection",
        "DataSection",
        "EvalSection",
        "KLSection",
        "ModelSection",
        "PPOSection",
        "PolicySection",
        "RunConfig",
        "RunSection",
        "SamplingSection",
        "ShapingSection",
        "SpeedSection",
        "ValueSection",
    ),
    "marl_core.bank.adapters": ("AdapterBank",),
    "marl_core.bank.identity.certify": ("write_certificate",),
    "marl_core.bank.merge": ("merge_adapter", "merge_into"),
    "marl_core.bank.room": ("position_limit",),
    "marl_core.bank.views": ("ScoreView", "View"),
    "marl_core.ppo.response_logprobs": ("response_logprobs",),
    "marl_core.ppo.reward_context": ("RewardContext", "reward_context"),
    "marl_core.ppo.roles": ("ReferenceFunction", "RewardFunction"),
    "marl_core.ppo.texts": ("ResponseDecoder",),
    "marl_core.ppo.types": ("Evaluation", "Prompts", "Rollout", "RunResult", "ScoredRollout", "StepStats"),
    "marl_core.report.inline": ("show_report",),
    "marl_core.report.page": ("write_report",),
    "marl_core.run.host": ("quiet_libraries",),
    "marl_core.run.runner": ("Runner",),
    "marl_core.store.files": ("append_lines", "strict_json"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ANY_QUANTIZATION",
    "API",
    "Adapter",
    "AdapterBank",
    "AdvantageInputs",
    "Catalog",
    "ClipSection",
    "ConfigError",
    "DataError",
    "DataSection",
    "Estimator",
    "EvalSection",
    "Evaluation",
    "FunctionTarget",
    "KLSection",
    "MarlDeprecationWarning",
    "MarlError",
    "MarlWarning",
    "ModelSection",
    "NumericError",
    "OutOfMemoryError",
    "PPOSection",
    "PathText",
    "Plan",
    "PluginError",
    "PolicySection",
    "Prompts",
    "Quantization",
    "RankError",
    "ReferenceFunction",
    "ResponseDecoder",
    "RewardContext",
    "RewardFunction",
    "Rollout",
    "RunConfig",
    "RunResult",
    "RunSection",
    "Runner",
    "SamplingSection",
    "ScoreView",
    "ScoredRollout",
    "ShapingSection",
    "SpeedSection",
    "StepStats",
    "StopRun",
    "Strategy",
    "ValueSection",
    "View",
    "__version__",
    "append_lines",
    "base_refusal",
    "cached_adapter",
    "cached_model_config",
    "callable_name",
    "config_refusal",
    "dump_config",
    "flatten",
    "hookimpl",
    "hub_read",
    "is_repo_name",
    "known_kind",
    "load_config",
    "merge_adapter",
    "merge_into",
    "message_text",
    "near_match",
    "position_limit",
    "quiet_libraries",
    "raised_from",
    "read_adapter",
    "read_rows",
    "response_logprobs",
    "reward_context",
    "show_report",
    "strict_json",
    "warn",
    "write_certificate",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: guests can import us without torch."""
    if name == "__version__":
        try:
            return version("marl-core")
        except PackageNotFoundError:
            return "unknown (not installed)"
    if name not in _HOME:
        raise AttributeError(f"module 'marl_core' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
