"""What a TRL PPO script sets inside, read from its source: it is parsed, never run."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from marl_core import ConfigError
from marl_plugins.migrate.adapter_section import CLASSES, SET_BY_MARL, Computed
from marl_plugins.migrate.foreign_config import Note
from marl_plugins.migrate.trl_defaults import CLASSIC_KEYS, EXPERIMENTAL, LAST_KEYS, PPO_NAMES, V2_NAMES, Span, Trainer

CONFIG_CLASSES = ("PPOConfig", "PPOv2Config")
TRAINER_CLASSES = ("PPOTrainer", "PPOv2Trainer")
LORA_NAMES = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
LORA_PLUS_NAMES = {"loraplus_lr_ratio": "loraplus_lr_ratio", "lr": "learning_rate"}
QUANTIZATION_NAMES = {
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "bnb_4bit_quant_type": "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "bnb_4bit_compute_dtype": "dtype",
}
MODEL_NAMES = {
    "reward_adapter": "rm_adapter",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "torch_dtype": "dtype",
    "dtype": "dtype",
    "attn_implementation": "attn_implementation",
}
GENERATION_KEYS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
CLASSIFICATION_TASKS = ("sentiment-analysis", "text-classification")

Lora = Literal["always", "if use_peft", "never"]


@dataclass(frozen=True)
class PromptRecipe:
    """How a script makes a prompt of a row, where that isn't the text of a column."""

    column: str
    tokens: tuple[int, int] | None = None
    """Its first tokens: at least, and fewer than."""
    messages: int | None = None
    """Its first messages."""


@dataclass
class Script:
    """What was read."""

    name: str
    trainer: Trainer
    span: Span | None
    """The releases it can be for, as far as its imports tell."""
    lora: Lora
    """Whether it trains an adapter, of whatever kind."""
    adapter: str = "LoraConfig"
    """The class of PEFT's that says which."""
    adapter_options: dict[str, Any] = field(default_factory=dict)
    """What the script gives that class, apart from what an argument of TRL's says too."""
    values: dict[str, Any] = field(default_factory=dict)
    """TRL's arguments and what the script gives them: defaults of its own arguments, or values that no argument changes."""
    recipe: PromptRecipe | None = None
    reward_label: int | None = None
    """Which output of the reward's head the script reads."""
    raw_scores: bool = True
    """Whether a pipeline gives the label's logit, not its probability."""
    conditions: list[str] = field(default_factory=list)
    """Python expressions of `row`: what the script asks of a row that it keeps."""
    reads: frozenset[str] = frozenset()
    """Arguments that the script reads, by name: a default of TRL's counts for these alone."""
    held_out: int | None = None
    """Rows at the end of the data that the script keeps for evaluation."""
    declared: frozenset[str] = frozenset()
    """Arguments that the script declares itself."""
    flags: frozenset[str] = frozenset()
    """Those of them that may stand without a value."""
    notes: list[Note] = field(default_factory=list)


@dataclass(frozen=True)
class _Field:
    """A field of a dataclass in a script."""

    target: ast.Name
    annotation: ast.expr
    value: ast.expr | None


class Unknown(Exception):
    """A value that can't be told from the source."""


def read_script(file: Path, arguments: Mapping[str, Any]) -> Script:
    """Read a script, with the arguments it is started with. ConfigError when it isn't Python, or no PPO of TRL's."""
    try:
        tree = ast.parse(file.expanduser().read_bytes())  # as Python reads it: by its mark or its declared encoding
    except OSError as error:
        raise ConfigError(
            f"{file}: can't be read: {error.strerror or error}. Give the script's path, or its arguments alone."
        ) from error
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: is no Python that can be parsed: {error}.") from error
    return _Reader(tree, file.name, arguments).read()


