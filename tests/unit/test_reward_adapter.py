"""A reward adapter on the shared base gives what transformers' own classifier gives, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marl_core import AdapterBank, ConfigError, DataError, write_certificate
from marl_core.bank.heads import score_positions
from marl_core.ppo.types import pad_rows
from marl_core.testing import tiny_tokenizer, write_tiny_model
from marl_core.testing.kinds import make_config

Write = Callable[..., str]
TEXTS = [
    "A good film.",
    "Bad",
    "The cast is worse than the plot, which is saying something!",
    "I",
    "It was fine, really.",
]


def classifier(base: str, adapter: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(adapter).pad_token_id
    return PeftModel.from_pretrained(model, adapter).eval()


def tokens(append_eos: bool) -> list[list[int]]:
    words = tiny_tokenizer()
    return [words(text).input_ids + ([words.eos_token_id] if append_eos else []) for text in TEXTS]


@pytest.fixture(scope="module", params=[False, True], ids=["pad", "pad-is-eos"])
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_reward_adapter: Write
) -> tuple[str, str, int]:
    """Base, reward adapter and pad id."""
    folder = tmp_path_factory.mktemp("reward")
    base = write_tiny_model(folder / "base", pad_is_eos=request.param)
    return base, write_reward_adapter(base, folder / "adapter"), 2 if request.param else 0


class TestAgainstTheClassifier:
    """fp32: within 1e-6."""

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("append_eos", [False, True])
    def test_i17_batch(self, trained: tuple[str, str, int], side: str, append_eos: bool) -> None:
        base, adapter, pad = trained
        bank = AdapterBank.from_pretrained(base, device="cpu")
        bank.load_reward(adapter)
        ids, mask = pad_rows(tokens(append_eos), pad, side)
        found = bank.compute_reward_score(ids, mask)
        with torch.no_grad():
            expected = classifier(base, adapter)(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
        assert float(expected.std()) > 0.1  # they do differ from each other
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert found.dtype == torch.float32

    @pytest.mark.parametrize("append_eos", [False, True])
    def test_i17_one_by_one(self, trained: tuple[str, str, int], append_eos: bool) -> None:
        base, adapter, _ = trained
        bank = AdapterBank.from_pretrained(base, device="cpu")
        bank.load_reward(adapter)
        model = classifier(base, adapter)
        for row in [*tokens(append_eos), [36]]:  # the last is one token long
            ids = torch.tensor([row])
            with torch.no_grad():
                torch.testing.assert_close(
                    bank.compute_reward_score(ids), model(input_ids=ids).logits[0], rtol=0, atol=1e-6
                )

    def test_i17_bfloat16_base(self, trained: tuple[str, str, int]) -> None:
        base, adapter, pad = trained
        bank = AdapterBank.from_pretrained(base, dtype="bfloat16", device="cpu")
        bank.load_reward(adapter)
        ids, mask = pad_rows(tokens(True), pad, "left")
        with torch.no_grad():
            expected = classifier(base, adapter)(input_ids=ids, attention_mask=mask.long()).logits.squeeze(-1)
        found = bank.compute_reward_score(ids, mask)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))

    def test_all_classifier_heads_are_read(self, trained: tuple[str, str, int], tmp_path: Path) -> None:
        """A head with a bias, or one called `classifier`."""
        base, adapter, pad = trained
        tensors = load_file(f"{adapter}/adapter_model.safetensors")
        head = tensors.pop("base_model.model.score.weight")
        named = {"base_model.model.classifier.weight": head, "base_model.model.classifier.bias": torch.tensor([0.75])}
        copy = copied(adapter, tmp_path / "copy")
        save_file(tensors | named, copy / "adapter_model.safetensors")
        ids, mask = pad_rows(tokens(True), pad, "left")
        scores = []
        for folder in (adapter, copy):
            bank = AdapterBank.from_pretrained(base, device="cpu")
            bank.load_reward(folder)
            scores.append(bank.compute_reward_score(ids, mask))
        torch.testing.assert_close(scores[1], scores[0] + 0.75)


def copied(adapter: str, target: Path) -> Path:
    import shutil

    shutil.copytree(adapter, target)
    return target


class TestPosition:
    ids = torch.tensor([[5, 6, 2, 0], [0, 5, 6, 2], [2, 2, 5, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])

    def test_last_attended(self) -> None:
        assert score_positions(self.ids, self.mask, "last-attended", 0).tolist() == [2, 3, 3]

    def test_last_non_pad_where_pad_is_eos_is_the_token_before_it(self) -> None:
        assert score_positions(self.ids, self.mask, "last-non-pad", 2).tolist() == [1, 2, 3]

    def test_last_non_pad_with_a_pad_of_its_own(self) -> None:
        assert score_positions(self.ids, self.mask, "last-non-pad", 0).tolist() == [2, 3, 3]

    def test_a_row_of_nothing_but_pad_falls_back_to_its_last_token(self) -> None:
        assert score_positions(torch.tensor([[2, 2]]), torch.ones(1, 2), "last-non-pad", 2).tolist() == [1]

    def test_the_two_rules_give_different_rewards_where_pad_is_eos(self, trained: tuple[str, str, int]) -> None:
        base, adapter, pad = trained
        ids, mask = pad_rows(tokens(True), pad, "left")
        scores = []
        for position in ("last-attended", "last-non-pad"):
            bank = AdapterBank.from_pretrained(base, device="cpu")
            bank.load_reward(adapter, position=position)
            scores.append(bank.compute_reward_score(ids, mask))
        assert torch.equal(scores[0], scores[1]) == (pad == 0)


@pytest.fixture
def bank(tiny_folder: str) -> AdapterBank:
    bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
    for name in ("policy_1", "policy_2"):
        bank.add(name, make_config(4, 8, "all-linear", 0.0, {}, bank.linears), seed=0)
    return bank


class TestTheClassicCall:
    ids = torch.tensor([[36, 224, 74, 82], [37, 68, 71, 5]])

    def test_the_named_policy_is_active_afterwards(self, bank: AdapterBank, reward_adapter: str) -> None:
        bank.load_reward(reward_adapter)
        bank.compute_reward_score(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), ppo_adapter_name="policy_1"
        )
        assert bank.active == "policy_1"
        assert bank.trainable == {"policy_1", "policy_2"}

    def test_without_a_name_whatever_was_active_stays(self, bank: AdapterBank, reward_adapter: str) -> None:
        bank.load_reward(reward_adapter)
        for before in ("policy_2", None):
            bank.activate(before)
            bank.compute_reward_score(self.ids)
            assert bank.active == before

    def test_the_score_does_not_depend_on_what_was_active(self, bank: AdapterBank, reward_adapter: str) -> None:
        bank.load_reward(reward_adapter)
        scores = []
        for name in ("policy_1", "policy_2", None):
            bank.activate(name)
            scores.append(bank.compute_reward_score(self.ids))
        assert torch.equal(scores[0], scores[1])
        assert torch.equal(scores[0], scores[2])
        assert not scores[0].requires_grad

    def test_an_unknown_policy_is_refused_before_anything_changes(self, bank: AdapterBank, reward_adapter: str) -> None:
        bank.load_reward(reward_adapter)
        bank.activate("policy_1")
        with pytest.raises(
            ConfigError,
            match=r"ppo_adapter_name: this bank has no adapter 'policy_3'; it has: policy_1, policy_2, reward",
        ):
            bank.compute_reward_score(self.ids, ppo_adapter_name="policy_3")
        assert bank.active == "policy_1"

    def test_which_of_several(
        self, bank: AdapterBank, reward_adapter: str, tiny_folder: str, write_reward_adapter: Write, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"0 reward adapters \(none\)"):
            bank.compute_reward_score(self.ids)
        first = bank.load_reward(reward_adapter)
        alone = bank.compute_reward_score(self.ids)
        second = bank.load_reward(write_reward_adapter(tiny_folder, tmp_path / "second", seed=9))
        with pytest.raises(ConfigError, match=r"2 reward adapters \(reward, reward-2\)"):
            bank.compute_reward_score(self.ids)
        assert torch.equal(bank.compute_reward_score(self.ids, reward=first), alone)
        assert not torch.equal(bank.compute_reward_score(self.ids, reward=second), alone)

    def test_the_same_folder_is_held_once(self, bank: AdapterBank, reward_adapter: str) -> None:
        assert bank.load_reward(reward_adapter) == bank.load_reward(reward_adapter)
        assert bank.adapters == ["policy_1", "policy_2", "reward"]

    def test_adapter_and_head_are_frozen(self, bank: AdapterBank, reward_adapter: str) -> None:
        view = bank.load_reward(reward_adapter)
        for name in ("reward", view.head):
            assert not any(parameter.requires_grad for parameter in bank.parameters(name).values())


def spoil_head(folder: Path, change: Callable[[Tensor], Tensor | None]) -> None:
    file, key = folder / "adapter_model.safetensors", "base_model.model.score.weight"
    tensors = load_file(file)
    head = change(tensors.pop(key))
    save_file(tensors if head is None else {**tensors, key: head.contiguous()}, file)


class TestRefused:
    def refused(self, bank: AdapterBank, folder: Path, message: str) -> None:
        """DataError, and the bank is as it was."""
        before = (
            bank.adapters,
            list(bank.heads),
            dict(bank.reward_views),
            dict(bank.reward_checks),
            bank.active,
            bank.trainable,
        )
        with pytest.raises(DataError, match=message):
            bank.load_reward(folder)
        assert (
            bank.adapters,
            list(bank.heads),
            bank.reward_views,
            bank.reward_checks,
            bank.active,
            bank.trainable,
        ) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda head: None, "holds no score weights, so its rewards can't be computed"),
            (
                lambda head: torch.cat([head, head]),
                r"\[2, 32\].*needs one of shape \[1, 32\]. Train the classifier with num_labels=1",
            ),
            (lambda head: head[:, :-1], r"\[1, 31\]"),
            (lambda head: head * float("nan"), "holds NaN or infinite weights"),
        ],
        ids=["no head", "two labels", "another width", "NaN"],
    )
    def test_heads(
        self,
        bank: AdapterBank,
        reward_adapter: str,
        tmp_path: Path,
        change: Callable[[Tensor], Tensor | None],
        message: str,
    ) -> None:
        folder = copied(reward_adapter, tmp_path / "bad")
        spoil_head(folder, change)
        self.refused(bank, folder, message)

    def test_two_labels_as_peft_saves_them(
        self, bank: AdapterBank, tiny_folder: str, write_reward_adapter: Write, tmp_path: Path
    ) -> None:
        self.refused(bank, Path(write_reward_adapter(tiny_folder, tmp_path / "two", labels=2)), r"\[2, 32\]")

    def test_a_policy_adapter(self, bank: AdapterBank, sft_adapter: str) -> None:
        self.refused(bank, Path(sft_adapter), "holds no score weights")

    def test_damage_beyond_the_head(self, bank: AdapterBank, reward_adapter: str, tmp_path: Path) -> None:
        folder = copied(reward_adapter, tmp_path / "bad")
        file = folder / "adapter_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(file).items() if "layers.1" not in key}, file)
        self.refused(bank, folder, "14 tensors are missing")

    def test_a_base_of_the_same_shape_that_the_adapter_names(self, reward_adapter: str, tmp_path: Path) -> None:
        """No certificate is needed: the folder that the adapter names is compared."""
        other = AdapterBank.from_pretrained(write_tiny_model(tmp_path / "other", seed=5), device="cpu")
        self.refused(
            other,
            Path(reward_adapter),
            r"was trained on other weights than this base \(\d+% of the sampled weights differ",
        )


class TestCertificate:
    @pytest.fixture
    def certified(self, tiny_folder: str, reward_adapter: str, tmp_path: Path) -> Path:
        folder = copied(reward_adapter, tmp_path / "certified")
        write_certificate(folder, tiny_folder, TEXTS)
        return folder

    def edit(self, folder: Path, **changes: Any) -> None:
        file = folder / "marl_certificate.json"
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    def test_what_it_records(self, certified: Path, tiny_folder: str) -> None:
        written = json.loads((certified / "marl_certificate.json").read_text(encoding="utf-8"))
        assert written["pad_token_id"] == 0
        assert [row["ids"] for row in written["golden"]] == tokens(append_eos=True)
        with torch.no_grad():
            expected = classifier(tiny_folder, str(certified))(
                input_ids=torch.tensor([written["golden"][0]["ids"]])
            ).logits.item()
        assert written["golden"][0]["score"] == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_same_base_is_accepted_also_when_cast(self, certified: Path, tiny_folder: str, dtype: str) -> None:
        bank = AdapterBank.from_pretrained(tiny_folder, dtype=dtype, device="cpu")
        bank.load_reward(certified)
        assert "trained on these weights; 5 golden scores match within" in bank.reward_checks["reward"]

    def test_a_copy_of_the_base_elsewhere_is_accepted(self, certified: Path, tmp_path: Path) -> None:
        bank = AdapterBank.from_pretrained(write_tiny_model(tmp_path / "copy"), device="cpu")
        bank.load_reward(certified)
        assert "trained on these weights" in bank.reward_checks["reward"]

    def test_another_base_is_refused(self, certified: Path, tmp_path: Path) -> None:
        other = AdapterBank.from_pretrained(write_tiny_model(tmp_path / "other", seed=5), device="cpu")
        TestRefused().refused(other, certified, "was trained on other weights than this base")

    def test_other_golden_scores_are_refused(self, bank: AdapterBank, certified: Path) -> None:
        golden = json.loads((certified / "marl_certificate.json").read_text(encoding="utf-8"))["golden"]
        self.edit(certified, golden=[{**row, "score": row["score"] + 1.0} for row in golden])
        TestRefused().refused(bank, certified, r"scores its own golden texts differently here \(off by 1")

    def test_another_reading_is_refused(self, bank: AdapterBank, certified: Path) -> None:
        self.edit(certified, pad_token_id=2)  # would read the token before EOS
        TestRefused().refused(bank, certified, "scores its own golden texts differently here")

    def test_without_one_and_without_its_base_it_says_so(
        self, bank: AdapterBank, reward_adapter: str, tmp_path: Path
    ) -> None:
        folder = copied(reward_adapter, tmp_path / "orphan")
        file = folder / "adapter_config.json"
        file.write_text(
            json.dumps({**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": "/gone"}),
            encoding="utf-8",
        )
        bank.load_reward(folder)
        assert bank.reward_checks["reward"].startswith("can't verify that")
        assert "'/gone' isn't here" in bank.reward_checks["reward"]
