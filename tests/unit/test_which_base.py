"""Which base is this? This one wherever it lies and however it is stored, another one whatever differs, or it is said."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from marl_core import AdapterBank, DataError, MarlWarning, Quantization, merge_into, write_certificate
from marl_core.bank import base as base_module
from marl_core.bank.adapters import AdapterBank as Bank
from marl_core.bank.base import load_base
from marl_core.bank.identity.digest import digest
from marl_core.bank.identity.fingerprint import difference, fingerprint, kinds
from marl_core.bank.identity.fingerprint_v1 import first_version, is_short_of, short
from marl_core.bank.merge import attach, merge_adapter
from marl_core.bank.read_through import fingerprint_of_folder
from marl_core.testing import tiny_model, tiny_tokenizer, write_tiny_model

Write = Callable[..., str]
IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **IDS,
}


def renamed(adapter: str, name: str | None, folder: Path, **changes: Any) -> str:
    """A copy of an adapter that names another base."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": name, **changes}), encoding="utf-8")
    return str(folder)


def told(bank: Bank, adapter: str) -> str:
    """What the bank says about a policy adapter's base."""
    bank.load("asked", adapter)
    try:
        return bank.base_checks["asked"]
    finally:
        bank.remove("asked")


def changed(folder: str, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A copy of a model folder with other numbers in its file."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


class TestEveryKindAtEveryDepth:
    """A change of one number, in any kind of weight and any layer, whatever the number of layers."""

    KINDS = (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_proj.bias",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    )

    @pytest.mark.parametrize("layers", [1, 2, 24, 25, 27, 48, 51])
    def test_in_memory(self, layers: int) -> None:
        model = tiny_model(hidden_size=8, intermediate_size=8, num_hidden_layers=layers, attention_bias=True)
        before = fingerprint(model)
        tensors = dict(model.named_parameters())
        assert not difference(fingerprint(model), before).names
        chosen = [f"layers.{n}.{kind}" for n in {0, layers // 2, layers - 1} for kind in self.KINDS]
        chosen += ["embed_tokens.weight", "norm.weight"]
        for name in chosen:
            tensors[f"model.{name}"].data.view(-1)[3] += 0.01
        found = set(difference(fingerprint(model), before).names)
        assert found == {*chosen, "lm_head.weight"}  # it is tied to the embedding

    def test_the_head(self) -> None:
        model = tiny_model(tie_word_embeddings=False)
        before = fingerprint(model)
        model.lm_head.weight.data[5, 5] += 0.01
        assert difference(fingerprint(model), before).names == ("lm_head.weight",)

    @pytest.mark.parametrize("kind", ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    def test_a_mixture_of_experts(self, kind: str) -> None:
        model = causal(
            transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        )
        before = fingerprint(model)
        dict(model.named_parameters())[f"model.layers.1.{kind}"].data.view(-1)[-1] += 0.01
        assert difference(fingerprint(model), before).names == (f"layers.1.{kind}",)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_merged_adapter_is_recognized(self, tmp_path: Path, write_sft_adapter: Write, dtype: str) -> None:
        """24 layers, attention only: what samples of every 7th tensor couldn't see."""
        base = write_tiny_model(tmp_path / "base", num_hidden_layers=24, initializer_range=0.02)
        sft = write_sft_adapter(base, tmp_path / "sft", scale=0.01, target_modules=["q_proj", "o_proj"])
        bank = AdapterBank.from_pretrained(
            base, dtype=dtype, device="cpu", prepare=lambda model: merge_into(model, sft)
        )
        assert bank.origin is None
        with pytest.raises(
            DataError, match=r"not this base's \(\d+% of the .* differ: q_proj, o_proj of layers 0-23\)"
        ):
            bank.load("sft", sft)
        assert bank.adapters == []

    def test_words(self) -> None:
        names = [
            "layers.0.self_attn.q_proj.weight",
            "layers.1.self_attn.q_proj.weight",
            "layers.3.self_attn.q_proj.weight",
        ]
        assert kinds([*names, "embed_tokens.weight"]) == "q_proj of layers 0-1, 3; embed_tokens"
        assert kinds(["h.4.attn.c_attn.bias", "layers.4.mlp.experts.down_proj"]) == (
            "c_attn.bias, experts.down_proj of layer 4"
        )


def causal(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config)


GPT2 = transformers.GPT2Config(vocab_size=260, n_positions=128, n_embd=32, n_layer=2, n_head=4, **IDS)


def gpt2_body() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.GPT2Model(GPT2)


def gemma3_with_eyes() -> Any:
    eyes = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    words = transformers.Gemma3TextConfig(**SIZES, head_dim=8)
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(text_config=words, vision_config=eyes))


SMALL: dict[str, Any] = {"vocab_size": 260, "num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2, **IDS}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt2 as the hub has it": (gpt2_body, "c_attn"),
    "gpt2": (lambda: causal(GPT2), "c_attn"),
    "bloom": (
        lambda: causal(transformers.BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4, **IDS)),
        "query_key_value",
    ),
    "gpt-neox": (lambda: causal(transformers.GPTNeoXConfig(**SMALL, intermediate_size=64)), "query_key_value"),
    "opt": (lambda: causal(transformers.OPTConfig(**SMALL, word_embed_proj_dim=32, ffn_dim=64)), "q_proj"),
    "mixtral": (lambda: causal(transformers.MixtralConfig(**SIZES, num_local_experts=4)), "q_proj"),
    "qwen3-moe": (
        lambda: causal(
            transformers.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
        "q_proj",
    ),
    "gemma3, text": (lambda: causal(transformers.Gemma3TextConfig(**SIZES, head_dim=8)), "q_proj"),
    "gemma3, multimodal": (gemma3_with_eyes, "q_proj"),
    "llama, untied": (lambda: tiny_model(tie_word_embeddings=False), "q_proj"),
}


class TestFilesThatNameTensorsOtherwise:
    """The names in a file are not those in memory: read through transformers they are."""

    @pytest.fixture(params=MODELS)
    def model(self, request: pytest.FixtureRequest, tmp_path: Path, write_sft_adapter: Write) -> tuple[str, str]:
        made, target = MODELS[request.param]
        body = made()
        body.save_pretrained(tmp_path / "base")
        if isinstance(body, transformers.GPT2Model) and not hasattr(body, "lm_head"):
            file = tmp_path / "base" / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["GPT2LMHeadModel"]}))
            tensors = load_file(tmp_path / "base" / "model.safetensors")
            assert "h.0.attn.c_attn.weight" in tensors
            tensors |= {
                f"h.{n}.attn.bias": torch.tril(torch.ones(1, 1, 128, 128)) for n in range(2)
            }  # the hub's files hold them
            save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        base = str(tmp_path / "base")
        pattern = rf".*language_model.*\.{target}" if "Conditional" in type(body).__name__ else [target]
        turned = target == "c_attn"  # GPT-2's layers hold their weights transposed
        return base, write_sft_adapter(base, tmp_path / "sft", target_modules=pattern, fan_in_fan_out=turned)

    def test_this_folder_a_copy_and_a_change(self, model: tuple[str, str], tmp_path: Path) -> None:
        base, adapter = model
        bank = AdapterBank.from_pretrained(base, device="cpu")
        assert told(bank, adapter) == f"trained on these weights (it names {base})"
        copy = shutil.copytree(base, tmp_path / "copy")
        assert "compared with" in told(bank, renamed(adapter, str(copy), tmp_path / "of-copy"))

        def shift(tensors: dict[str, torch.Tensor]) -> None:
            name = next(
                name for name in tensors if "expert" in name or name.endswith("norm.weight") or ".ln_1." in name
            )
            tensors[name] = tensors[name] + 0.01

        other = changed(base, tmp_path / "other", shift)
        with pytest.raises(
            DataError, match=r"whose weights are not this base's \(\d+% of the sampled weights differ: \S+"
        ):
            told(bank, renamed(adapter, other, tmp_path / "of-other"))
        assert bank.adapters == []

    def test_what_is_read_is_what_is_loaded(self, model: tuple[str, str]) -> None:
        base, _ = model
        found = difference(fingerprint(load_base(base)), fingerprint_of_folder(Path(base)))
        assert not found.names
        assert found.compared == len(fingerprint(load_base(base))["tensors"])

    def test_a_bank_on_a_model_object(self, model: tuple[str, str]) -> None:
        base, adapter = model
        bank = AdapterBank(load_base(base), tiny_tokenizer())
        assert told(bank, adapter) == f"trained on these weights (compared with {base})"

    def test_experts_lie_singly_in_the_file(self, tmp_path: Path) -> None:
        """Else the cases above wouldn't try it."""
        MODELS["qwen3-moe"][0]().save_pretrained(tmp_path)
        with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
            assert "model.layers.0.mlp.experts.3.gate_proj.weight" in set(file.keys())

    def test_several_files(self, tmp_path: Path, tiny_folder: str, sft_adapter: str) -> None:
        load_base(tiny_folder).save_pretrained(tmp_path / "shards", max_shard_size="20kB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        assert "compared with" in told(bank, renamed(sft_adapter, str(tmp_path / "shards"), tmp_path / "sft"))

    def test_both_ends_of_a_tied_pair_in_the_file(self, tmp_path: Path, tiny_folder: str, sft_adapter: str) -> None:
        def both(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        copy = changed(tiny_folder, tmp_path / "both", both)
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        assert "compared with" in told(bank, renamed(sft_adapter, copy, tmp_path / "sft"))


class TestReading:
    def test_nothing_of_the_process_changes(self, tiny_folder: str) -> None:
        hooks = torch.nn.modules.module._global_parameter_registration_hooks
        before = (
            torch.get_rng_state(),
            transformers.logging.get_verbosity(),
            transformers.logging.is_progress_bar_enabled(),
        )
        fingerprint_of_folder(Path(tiny_folder))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before[1:]
        assert not hooks

    def test_another_thread_builds_its_model_meanwhile(self, tiny_folder: str) -> None:
        stop, broken = threading.Event(), []

        def build() -> None:
            while not stop.is_set():
                broken.append(any(p.is_meta for p in torch.nn.Linear(4, 4).parameters()))

        thread = threading.Thread(target=build)
        thread.start()
        for _ in range(5):
            fingerprint_of_folder(Path(tiny_folder))
        stop.set()
        thread.join()
        assert broken
        assert not any(broken)


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, write_sft_adapter: Write) -> tuple[Path, str]:
    """float32, bfloat16, float16: copies of one base; half-of: its bfloat16 copy saved as float16; merged-*: with an adapter."""
    root = tmp_path_factory.mktemp("copies")
    base = write_tiny_model(root / "float32", initializer_range=0.02, num_hidden_layers=3)
    adapter = write_sft_adapter(base, root / "sft", scale=0.01, target_modules=["v_proj"])
    merge_adapter(base, adapter, root / "merged-float32")
    for name in ("", "merged-"):
        for dtype in ("bfloat16", "float16"):
            save_as(root / f"{name}float32", root / f"{name}{dtype}", dtype)
    save_as(root / "bfloat16", root / "half-of", "float16")
    save_as(root / "bfloat16", root / "wide-of", "float32")
    return root, adapter


def save_as(source: Path, to: Path, dtype: str) -> None:
    model = load_base(str(source))
    cast: Any = model
    cast.to(getattr(torch, dtype)).save_pretrained(to)
    tiny_tokenizer().save_pretrained(to)


class TestAnotherDtype:
    """Saved and loaded in any of three dtypes it is the same base, and a merged one is not."""

    @pytest.mark.parametrize("loaded", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("here", ["float32", "bfloat16", "float16", "half-of", "wide-of"])
    def test_copies(self, copies: tuple[Path, str], tmp_path: Path, here: str, loaded: str) -> None:
        root, adapter = copies
        bank = AdapterBank.from_pretrained(str(root / here), dtype=loaded, device="cpu")
        for there in ("float32", "bfloat16", "float16", "half-of", "wide-of"):
            assert "trained on these" in told(bank, renamed(adapter, str(root / there), tmp_path / there)), there
        for there in ("merged-float32", "merged-bfloat16", "merged-float16"):
            with pytest.raises(DataError, match=r"differ: v_proj of layers 0-2\)"):
                told(bank, renamed(adapter, str(root / there), tmp_path / there))

    @pytest.mark.parametrize("loaded", ["float32", "bfloat16", "float16"])
    def test_certificates(
        self, copies: tuple[Path, str], tmp_path: Path, write_reward_adapter: Write, loaded: str
    ) -> None:
        """Written on the float32 and on the bfloat16 copy, read on each; by transformers' classifier in float32."""
        root, _ = copies
        for there in ("float32", "bfloat16"):
            reward = write_reward_adapter(str(root / there), tmp_path / there)
            write_certificate(reward, root / there, ["A good film.", "Bad"])
            for here in ("float32", "bfloat16", "float16"):
                bank = AdapterBank.from_pretrained(str(root / here), dtype=loaded, device="cpu")
                bank.load_reward(reward)
                assert "trained on these weights; 2 golden" in bank.reward_checks["reward"]
            merged = AdapterBank.from_pretrained(str(root / "merged-float32"), dtype=loaded, device="cpu")
            with pytest.raises(DataError, match=r"other weights than this base .*v_proj of layers 0-2;"):
                merged.load_reward(reward)

    def test_a_small_change_of_a_constant_weight(self) -> None:
        """Norms of 1.0 fit any dtype: 1.001 in float32 is no cast of them."""
        model = tiny_model()
        before = fingerprint(model)
        model.model.norm.weight.data.add_(0.001)
        assert difference(fingerprint(model), before).names == ("norm.weight",)

    def test_a_part_kept_in_float32(self) -> None:
        """A router or norm that stays float32 in one copy and was cast with the rest in the other."""
        one, other = tiny_model(), tiny_model()
        for model in (one, other):
            model.model.norm.weight.data.normal_(1.0, 0.1, generator=torch.Generator().manual_seed(3))
        norm = one.model.norm.weight.data.clone()
        one, other = one.to(torch.bfloat16), other.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers' own stub
        one.model.norm.weight.data = norm
        assert not difference(fingerprint(one), fingerprint(other)).names

    def test_a_merge_rounded_by_another_machine(self, tmp_path: Path, tiny_folder: str, sft_adapter: str) -> None:
        """The merged folder was written elsewhere: last bits differ, the weights are the same."""

        def rounded(tensors: dict[str, torch.Tensor]) -> None:
            for name, tensor in tensors.items():
                if "proj" in name:
                    tensors[name] = tensor * (1 + 1e-7)

        merge_adapter(tiny_folder, sft_adapter, tmp_path / "merged")
        elsewhere = changed(str(tmp_path / "merged"), tmp_path / "elsewhere", rounded)
        bank = AdapterBank.from_pretrained(
            tiny_folder, device="cpu", prepare=lambda model: merge_into(model, sft_adapter)
        )
        assert "compared with" in told(bank, renamed(sft_adapter, elsewhere, tmp_path / "on-merged"))


class TestPlaces:
    """However the base is named: its place is looked at first, so this one is never another."""

    @pytest.fixture
    def home(self, tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
        shutil.copytree(tiny_folder, tmp_path / "base")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "link").symlink_to(tmp_path / "base")
        (tmp_path / "files").mkdir()
        for file in (tmp_path / "base").iterdir():
            (tmp_path / "files" / file.name).symlink_to(file)
        return tmp_path

    NAMES = (
        "base",
        "./base",
        "base/",
        "~/base",
        "~/base/",
        "../{here}/base",
        "{home}/base",
        "{home}/base/",
        "link",
        "files",
    )

    @pytest.mark.parametrize("name", NAMES)
    def test_no_file_is_read(self, home: Path, sft_adapter: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        name = name.format(home=home, here=home.name)
        adapter = renamed(sft_adapter, name, home / "sft")
        monkeypatch.setattr(
            "marl_core.bank.identity.which_base.fingerprint_of_folder", lambda *_, **__: pytest.fail("it was read")
        )
        for path in ("base", str(home / "base"), "link"):
            assert (
                told(AdapterBank.from_pretrained(path, device="cpu"), adapter)
                == f"trained on these weights (it names {name})"
            )

    def test_a_relative_name_from_another_folder(
        self, home: Path, sft_adapter: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Relative to where it was trained: above the adapter, whatever lies under that name here."""
        (home / "runs").mkdir()
        adapter = renamed(sft_adapter, "base", home / "runs" / "sft")
        write_tiny_model(home / "elsewhere" / "base", seed=9)
        monkeypatch.chdir(home / "elsewhere")
        assert "it names base" in told(AdapterBank.from_pretrained(str(home / "base"), device="cpu"), adapter)

    def test_a_base_that_moved(self, home: Path, sft_adapter: str) -> None:
        bank = AdapterBank.from_pretrained("base", device="cpu")
        for name in ("/gone", "gone/model", "C:\\models\\base", "some-owner/some-model", "\0"):
            said = told(bank, renamed(sft_adapter, name, home / "sft"))
            assert said.startswith("can't verify that")
            assert said.endswith(f"its base {name!r} isn't here")
            shutil.rmtree(home / "sft")
        assert told(bank, renamed(sft_adapter, None, home / "sft")).endswith("it names no base")

    def test_what_can_not_be_read(self, home: Path, sft_adapter: str) -> None:
        bank = AdapterBank.from_pretrained("base", device="cpu")
        (home / "pickled").mkdir()
        (home / "pickled" / "pytorch_model.bin").write_bytes(b"")
        (home / "half").mkdir()
        shutil.copy(home / "base" / "model.safetensors", home / "half")
        code = shutil.copytree(home / "base", home / "code")
        (code / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}))
        for name, why in (("pickled", "has no safetensors"), ("half", "can't be read"), ("code", "can't be read")):
            said = told(bank, renamed(sft_adapter, str(home / name), home / "sft"))
            assert said.startswith("can't verify")
            assert why in said
            shutil.rmtree(home / "sft")

    def test_a_base_that_was_written_to_since(self, home: Path, sft_adapter: str) -> None:
        """Its place says nothing any more."""
        adapter = renamed(sft_adapter, "base", home / "sft")
        bank = AdapterBank.from_pretrained("base", device="cpu")
        assert "it names base" in told(bank, adapter)
        with torch.no_grad():
            bank.base.model.layers[0].self_attn.k_proj.weight.add_(0.01)
        with pytest.raises(
            DataError, match=r"not this base's \(\d+% of the sampled weights differ: k_proj of layer 0\)"
        ):
            told(bank, adapter)

    def test_a_prepared_base_is_not_what_it_was_made_from(self, home: Path, sft_adapter: str) -> None:
        adapter = renamed(sft_adapter, "base", home / "sft")
        bank = AdapterBank.from_pretrained("base", device="cpu", prepare=lambda model: merge_into(model, adapter))
        with pytest.raises(DataError, match="not this base's"):
            bank.load("sft", adapter)
        untouched = AdapterBank.from_pretrained("base", device="cpu", prepare=lambda model: None)
        assert "compared with base" in told(untouched, adapter)


class TestTheHubsCache:
    """A hub model in the local cache is a folder like others."""

    @pytest.fixture
    def cache(self, tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        for owner, folder, commit in (
            ("a", tiny_folder, "1" * 40),
            ("b", write_tiny_model(tmp_path / "b", seed=7), "2" * 40),
        ):
            place = tmp_path / "hub" / f"models--{owner}--model"
            shutil.copytree(folder, place / "snapshots" / commit)
            (place / "refs").mkdir()
            (place / "refs" / "main").write_text(commit)
        return tmp_path

    def test_its_weights_are_compared(self, cache: Path, tiny_folder: str, sft_adapter: str) -> None:
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        assert "compared with a/model" in told(bank, renamed(sft_adapter, "a/model", cache / "x"))
        with pytest.raises(DataError, match="'b/model', whose weights are not this base's"):
            told(bank, renamed(sft_adapter, "b/model", cache / "y"))
        assert "isn't here" in told(bank, renamed(sft_adapter, "c/model", cache / "z"))

    def test_its_revision(self, cache: Path, tiny_folder: str, sft_adapter: str) -> None:
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        assert "compared" in told(bank, renamed(sft_adapter, "a/model", cache / "x", revision="1" * 40))
        assert "isn't here" in told(bank, renamed(sft_adapter, "a/model", cache / "y", revision="3" * 40))

    def test_the_snapshot_is_the_name(self, cache: Path, sft_adapter: str) -> None:
        snapshot = str(cache / "hub" / "models--a--model" / "snapshots" / ("1" * 40))
        bank = AdapterBank.from_pretrained(snapshot, device="cpu")
        assert "it names a/model" in told(bank, renamed(sft_adapter, "a/model", cache / "x"))

    def test_the_same_name_needs_no_look(self, cache: Path, tiny_folder: str, sft_adapter: str) -> None:
        from marl_core.bank.identity.which_base import Origin

        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        bank.note_read(Origin.of("not/cached", None), bank.fingerprint)
        assert "it names not/cached" in told(bank, renamed(sft_adapter, "not/cached", cache / "x"))
        assert "can't verify" in told(bank, renamed(sft_adapter, "not/cached", cache / "y", revision="other"))


class TestQuantized:
    """Compared with what it was made from; a folder that is quantized already, with its own kind."""

    def four_bit(self) -> Quantization:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return Quantization(config)

    def eight_bit(self) -> Quantization:
        return Quantization(transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0))

    @pytest.mark.parametrize("kind", ["four_bit", "eight_bit"])
    def test_at_load(self, wide_folder: str, write_sft_adapter: Write, tmp_path: Path, kind: str) -> None:
        adapter = write_sft_adapter(wide_folder, tmp_path / "sft")
        copy = shutil.copytree(wide_folder, tmp_path / "copy")
        other = write_tiny_model(
            tmp_path / "other", seed=3, hidden_size=64, intermediate_size=128, num_attention_heads=2
        )
        bank = AdapterBank.from_pretrained(wide_folder, device="cpu", quantization=getattr(self, kind)())
        assert "it names" in told(bank, adapter)
        assert "compared with" in told(bank, renamed(adapter, str(copy), tmp_path / "x"))
        with pytest.raises(DataError, match="not this base's"):
            told(bank, renamed(adapter, other, tmp_path / "y"))

    @pytest.mark.parametrize("kind", ["four_bit", "eight_bit"])
    def test_after_a_merge(self, wide_folder: str, write_sft_adapter: Write, tmp_path: Path, kind: str) -> None:
        adapter = write_sft_adapter(wide_folder, tmp_path / "sft")
        merge_adapter(wide_folder, adapter, tmp_path / "merged")
        bank = AdapterBank.from_pretrained(
            wide_folder,
            device="cpu",
            quantization=getattr(self, kind)(),
            prepare=lambda model: merge_into(model, adapter),
        )
        assert "compared with" in told(bank, renamed(adapter, str(tmp_path / "merged"), tmp_path / "x"))
        with pytest.raises(DataError, match="not this base's"):
            bank.load("sft", adapter)

    def test_a_folder_that_is_quantized(self, wide_folder: str, write_sft_adapter: Write, tmp_path: Path) -> None:
        adapter = write_sft_adapter(wide_folder, tmp_path / "sft")
        AdapterBank.from_pretrained(wide_folder, device="cpu", quantization=self.four_bit()).base.save_pretrained(
            tmp_path / "packed"
        )
        tiny_tokenizer().save_pretrained(tmp_path / "packed")
        copy = shutil.copytree(tmp_path / "packed", tmp_path / "copy")
        packed = AdapterBank.from_pretrained(str(tmp_path / "packed"), device="cpu")
        assert "it names" in told(packed, renamed(adapter, str(tmp_path / "packed"), tmp_path / "x"))
        assert "compared with" in told(packed, renamed(adapter, str(copy), tmp_path / "y"))
        assert "has quantized weights in its files" in told(packed, adapter)
        plain = AdapterBank.from_pretrained(wide_folder, device="cpu")
        assert "has quantized weights in its files" in told(plain, renamed(adapter, str(copy), tmp_path / "z"))

    def test_the_float32_base_is_gone_before_its_quantized_copy_comes(
        self, wide_folder: str, write_sft_adapter: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapter = write_sft_adapter(wide_folder, tmp_path / "sft")
        full: list[weakref.ref[Any]] = []
        alive: list[bool] = []
        load = base_module._load

        def watched(*arguments: Any) -> Any:
            alive.extend(weights() is not None for weights in full)
            model = load(*arguments)
            full.extend(weakref.ref(parameter) for parameter in model.parameters() if not full)
            return model

        monkeypatch.setattr(base_module, "_load", watched)
        AdapterBank.from_pretrained(
            wide_folder, device="cpu", quantization=self.four_bit(), prepare=lambda model: merge_into(model, adapter)
        )
        assert alive
        assert not any(alive)


class TestCertificatesOfTheFirstVersion:
    """Written by marl 0.1; the numbers below are computed as it did."""

    @pytest.fixture
    def old(self, tiny_folder: str, reward_adapter: str, tmp_path: Path) -> Path:
        folder = Path(shutil.copytree(reward_adapter, tmp_path / "old"))
        write_certificate(folder, tiny_folder, ["A good film.", "Bad"])
        file = folder / "marl_certificate.json"
        matrices = {n: p for n, p in load_base(tiny_folder).named_parameters() if p.dim() == 2 and ".layers." in n}
        base = {}
        for name, matrix in sorted(matrices.items()):
            places = torch.linspace(0, matrix.numel() - 1, 64).long()
            base[name] = [round(value, 8) for value in matrix.detach().reshape(-1)[places].tolist()]
        file.write_text(json.dumps({**json.loads(file.read_text()), "version": 1, "base": base}))
        return folder

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_it_is_read(self, old: Path, tiny_folder: str, dtype: str) -> None:
        bank = AdapterBank.from_pretrained(tiny_folder, dtype=dtype, device="cpu")
        bank.load_reward(old)
        assert "trained on these weights; 2 golden scores match" in bank.reward_checks["reward"]

    def test_another_base_is_refused(self, old: Path, tmp_path: Path) -> None:
        bank = AdapterBank.from_pretrained(write_tiny_model(tmp_path / "other", seed=5), device="cpu")
        with pytest.raises(DataError, match=r"other weights than this base \(\d+% of the sampled weights differ: "):
            bank.load_reward(old)

    def test_names_that_say_nothing_are_said(self, old: Path, tiny_folder: str) -> None:
        file = old / "marl_certificate.json"
        written = json.loads(file.read_text())
        file.write_text(json.dumps({**written, "base": {f"x.{name}": row for name, row in written["base"].items()}}))
        bank = AdapterBank.from_pretrained(tiny_folder, device="cpu")
        bank.load_reward(old)
        assert "can't verify" in bank.reward_checks["reward"]

    @pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma3, text"])
    def test_a_classifier_has_the_causal_models_names(
        self, name: str, tmp_path: Path, write_reward_adapter: Write
    ) -> None:
        made, target = MODELS[name]
        made().save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        reward = write_reward_adapter(
            str(tmp_path / "base"), tmp_path / "rm", target_modules=[target], fan_in_fan_out=name == "gpt2"
        )
        write_certificate(reward, tmp_path / "base", ["A good film.", "Bad"])
        bank = AdapterBank.from_pretrained(str(shutil.copytree(tmp_path / "base", tmp_path / "copy")), device="cpu")
        bank.load_reward(reward)
        assert "trained on these weights; 2 golden scores match" in bank.reward_checks["reward"]


class TestRunFolders:
    def test_the_first_versions_hash(self) -> None:
        """As marl 0.1 wrote it for tiny_model(): a run folder of it resumes, and not on another base."""
        model = tiny_model()
        assert is_short_of("fcb717ec7fe7ab03", fingerprint(model))
        assert not is_short_of("fcb717ec7fe7ab03", fingerprint(tiny_model(seed=1)))

    def test_what_it_held(self) -> None:
        names = [name for name, p in tiny_model().named_parameters() if p.dim() == 2 and ".layers." in name]
        assert sorted(first_version(fingerprint(tiny_model()))) == sorted(names)

    def test_this_version(self) -> None:
        one, other = fingerprint(tiny_model()), fingerprint(tiny_model(seed=1))
        assert json.loads(json.dumps(one)) == one
        assert is_short_of(short(one), one)
        assert not is_short_of(short(other), one)
        assert is_short_of(None, one)
        assert is_short_of("v3-0123456789abcdef", one)  # by a later marl: nothing is claimed


class TestMerge:
    def test_another_base_is_refused_by_kind(self, tiny_folder: str, sft_adapter: str) -> None:
        base = load_base(tiny_folder)
        base.model.layers[1].input_layernorm.weight.data.mul_(1.01)
        with pytest.raises(DataError, match=r"not this base's \(\d+% .* differ: input_layernorm of layer 1\)"):
            attach(base, sft_adapter, "reference.adapter")

    def test_what_can_not_be_told_is_said(self, tiny_folder: str, sft_adapter: str, tmp_path: Path) -> None:
        adapter = renamed(sft_adapter, "some-owner/some-model", tmp_path / "sft")
        with pytest.warns(MarlWarning, match=r"reference.adapter: can't verify .* 'some-owner/some-model' isn't here"):
            attach(load_base(tiny_folder), adapter, "reference.adapter")


class TestDigest:
    @pytest.mark.parametrize("count", [0, 1, 7, 8, 4093 * 8, 4093 * 8 + 5, 100_003])
    def test_every_place_counts(self, count: int) -> None:
        tensor = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        before = int(digest(tensor))
        assert int(digest(tensor.clone())) == before
        for place in {0, count // 2, count - 1} if count else ():
            tensor[place] ^= 1
            assert int(digest(tensor)) != before
            tensor[place] ^= 1
        if count > 8:
            assert int(digest(tensor.roll(8))) != before

    def test_where_it_lies_in_memory_does_not(self) -> None:
        whole = torch.arange(1000, dtype=torch.int16)
        assert int(digest(whole[3:903])) == int(digest(whole[3:903].clone()))
        assert int(digest(whole.view(10, 100).t())) == int(digest(whole.view(10, 100).t().contiguous()))

    def test_rows_that_change_places(self) -> None:
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
        order = torch.tensor([1, 0, *range(2, 64)])
        assert int(digest(weight)) != int(digest(weight[order]))