class _Reader:
    """One pass over a script's source."""

    def __init__(self, tree: ast.Module, name: str, arguments: Mapping[str, Any]) -> None:
        self.tree, self.name = tree, name
        self.nodes = list(ast.walk(tree))
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        self.attributes = frozenset(node.attr for node in self.nodes if isinstance(node, ast.Attribute))
        self.names = (
            {node.id for node in self.nodes if isinstance(node, ast.Name)}
            | {alias.name for node in self.nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
            | {name for name in self.attributes if name in (*CONFIG_CLASSES, *TRAINER_CLASSES)}
        )
        self.modules = [node.module or "" for node in self.nodes if isinstance(node, ast.ImportFrom)] + [
            alias.name for node in self.nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        self.declared = {entry.target.id for entry in self._fields()}
        self.own = dict(self._own_arguments())
        self.arguments = {**self.own, **arguments}
        self.constants = {
            target.id: node.value
            for node in self.nodes
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.parameters = self._parameters()
        self.notes: list[Note] = []

    def read(self) -> Script:
        """Everything at once: what is missing in the source is missing in the result."""
        trainer = self._trainer()
        script = Script(self.name, trainer, None if trainer == "classic" else self._span(), self._lora())
        inside = {
            **self._model(),
            **self._quantization(),
            **self._generation(),
            **self._data(),
            **self._reward(),
            **self._keywords(self._calls(*CONFIG_CLASSES), None),
            **self._keywords(self._calls("LoraConfig"), LORA_NAMES),
            **self._keywords(self._calls("create_loraplus_optimizer"), LORA_PLUS_NAMES),
        }
        for call in self._calls(*TRAINER_CLASSES):
            if any(keyword.arg in ("optimizer", "optimizers") for keyword in call.keywords):
                self.notes.append(("optimizer", f"{self.name} makes its own; marl's is AdamW"))
        script.values = {**self.own, **inside}
        script.adapter, script.adapter_options = self._adapter()
        script.recipe, script.held_out = self._recipe(), self._held_out()
        script.reward_label, script.raw_scores = self._reward_label(), self._raw_scores()
        script.reads = self.attributes
        script.declared, script.flags = self._declared()
        self._filters(script)
        script.notes += self.notes
        return script

    # What kind of script it is

    def _trainer(self) -> Trainer:
        if not (self.names & {*CONFIG_CLASSES, *TRAINER_CLASSES} or self._is_experimental()):
            raise ConfigError(
                f"{self.name}: names neither {' nor '.join((CONFIG_CLASSES[0], TRAINER_CLASSES[0]))}, so it is no PPO script of TRL's. "
                "Give the script that makes the trainer."
            )
        if self.names & {"PPOv2Config", "PPOv2Trainer"} or self._is_experimental():
            return "last"
        calls = self._calls(*TRAINER_CLASSES)
        keywords = {keyword.arg for call in calls for keyword in call.keywords}
        if keywords & {"reward_model", "value_model", "args"}:
            return "last"
        if calls or "AutoModelForCausalLMWithValueHead" in self.names:
            return "classic"
        told = {keyword.arg for call in self._calls(*CONFIG_CLASSES) for keyword in call.keywords} | set(self.arguments)
        return "classic" if told & CLASSIC_KEYS and not told & LAST_KEYS else "last"

    def _span(self) -> Span:
        if self.names & {"PPOv2Config", "PPOv2Trainer"}:
            return V2_NAMES
        return EXPERIMENTAL if self._is_experimental() else PPO_NAMES

    def _is_experimental(self) -> bool:
        return any(module.startswith("trl.experimental.ppo") for module in self.modules)

    def _lora(self) -> Lora:
        """Whether it trains a LoRA: always, as an argument says, or never."""
        if "get_peft_config" in self.names or "use_peft" in self.own:
            return "if use_peft"
        return "always" if self._calls(*CLASSES) else "never"

    def _adapter(self) -> tuple[str, dict[str, Any]]:
        """The class of PEFT's that the script calls, and the options that no argument of TRL's says."""
        classes = list(dict.fromkeys(_last_name(call.func) for call in self._calls(*CLASSES)))
        taken = classes[0] if classes else "LoraConfig"
        if len(classes) > 1:
            why = f"{self.name} makes {' and '.join(classes)}; the first is taken: set policy to what you train"
            self.notes.append(("peft_config", why))
        said_by_arguments = LORA_NAMES if taken == "LoraConfig" else {}
        options: dict[str, Any] = {}
        for call in self._calls(taken):
            for keyword in call.keywords:
                if keyword.arg and keyword.arg not in said_by_arguments and keyword.arg not in SET_BY_MARL:
                    options[keyword.arg] = self._option(keyword.value)
                elif keyword.arg is None:
                    where = f"{self.name}, line {call.lineno}, passes `**{ast.unparse(keyword.value)}` on"
                    self.notes.append((taken, f"{where}: what is in it wasn't read; set it yourself"))
        return taken, options

    def _option(self, node: ast.expr) -> Any:
        try:
            return self.value(node)
        except Unknown as unknown:
            return Computed(
                f"{self.name}, line {node.lineno}, computes it (`{unknown}`): look there, and set it yourself"
            )

    def _fields(self) -> Iterator[_Field]:
        """Fields of the script's dataclasses, which are its arguments."""
        for node in self.nodes:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                for entry in node.body:
                    if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
                        yield _Field(entry.target, entry.annotation, entry.value)

    def _own_arguments(self) -> Iterator[tuple[str, Any]]:
        """The script's arguments that have a default worth telling."""
        for entry in self._fields():
            default = None if entry.value is None else _field_default(entry.value)
            if isinstance(default, ast.Constant | ast.List | ast.Tuple | ast.UnaryOp):
                try:
                    value = ast.literal_eval(default)
                except ValueError:  # a list of what isn't plain
                    continue
                if value is not None and (value is not False or entry.target.id == "use_peft"):
                    yield entry.target.id, value

    def _declared(self) -> tuple[frozenset[str], frozenset[str]]:
        """The script's own arguments, by dataclass, by `"--name"` in its source, or by a function's parameters; and its flags."""
        fields = list(self._fields())
        names, flags = (
            {entry.target.id for entry in fields},
            {e.target.id for e in fields if "bool" in ast.unparse(e.annotation)},
        )
        for call in self.calls:
            words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            options = {word.lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
            names |= options
            action = next((ast.unparse(k.value) for k in call.keywords if k.arg in ("action", "is_flag")), "")
            flags |= options if action else set()
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names |= {argument.arg for argument in (*_positional(node.args), *node.args.kwonlyargs)}
        return frozenset(names), frozenset(flags)

    # Values

    def _parameters(self) -> dict[str, ast.expr]:
        """Arguments of the script's functions: what the first call passes, else the default."""
        found: dict[str, ast.expr] = {}
        for function in self.nodes:
            if not isinstance(function, ast.FunctionDef):
                continue
            names = [argument.arg for argument in _positional(function.args)]
            count = len(function.args.defaults)
            values = dict(zip(names[len(names) - count :], function.args.defaults, strict=True))
            by_name = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            values.update({argument.arg: default for argument, default in by_name if default is not None})
            for call in self._calls(function.name)[:1]:
                values.update(zip(names, call.args, strict=False))
                values.update({keyword.arg: keyword.value for keyword in call.keywords if keyword.arg})
            found.update({name: node for name, node in values.items() if ast.unparse(node) != name})
        return found

    def _calls(self, *names: str) -> list[ast.Call]:
        return [call for call in self.calls if _last_name(call.func) in names]

    def value(self, node: ast.expr, seen: frozenset[str] = frozenset()) -> Any:
        """What an expression is, as far as the source and the arguments tell; Unknown where they don't.

        None of an argument that has no default in the script: TRL's counts. `seen` are the names on the way here.
        """
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self.value(node.operand, seen)
            if isinstance(number, int | float):
                return -number
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return [self.value(entry, seen) for entry in node.elts]
        if isinstance(node, ast.Dict) and all(node.keys):
            keys = [self.value(key, seen) for key in node.keys if key]
            return dict(zip(keys, (self.value(entry, seen) for entry in node.values), strict=True))
        if isinstance(node, ast.Name) and node.id not in seen:
            meant = self.parameters.get(node.id, self.constants.get(node.id))
            if isinstance(meant, ast.Constant | ast.UnaryOp | ast.List | ast.Set | ast.Dict | ast.Name | ast.Attribute):
                return self.value(meant, seen | {node.id})
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return node.attr if node.value.id == "torch" else self.arguments.get(node.attr)
        raise Unknown(ast.unparse(node))

    def _pairs(self, pairs: Iterator[tuple[str, ast.expr]], names: Mapping[str, str] | None) -> dict[str, Any]:
        """Values of those keys that have a counterpart; what is computed is noted."""
        found: dict[str, Any] = {}
        for key, node in pairs:
            if names is not None and key not in names:
                continue
            argument = key if names is None else names[key]
            try:
                value = self.value(node)
                if value is None and isinstance(node, ast.Attribute) and node.attr not in {key, *self.declared}:
                    raise Unknown(ast.unparse(node))
            except Unknown as unknown:
                self.notes.append(
                    (
                        argument,
                        f"{self.name}, line {node.lineno}, computes it (`{unknown}`): look there, and set it yourself",
                    )
                )
                continue
            if value is not None:
                found[argument] = value
        return found

    def _keywords(self, calls: list[ast.Call], names: Mapping[str, str] | None) -> dict[str, Any]:
        for call in calls:
            passed = next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None), None)
            if passed and names is None:
                where = f"{self.name}, line {call.lineno}, passes `**{passed}` on"
                self.notes.append((_last_name(call.func), f"{where}: what is in it wasn't read; set it yourself"))
        pairs = ((keyword.arg, keyword.value) for call in calls for keyword in call.keywords if keyword.arg)
        return self._pairs(pairs, names)

    # Sections

    def _model(self) -> dict[str, Any]:
        loads = [
            call
            for call in self._calls("from_pretrained")
            if not any(word in ast.unparse(call.func) for word in ("Tokenizer", "Classification", "ref_model"))
        ]
        found = self._keywords(loads, MODEL_NAMES)
        for call in loads:
            if call.args and isinstance(call.args[0], ast.Constant | ast.Name):
                try:
                    found.setdefault("model_name_or_path", self.value(call.args[0]))
                except Unknown:
                    continue
        return found

    def _quantization(self) -> dict[str, Any]:
        return self._keywords(self._calls("BitsAndBytesConfig"), QUANTIZATION_NAMES)

    def _generation(self) -> dict[str, Any]:
        """From a dict of generation arguments, GenerationConfig(...) or generate(...)."""
        names = {key: key for key in GENERATION_KEYS}
        dicts = (
            (key.value, value)
            for node in self.nodes
            if isinstance(node, ast.Dict) and any(isinstance(k, ast.Constant) and k.value in names for k in node.keys)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        )
        found = self._pairs(dicts, names) | self._keywords(self._calls("GenerationConfig", "generate"), names)
        found.pop("do_sample", None)
        if "top_k" in found:
            found["top_k"] = int(found["top_k"])
        for low, high in self._samplers(of_responses=True)[:1]:
            found["max_new_tokens"] = high - 1
            why = f"{self.name} drew a length from {low} to {high - 1} for each step; marl has one limit, and EOS ends a response before"
            self.notes.append(("max_new_tokens", why))
        return found

    def _data(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for call in self._calls("load_dataset")[:1]:
            positional = zip(("dataset_name", "dataset_config"), call.args, strict=False)
            found = self._pairs(((name, node) for name, node in positional if self._is_told(node)), None)
            names = {"name": "dataset_config", "split": "dataset_train_split"}
            keywords = ((k.arg, k.value) for k in call.keywords if k.arg and self._is_told(k.value))
            found |= self._pairs(keywords, names)
        column = next((node for node in self.nodes if _is_assigned(node, "dataset_text_field")), None)
        if isinstance(column, ast.Assign) and isinstance(column.value, ast.Constant):
            found["dataset_text_field"] = column.value.value
        return found

    def _is_told(self, node: ast.expr) -> bool:
        """Whether a value can be had: a data set's name is often a function's argument."""
        try:
            return self.value(node) is not None
        except Unknown:
            return False

    def _reward(self) -> dict[str, Any]:
        """A pipeline with a name in it; one that takes its name from an argument is that argument."""
        for call in self._calls("pipeline"):
            model = next((k.value for k in call.keywords if k.arg == "model"), None)
            try:
                task = self.value(call.args[0]) if call.args else None
                name = self.value(model) if model is not None else None
            except Unknown:
                continue
            if isinstance(name, str) and isinstance(task, str):
                return {"reward_model": f"{task}:{name}"}
        classifiers = [
            call for call in self._calls("from_pretrained") if "SequenceClassification" in ast.unparse(call.func)
        ]
        for call in classifiers:
            if call.args and isinstance(call.args[0], ast.Constant):
                return {"reward_model_path": call.args[0].value}
        return {}

    def _reward_label(self) -> int | None:
        """`output[1]["score"]` of a pipeline, or `rewards[i, -1, 1]` of a reward adapter: the number in it."""
        for node in self.nodes:
            if not isinstance(node, ast.Subscript):
                continue
            index = node.slice
            if isinstance(index, ast.Constant) and index.value == "score" and isinstance(node.value, ast.Subscript):
                inner = node.value.slice
                if isinstance(inner, ast.Constant) and isinstance(inner.value, int):
                    return inner.value
            if isinstance(index, ast.Tuple) and len(index.elts) == 3 and "reward" in ast.unparse(node.value):
                last = index.elts[-1]
                if isinstance(last, ast.Constant) and isinstance(last.value, int):
                    return last.value
        return None

    def _raw_scores(self) -> bool:
        texts = [ast.unparse(node) for node in self.nodes if isinstance(node, ast.Dict | ast.keyword)]
        return any("function_to_apply" in text and "none" in text for text in texts)

    # Prompts

    def _recipe(self) -> PromptRecipe | None:
        renamed = self._renamed()
        sampled = self._samplers(of_responses=False)
        for node in self.nodes:
            if not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice)):
                continue
            call, cut = node.value, node.slice.upper
            if isinstance(call, ast.Call) and _last_name(call.func) == "encode" and call.args:
                column = _column(call.args[0])
                if column and sampled:
                    return PromptRecipe(renamed.get(column, column), tokens=sampled[0])
            column = _column(call)
            if (
                column
                and isinstance(cut, ast.Constant)
                and isinstance(cut.value, int)
                and self._calls("apply_chat_template")
            ):
                return PromptRecipe(renamed.get(column, column), messages=cut.value)
        return None

    def _bounds(self, call: ast.Call) -> tuple[int, int] | None:
        """Both ends of a LengthSampler; None where they are computed."""
        try:
            low, high = (int(self.value(argument)) for argument in call.args)
        except (Unknown, TypeError, ValueError):
            return None
        return low, high

    def _samplers(self, *, of_responses: bool) -> list[tuple[int, int]]:
        """The bounds of LengthSamplers: those whose name has "output" in it draw the length of a response, others that of a prompt."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                named_output = "output" in ast.unparse(node.targets[0])
                if _last_name(node.value.func) == "LengthSampler" and named_output == of_responses:
                    found.append(self._bounds(node.value))
        return [bounds for bounds in found if bounds is not None]

    def _renamed(self) -> dict[str, str]:
        """New names of columns, with the old ones."""
        found: dict[str, str] = {}
        for call in self._calls("rename_columns", "rename_column"):
            if len(call.args) == 1 and isinstance(call.args[0], ast.Dict):
                pairs = zip(call.args[0].values, call.args[0].keys, strict=True)
            else:
                pairs = zip(call.args[1:2], call.args[:1], strict=True)
            for new, old in pairs:
                if isinstance(new, ast.Constant) and isinstance(old, ast.Constant):
                    found[str(new.value)] = str(old.value)
        return found

    def _held_out(self) -> int | None:
        constant = self.constants.get("eval_samples")
        return constant.value if isinstance(constant, ast.Constant) and isinstance(constant.value, int) else None

    def _filters(self, script: Script) -> None:
        """A limit of prompts in tokens has a key; any other condition on rows is copied, or named where it can't be."""
        for call in self._calls("filter"):
            given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "function")]
            if not (isinstance(call.func, ast.Attribute) and given):
                continue
            function = given[0]
            if not isinstance(function, ast.Lambda):
                self._keeps(call, ast.unparse(function), "a function of the script")
                continue
            names = {argument.arg: "row" for argument in _positional(function.args)[:1]}
            body = _Renamed(names, self._renamed()).visit(function.body)
            limit = self._token_limit(body)
            if limit is not None:
                script.values["max_prompt_tokens"] = limit
                continue
            try:
                text = ast.unparse(_Filled(self.value).visit(body))
            except Unknown as unknown:
                self._keeps(call, ast.unparse(function.body), f"`{unknown}`, which only the script has")
                continue
            if text not in script.conditions:
                script.conditions.append(text)

    def _keeps(self, call: ast.Call, condition: str, because: str) -> None:
        """Note a condition on rows that can't stand outside the script."""
        why = (
            f"{self.name}, line {call.lineno}, keeps only rows with `{condition}`, and that asks {because}, so it can't be "
            "copied: leave the other rows out yourself"
        )
        if ("dataset_name", why) not in self.notes:
            self.notes.append(("dataset_name", why))

    def _token_limit(self, condition: ast.expr) -> int | None:
        """N of `row["lengths"] <= N` or `len(row["input_ids"]) < N + 1`; None of any other condition."""
        if not isinstance(condition, ast.Compare) or len(condition.ops) != 1:
            return None
        left, is_strict = condition.left, isinstance(condition.ops[0], ast.Lt)
        counts_tokens = _column(left) in ("lengths", "length") or (
            isinstance(left, ast.Call)
            and _last_name(left.func) == "len"
            and [_column(argument) for argument in left.args] == ["input_ids"]
        )
        try:
            limit = self.value(condition.comparators[0])
        except Unknown:
            return None
        is_limit = counts_tokens and isinstance(limit, int) and isinstance(condition.ops[0], ast.Lt | ast.LtE)
        return limit - is_strict if is_limit else None


