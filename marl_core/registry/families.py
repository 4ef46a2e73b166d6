"""The kinds of choice that a config makes: one record for each, which says all that follows from there being such a kind.

From the records follow the config's keys and their types, the schema, short forms, the entry-point groups, what a plan builds, what
`marl new-plugin` writes, which contract `check_strategy` holds a strategy to, and the tables of the docs. A new family is a record here, a
hook's specification (registry/hookspecs.py) with its typed method (registry/hooks.py), and a contract (testing/contract.py).

No pydantic here: the command line shows the families before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from marl_core.artifacts.kind_options import how_to_ask
from marl_core.errors import ConfigError, near_match

FamilyName: TypeAlias = str
"""A name among FAMILIES."""


@dataclass(frozen=True, slots=True)
class Key:
    """A config key that names strategies of a family."""

    path: str
    """The sections and the key, with dots between: `ppo.advantage`."""
    about: str
    """What the schema and docs/config.md say of the key."""
    many: Literal["one", "list", "named"] = "one"
    """How many it names: one, a list (in which a single one may stand alone), or any number, each under a name."""
    default: str | None = None
    """The strategy where the config names none; a key for one that has no default must be given."""
    at_least: int = 0
    """Of a list: how many a run must name that goes from beginning to end by itself. A loop by hand, in Python, may bring what they give;
    so the list is empty where the config says nothing."""
    with_folder: str | None = None
    """Of a list: the strategy that is a member of every run with a run folder, named or not."""
    on_command_line: str | None = None
    """Of a list: the strategy that is a member of every run that `marl run` starts, named or not."""

    @property
    def section(self) -> str:
        """The section that holds it, dotted; empty for a key of the config itself."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The key's name inside its section."""
        return self.path.rpartition(".")[2]

    @property
    def how_many(self) -> str:
        """`many` in words."""
        if self.many == "one":
            return "one"
        return "one, or a list" if self.at_least else "any number"


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of choice, and all that is said of it anywhere."""

    name: FamilyName
    about: str
    """What it decides, in one sentence."""
    required_hook: str | None
    """The hook that each member must have."""
    contract: str
    """The function of testing/contract.py that `check_strategy` calls for its members."""
    keys: tuple[Key, ...]
    """The config keys that name its members; the first one is the family's own."""
    choice: str = "Choice"
    """The class of config/choice.py that holds what a config may say beside a strategy's own options."""
    example: str = "{use: $name}"
    """How a config names the strategy that `marl new-plugin` writes: the value of the first key."""
    from_callable: tuple[str, str] | None = None
    """The strategy that a function stands for where Python gives one in a member's place, and its option that takes the function."""
    trial: str | None = None
    """What the trial run of a written package names there, where every run must name something."""
    elsewhere: Callable[[str], str | None] | None = None
    """Of a name that no member has: how else it is asked for, or why it can't be; None where nothing is known of it."""

    @property
    def group(self) -> str:
        """Entry-point group, e.g. `marl.reward`."""
        return f"marl.{self.name}"

    @property
    def with_article(self) -> str:
        """Its name as a sentence says it of one member: `a reward`, `an observer`."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @property
    def key(self) -> Key:
        """The family's own config key."""
        return self.keys[0]


FAMILIES: dict[FamilyName, Family] = {
    family.name: family
    for family in (
        Family(
            name="reference",
            about="Which weights are the reference policy.",
            required_hook="marl_reference",
            contract="check_reference",
            keys=(Key("reference", "Which weights are the reference policy: where the KL penalty pulls."),),
            choice="ReferenceChoice",
            trial="{use: disabled-adapter}",
        ),
        Family(
            name="reward",
            about="What scores a response, with its weight in the sum.",
            required_hook="marl_reward",
            contract="check_reward",
            keys=(
                Key(
                    "reward",
                    "What scores a response: one source, or a list whose weighted sum counts. A loop by hand may bring scores.",
                    many="list",
                    at_least=1,
                ),
                Key(
                    "eval.judges",
                    "Further scores that are measured and never trained on. A judge may abstain (None): its mean is over what it judged.",
                    many="named",
                ),
            ),
            choice="RewardChoice",
            from_callable=("function", "target"),
            trial='{use: function, target: "rewards.py:low"}',
        ),
        Family(
            name="adapter",
            about="What is trained: the kind of adapter that stands on the frozen base.",
            required_hook="marl_adapter",
            contract="check_adapter",
            keys=(
                Key("policy", "The trained adapter.", default="lora"),
                Key("value", "The value function.", default="lora"),
            ),
            elsewhere=how_to_ask,
        ),
        Family(
            name="quantization",
            about="How the base's weights are held.",
            required_hook="marl_quantization",
            contract="check_quantization",
            keys=(Key("quantization", "How the base's weights are held.", default="none"),),
        ),
        Family(
            name="advantage",
            about="How rewards become advantages.",
            required_hook="marl_advantage",
            contract="check_advantage",
            keys=(
                Key(
                    "ppo.advantage",
                    "Advantage estimator: whether there is a value function, and whether responses to one prompt are compared.",
                    default="gae",
                ),
            ),
        ),
        Family(
            name="observer",
            about="Who watches the run.",
            required_hook=None,
            contract="check_observer",
            keys=(
                Key(
                    "observers",
                    "Who watches the run, beside those that always do: `json-lines` wherever there is a `run.folder`, and `console` in "
                    "`marl run`. Name one of these to give it options.",
                    many="list",
                    with_folder="json-lines",
                    on_command_line="console",
                ),
            ),
            example="[$name]",
        ),
    )
}


def family_keys() -> Iterator[tuple[Family, Key]]:
    """Every config key that names strategies, with its family."""
    return ((family, key) for family in FAMILIES.values() for key in family.keys)


def family_named(name: str, asked_by: str = "--family") -> Family:
    """The family of this name; ConfigError of `asked_by` with the names there are, and the near one."""
    if name in FAMILIES:
        return FAMILIES[name]
    near = near_match(name, FAMILIES)
    hint = f" Did you mean {near!r}?" if near else ""
    raise ConfigError(f"{asked_by}: {name!r} is none of {', '.join(FAMILIES)}.{hint}")
