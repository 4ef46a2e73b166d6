"""The reference study: its page says what its results say, its yardstick and its judges compute what they claim."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from marl_core import Catalog, MarlError, Plan, Runner, load_config
from marl_core.config.load import parse_config
from marl_core.ppo import generalized_advantage_estimation
from marl_core.testing import tiny_model, tiny_tokenizer, write_tiny_model

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "examples" / "reference_study"


def study(name: str) -> Any:
    """A module of the study."""
    sys.path.insert(0, str(STUDY))  # its modules import each other by plain names
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(STUDY))


@pytest.fixture(scope="module")
def arms() -> Any:
    return study("arms")


class TestPage:
    def test_page_and_results_agree(self) -> None:
        rendered = study("page").render(study("results").Results())
        assert (ROOT / "docs" / "reference-policies.md").read_text(encoding="utf-8") == rendered

    def test_every_run_is_there_and_whole(self, arms: Any) -> None:
        results = study("results").Results()
        runs = [(row["arm"], row["seed"]) for row in results.costs]
        planned = {(arm, seed) for arm in arms.read_arms() for seed in arms.SEEDS}
        assert len(set(runs)) == len(runs)
        steps = results.config["ppo"]["steps"]
        for arm, seed in runs:
            assert [r["step"] for r in results.steps if (r["arm"], r["seed"]) == (arm, seed)] == [*range(1, steps + 1)]
        page = (ROOT / "docs" / "reference-policies.md").read_text(encoding="utf-8")
        assert set(runs) == planned  # three seeds of every arm
        assert "runs are done" not in page

    def test_figures_are_there_and_named_by_the_page(self) -> None:
        figures = study("figures")
        page = (ROOT / "docs" / "reference-policies.md").read_text(encoding="utf-8")
        for name in [*figures.CURVES, *figures.FRONTIERS]:
            assert f"figures/{name}.svg" in page
            assert (figures.FIGURES / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")

    def test_kl_to_another_model_follows_from_the_judges(self) -> None:
        row = {"arm": "c", "kl": 2.0, "logp_raw": -50.0, "logp_sft": -46.0}
        derived = study("results")._derived(row)
        assert derived["kl_raw"] == 2.0
        assert derived["kl_sft"] == -2.0  # E[log policy] = 2 - 50 = -48, and -48 + 46
        assert derived["perplexity"] == pytest.approx(torch.tensor(46.0 / 16).exp().item())
        assert study("results")._derived({**row, "arm": "a"})["kl_raw"] == 6.0

    def test_spread_is_over_seeds(self) -> None:
        spread = study("results").Spread.of([1.0, 2.0, 6.0])
        assert (spread.mean, spread.std, spread.count) == (3.0, pytest.approx(7**0.5), 3)


class TestArms:
    def test_the_value_is_where_the_title_says(self, arms: Any) -> None:
        """An arm whose value keys had no effect was the same run as another, and its page went on about the difference."""
        inputs = arms.Inputs("raw", "sft", "merged", "reward", "reward-model", "p.jsonl", "h.jsonl")
        for name, on in {"head": "policy", "adapter": "own", "four": "own", "rloo": "none", "grpo": "none"}.items():
            config = arms.read_arms()[name].config(inputs, 0, Path("runs/x"), {})
            assert Plan.of(parse_config(config, name, Catalog.installed())).value_on == on

    def test_every_arm_is_a_valid_config(self, arms: Any, tmp_path: Path) -> None:
        inputs = arms.Inputs("raw", "sft", "merged", "reward", "reward-model", "p.jsonl", "h.jsonl")
        for arm in arms.read_arms().values():
            file = tmp_path / f"{arm.name}.yaml"
            file.write_text(json.dumps(arm.config(inputs, 1, tmp_path / arm.name)), encoding="utf-8")
            config = load_config(file)
            assert config.run.seed == 1
            Plan.of(config)

    def test_arms_differ_only_where_they_say(self, arms: Any, tmp_path: Path) -> None:
        inputs = arms.Inputs("raw", "sft", "merged", "reward", "reward-model", "p.jsonl", "h.jsonl")
        listed = arms.read_arms()
        a, c = (listed[name].config(inputs, 0, tmp_path) for name in "ac")
        assert {key for key in a if a[key] != c[key]} == {"policy", "reference"}
        assert c["reference"] == {"use": "disabled-adapter", "allow_mismatch": True}
        assert c["policy"]["from"] == "sft"
        low, head = (listed[name].config(inputs, 0, tmp_path) for name in ("kl-low", "head"))
        assert low["ppo"]["kl"] == head["ppo"]["kl"] | {"coef": 0.05}

    def test_a_finished_run_of_another_config_is_not_taken_for_this_one(self, arms: Any, tmp_path: Path) -> None:
        job = self.job(arms, tmp_path, "print()")
        study("work").run_all([job], None, 1)
        assert job.finished
        changed = study("work").Job(job.arm, 0, job.folder, {"other": 1})
        with pytest.raises(MarlError, match="another config"):
            study("work").run_all([changed], None, 1)

    def test_a_run_that_fails_stops_no_other_and_is_done_again(self, arms: Any, tmp_path: Path) -> None:
        once = (
            "import pathlib, sys; p = pathlib.Path(sys.argv[1] + '.seen'); e = p.exists(); p.touch(); sys.exit(not e)"
        )
        jobs = [self.job(arms, tmp_path / "one", once), self.job(arms, tmp_path / "two", "print()")]
        with pytest.raises(MarlError, match="1 of 2 runs failed"):
            study("work").run_all(jobs, None, 1)
        assert [job.finished for job in jobs] == [False, True]
        study("work").run_all(jobs, None, 1)
        assert jobs[0].finished

    def test_what_was_killed_is_resumed(self, arms: Any) -> None:
        command = arms.Arm("a", "").command(Path("a.yaml"), None, True)
        assert command[-2:] == ["a.yaml", "--resume"]

    @staticmethod
    def job(arms: Any, folder: Path, program: str) -> Any:
        folder.mkdir(exist_ok=True)
        (folder / "program.py").write_text(
            f"import os, sys; os.makedirs({str(folder / 'run')!r}, exist_ok=True)\n{program}\n", encoding="utf-8"
        )

        class Stub(arms.Arm):  # type: ignore[misc]
            def command(self, config: Path, inputs: Any, resume: bool) -> list[str]:
                return [sys.executable, str(folder / "program.py"), str(config)]

        return study("work").Job(Stub("stub", ""), 0, folder / "run", {"key": 1})


class TestJudging:
    def test_distinct_trigrams_by_hand(self) -> None:
        assert study("judging").distinct([[1, 2, 3, 4], [1, 2, 3, 9], [5, 6]]) == [0.5, 0.5, 0.0]

    def test_log_likelihood_is_the_models_own(self, tmp_path: Path) -> None:
        judging: ModuleType = study("judging")
        folder = write_tiny_model(tmp_path / "model")
        model: Any = tiny_model().eval()
        model, tokenizer = model.to(torch.bfloat16), tiny_tokenizer()
        prompts, responses = ["ab", "a long one"], [[100, 101, 102], [110, 111, 112]]
        found = judging.log_likelihood(prompts, responses, str(folder))
        for prompt, response, value in zip(prompts, responses, found, strict=True):
            ids = torch.tensor([[*tokenizer.encode(prompt, add_special_tokens=False), *response]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0].float()
            logits[:, tokenizer.eos_token_id] = -torch.inf
            told = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[-3:].sum()
            assert value == pytest.approx(float(told), abs=0.05)  # bfloat16, another batch


class TestYardstick:
    def test_four_models_step_as_views_of_one_base_do(
        self, make_config: Any, tiny_folder: str, write_reward_adapter: Any, tmp_path: Path
    ) -> None:
        """The same step with every role on a copy of the base of its own: bitwise the same numbers, over two updates."""
        reward = write_reward_adapter(tiny_folder, tmp_path / "reward")
        config = make_config(
            reward={"use": "adapter", "path": reward},
            value={"on": "own", "r": 2},
            ppo={"batch": 4, "minibatch": 2, "epochs": 2, "learning_rate": 1e-3},
        )
        one, four = Runner(config), study("four_models_step").spread(Runner(config), reward)
        assert four.bank.adapters == ["policy"]
        for _ in range(2):
            mine, theirs = (runner.step(runner.prompts()) for runner in (one, four))
            for name, value in mine.metrics.items():
                assert name.startswith("perf/") or theirs.metrics[name] == value, name
        assert mine["val/grad_norm"] > 0

    def test_its_advantages_are_marls(self) -> None:
        rewards, values = torch.randn(4, 7), torch.randn(4, 7)
        mine = study("four_models").gae(rewards, values, 0.98, 0.9)
        marls = generalized_advantage_estimation(rewards, values, torch.ones(4, 7, dtype=torch.bool), 0.98, 0.9)
        for one, two in zip(mine, marls, strict=True):
            assert torch.allclose(one, two, atol=1e-6)