class _Renamed(ast.NodeTransformer):
    """An expression with other names, and with columns under the names they have in the data."""

    def __init__(self, names: Mapping[str, str], columns: Mapping[str, str]) -> None:
        self._names, self._columns = names, columns

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """A name is replaced where it stands in the list."""
        return ast.Name(self._names.get(node.id, node.id), node.ctx)

    def visit_Subscript(self, node: ast.Subscript) -> ast.Subscript:
        """So is a column."""
        column = _column(node)
        index = ast.Constant(self._columns.get(column, column)) if column else node.slice
        return ast.Subscript(self.visit(node.value), index, node.ctx)


class _Filled(ast.NodeTransformer):
    """A condition on `row` with the script's own names filled in; Unknown where one of them can't be told.

    Names stay that Python has itself, and those that the condition binds: of a comprehension, of a lambda.
    """

    def __init__(self, value: Callable[[ast.expr], Any]) -> None:
        self._value, self._bound = value, {"row", *dir(builtins)}

    def visit(self, node: ast.AST) -> Any:
        """What an expression binds is known in all of it."""
        bound = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        self._bound |= bound | {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)}
        return super().visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """A name of the script's is what it stands for."""
        return node if node.id in self._bound else self._told(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        """So is an argument, as `args.longest`; methods of what is bound stay."""
        if isinstance(node.value, ast.Name) and node.value.id not in self._bound:
            return self._told(node)
        return ast.Attribute(self.visit(node.value), node.attr, node.ctx)

    def _told(self, node: ast.expr) -> ast.expr:
        value = self._value(node)
        if not isinstance(value, str | int | float | list) or value in (float("inf"), float("-inf")):
            raise Unknown(ast.unparse(node))
        return ast.parse(repr(value), mode="eval").body


def _positional(arguments: ast.arguments) -> list[ast.arg]:
    """Parameters that a call may give by their place, those before a `/` included."""
    return [*arguments.posonlyargs, *arguments.args]


def _field_default(node: ast.expr) -> ast.expr | None:
    """The default of a dataclass's field, written plainly or by `field(default=...)`."""
    if isinstance(node, ast.Call):
        return next((keyword.value for keyword in node.keywords if keyword.arg == "default"), None)
    return node


def _last_name(node: ast.expr) -> str:
    """`load_dataset` of `datasets.load_dataset`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _column(node: ast.expr) -> str | None:
    """`chosen` of `example["chosen"]`."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return node.slice.value
    return None


def _is_assigned(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
