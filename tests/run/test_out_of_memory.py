"""Memory that runs out: said with the phase and the keys that help; no model, file or plugin is blamed, and one can go on with less."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marl_core import OutOfMemoryError, Runner
from marl_core.bank import measure
from marl_core.bank.out_of_memory import ran_out
from marl_core.bank.trunk import Trunk
from marl_core.cli.app import main
from marl_core.config.load import dump_config
from marl_core.ppo.types import Prompts

MakeConfig = Callable[..., Any]
SAID = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.69 GiB of which 9.38 MiB is free."
MORE = " If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True."


def too_much(*arguments: Any, **options: Any) -> Any:
    """As CUDA's allocator ends."""
    raise torch.OutOfMemoryError(SAID + MORE)


def test_what_torch_says_on_a_cpu_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value)
    assert ran_out(MemoryError())
    assert ran_out(torch.OutOfMemoryError(SAID))
    assert not ran_out(RuntimeError("shapes differ"))
    assert not ran_out(ValueError("CUDA out of memory"))


@pytest.mark.parametrize(
    ("function", "phase", "helps"),
    [
        ("marl_core.ppo.step.sample_sharded", "generate", "sampling.rows (now 4)"),
        (
            "marl_core.ppo.step.score_sharded",
            "score",
            "speed.microbatch_tokens (now 256), or model.gradient_checkpointing",
        ),
        (
            "marl_core.ppo.update.Update.run",
            "update",
            "speed.microbatch_tokens (now 256), or model.gradient_checkpointing",
        ),
        ("marl_core.ppo.sampling.sampler.decode", "pre-flight", "sampling.rows (now 4)"),
    ],
)
def test_each_phase_names_what_helps(
    function: str, phase: str, helps: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(make_config())
    monkeypatch.setattr(function, too_much)
    with pytest.raises(OutOfMemoryError) as caught:
        next(iter(runner.steps()))
    text = str(caught.value)
    assert text.startswith(
        f"{phase}: memory ran out on cpu: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."
    )
    assert helps in text
    assert "expandable_segments" not in text
    assert "marl check --memory" in text


def test_an_evaluation_names_the_rows(
    make_config: MakeConfig, prompts_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(make_config(eval={"prompts": prompts_file}))
    monkeypatch.setattr("marl_core.ppo.step.sample_sharded", too_much)
    with pytest.raises(OutOfMemoryError, match=r"evaluation: .*sampling\.rows"):
        next(iter(runner.steps()))


@pytest.mark.parametrize(
    "place",
    [
        (Trunk, "body_states"),  # while the padding is measured
        (Trunk, "packed_states"),
        (Trunk, "extend"),
    ],
    ids=lambda place: place[1],
)
def test_no_model_is_refused_for_it(
    place: tuple[type, str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model is tried on a few tokens when it is loaded."""
    monkeypatch.setattr(*place, too_much)
    with pytest.raises(OutOfMemoryError, match=r"loading: memory ran out .*a quantization"):
        Runner(make_config())


def test_nor_for_its_recomputation(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_gradient", too_much)
    with pytest.raises(OutOfMemoryError, match="loading: memory ran out"):
        Runner(make_config(model={"gradient_checkpointing": True}))


def test_nor_a_folder_or_an_adapter(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as inside:
        inside.setattr("transformers.AutoModelForCausalLM.from_pretrained", too_much)
        with pytest.raises(OutOfMemoryError, match="loading: memory ran out"):
            Runner(make_config())
    monkeypatch.setattr("peft.PeftModel.__init__", too_much)
    with pytest.raises(OutOfMemoryError, match="loading: memory ran out"):
        Runner(make_config())


def test_a_shared_bank_is_as_it_was(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out in the middle of adding an adapter: its first layers are wrapped, the others aren't."""
    from peft.tuners.lora.layer import LoraLayer

    first = Runner(make_config())
    names, update, calls = [name for name, _ in first.bank.base.named_modules()], LoraLayer.update_layer, []

    def third(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        return too_much() if len(calls) == 3 else update(self, *arguments, **options)

    with monkeypatch.context() as inside:
        inside.setattr(LoraLayer, "update_layer", third)
        with pytest.raises(OutOfMemoryError):
            Runner(make_config(), bank=first.bank, policy="second")
    assert len(calls) == 3
    assert [name for name, _ in first.bank.base.named_modules()] == names
    Runner(make_config(), bank=first.bank, policy="second").generate(_prompts())


def test_one_can_go_on_with_less(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook: what the pass held is free although the error is still at hand, and the Runner works."""
    runner, held = Runner(make_config()), []

    def large(*arguments: Any, **options: Any) -> Any:
        import weakref

        block = torch.zeros(1000)
        held.append(weakref.ref(block))
        too_much()
        return block

    prompts = _prompts()
    with monkeypatch.context() as inside:
        inside.setattr("marl_core.ppo.step.sample_sharded", large)
        with pytest.raises(OutOfMemoryError) as caught:
            runner.generate(prompts)
    assert held[0]() is None
    assert caught.value.__cause__ is not None
    assert len(runner.generate(prompts)) == len(prompts)


def _prompts() -> Prompts:
    return Prompts.of([[5, 6], [7, 8, 9]], 0)


def test_the_command_line_ends_with_a_code_of_its_own(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(make_config(run={"folder": str(tmp_path / "run")})), encoding="utf-8")
    monkeypatch.setattr("marl_core.ppo.update.Update.run", too_much)
    monkeypatch.setattr("marl_core.cli.app._set_up_process", lambda *asked: None)
    assert main(["run", str(file)]) == 6
    said = capsys.readouterr().err
    assert "a bug in marl" not in said
    assert "--resume --override" in said
