"""Rows never leak into each other: each in a batch, padded or packed, is what transformers gives for it alone, or the model is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from marl_core import AdapterBank, DataError, MarlError, Prompts, RunConfig, Runner
from marl_core.bank import measure
from marl_core.bank.trunk import PassOptions, Trunk
from marl_core.config.run_config import SamplingSection
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.testing import tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
T = transformers
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**DECODER)),
    "gpt2, learned positions": lambda: T.GPT2LMHeadModel(T.GPT2Config(**SIZES, n_layer=2, n_positions=64)),
    "opt, an offset of positions": lambda: T.OPTForCausalLM(
        T.OPTConfig(**SIZES, ffn_dim=64, num_hidden_layers=2, word_embed_proj_dim=16, max_position_embeddings=64)
    ),
    "bloom, alibi": lambda: T.BloomForCausalLM(T.BloomConfig(**SIZES, n_layer=2)),
    "gemma2, windows and soft caps": lambda: T.Gemma2ForCausalLM(
        T.Gemma2Config(**DECODER, head_dim=8, sliding_window=4, final_logit_softcapping=5.0)
    ),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**DECODER, **EXPERTS)),
    "lfm2, convolutions": lambda: T.Lfm2ForCausalLM(
        T.Lfm2Config(**DECODER, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    ),
    "mamba2": lambda: T.Mamba2ForCausalLM(
        T.Mamba2Config(
            **SIZES | {"num_attention_heads": 1}, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2
        )
    ),
    "falcon-h1, attention beside mamba": lambda: T.FalconH1ForCausalLM(
        T.FalconH1Config(**DECODER, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=2, mamba_d_ssm=64)
    ),
    "qwen3-next, linear attention": lambda: T.Qwen3NextForCausalLM(
        T.Qwen3NextConfig(
            **DECODER,
            **LINEAR,
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
}
PACKED = {"llama", "mixtral", "gpt2, learned positions", "opt, an offset of positions"}
"""Models whose layers mix positions by attention alone, which transformers computes with its sdpa function."""
NOISE = 3e-5
"""About twenty times the largest difference of float32 log-probs of a row alone and in a batch over these models, 1.4e-6."""


def saved(make: Callable[[], Any], folder: Path) -> str:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):  # what starts at zero would hide faults
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


ROWS = [[1, 70, 80, 90, 100, 110, 120], [1, 75, 85], [1, 60, 61, 62, 63], [1, 64]]


def batch(left: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """The rows with padding on both sides: each at another place, as prompts with responses stand."""
    width = left + right + max(map(len, ROWS))
    ids, mask = torch.zeros(len(ROWS), width, dtype=torch.int64), torch.zeros(len(ROWS), width, dtype=torch.bool)
    for index, row in enumerate(ROWS):
        start = min(left + index, width - len(row))
        ids[index, start : start + len(row)], mask[index, start : start + len(row)] = torch.tensor(row), True
    return ids, mask


def logprobs(bank: AdapterBank, ids: Tensor, mask: Tensor) -> Tensor:
    logits = (
        bank.trunk.logits_of(bank.trunk.hidden(ids, mask))
        if bank.trunk.plain_head
        else bank.trunk.logits(ids, mask, ids.shape[1])
    )
    return logits.log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_what_it_is_alone(name: str, tmp_path: Path) -> None:
    folder = saved(MODELS[name], tmp_path)
    judge = T.AutoModelForCausalLM.from_pretrained(folder).eval()
    bank = AdapterBank.from_pretrained(folder, device="cpu")
    assert bank.trunk.packs == (name in PACKED), bank.trunk.packing_fault
    with torch.no_grad():
        wanted = [judge(input_ids=torch.tensor([row])).logits[0].log_softmax(-1) for row in ROWS]
        for pack in (True, False):
            with bank.trunk.passing(PassOptions(pack=pack)):
                for left, right in ((0, 0), (3, 2)):
                    ids, mask = batch(left, right)
                    found = logprobs(bank, ids, mask)
                    for index, right_one in enumerate(wanted):
                        torch.testing.assert_close(found[index][mask[index]], right_one, rtol=0, atol=NOISE)


STRETCHED: dict[str, Callable[[], Any]] = {
    "dynamic": lambda: T.LlamaForCausalLM(
        T.LlamaConfig(
            **{**DECODER, "max_position_embeddings": 8},
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        )
    ),
    "longrope": lambda: T.Phi3ForCausalLM(
        T.Phi3Config(
            **DECODER,
            sliding_window=None,
            original_max_position_embeddings=8,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 8,
            },
        )
    ),
}
"""Frequencies that depend on how long a row is; to eight tokens they are the original ones."""


@pytest.mark.parametrize("name", STRETCHED)
def test_a_long_row_stretches_no_other(name: str, tmp_path: Path) -> None:
    """Nor does the longest row of a pass before. A judge is loaded for each row: transformers' own keeps what it grew to."""
    folder = saved(STRETCHED[name], tmp_path)
    lengths = (1, 20, 8, 9, 3, 9, 12)
    width = max(lengths) + 2
    ids = torch.randint(3, 260, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    starts = [2 if index % 2 else width - length for index, length in enumerate(lengths)]
    places = torch.arange(width)
    mask = torch.stack([(places >= s) & (places < s + n) for s, n in zip(starts, lengths, strict=True)])
    bank = AdapterBank.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        for index in range(len(lengths)):
            judge = T.AutoModelForCausalLM.from_pretrained(folder).eval()
            wanted = judge(input_ids=ids[index][mask[index]][None]).logits[0].log_softmax(-1)
            for pack in (True, False):
                with bank.trunk.passing(PassOptions(pack=pack)):
                    found = logprobs(bank, ids, mask)[index][mask[index]]
                    torch.testing.assert_close(found, wanted, rtol=0, atol=NOISE)
                    slow = bank.trunk.logits(ids, mask, width)[index][mask[index]].log_softmax(-1)
                    torch.testing.assert_close(slow, wanted, rtol=0, atol=NOISE)


@pytest.mark.parametrize("name", STRETCHED)
def test_what_is_sampled_past_the_stretch_is_scored_anew(name: str, tmp_path: Path) -> None:
    """A cache holds keys of the frequencies before; a pass over the whole row doesn't. A run keeps its rows below."""
    bank = AdapterBank.from_pretrained(saved(STRETCHED[name], tmp_path), device="cpu")
    for tokens, captured in ((3, True), (9, False)):
        sampling = SamplingSection(max_new_tokens=tokens, min_new_tokens=tokens)
        rollout = PolicySampler(bank, None, sampling, (2,))(Prompts.of([[1, 70, 80], [1, 75]], 0), 0)
        assert (rollout.behavior is not None) == (captured and bank.trunk.sampler("marl") == "marl")
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a text of its own"}))
    config = RunConfig.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "reference": "disabled-adapter",
            "reward": {"use": "length-format", "max_tokens": 20},
            "data": {"prompts": str(file)},
            "sampling": {"max_new_tokens": 3},
            "run": {"device": "cpu"},
        }
    )
    with pytest.raises(DataError, match="exceeds 5 tokens"):
        Runner(config)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "rwkv": (
        lambda: T.RwkvForCausalLM(
            T.RwkvConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
        ),
        "beside padding: .*keeps a state that padding enters|beside padding: its forward takes no position_ids",
    ),
    "bert, which looks ahead": (
        lambda: T.BertLMHeadModel(T.BertConfig(**SIZES, num_hidden_layers=2, intermediate_size=64)),
        "it isn't causal: .*is_decoder: true",
    ),
    "roberta, positions of its own": (
        lambda: T.RobertaForCausalLM(
            T.RobertaConfig(**{**SIZES, "pad_token_id": 1}, num_hidden_layers=2, intermediate_size=64, is_decoder=True)
        ),
        "beside padding: .*numbers positions in a way of its own",
    ),
    "bart, positions by columns": (
        lambda: T.BartForCausalLM(
            T.BartConfig(
                **{k: v for k, v in SIZES.items() if "size" in k or "id" in k},
                d_model=32,
                decoder_layers=2,
                decoder_attention_heads=4,
                decoder_ffn_dim=64,
                is_encoder_decoder=False,
            )
        ),
        "beside padding: its forward takes no position_ids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cant_be_padded_is_refused_at_load(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    with pytest.raises(DataError, match=rf"model: \w+ can't be used: .*({message})"):
        AdapterBank.from_pretrained(saved(make, tmp_path), device="cpu")


def test_padding_that_enters_a_state_is_seen_in_half_precision(tmp_path: Path) -> None:
    """It changes rows by less than bfloat16 rounds; that they change with what stands in the padding tells it."""
    model = MODELS["llama"]()

    def sum_up(module: Any, inputs: Any, output: Any) -> Any:
        return output + 1e-2 * output.cumsum(dim=1)

    model.model.layers[0].mlp.register_forward_hook(sum_up)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(DataError, match="beside padding"):
            Trunk(model.to(dtype))


def test_residuals_of_another_dtype(tmp_path: Path) -> None:
    """Mamba adds in float32 whatever its weights are; its head takes the weights' dtype, as transformers gives it."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_attention_heads"}
    folder = saved(
        lambda: T.MambaForCausalLM(T.MambaConfig(**sizes, num_hidden_layers=2, state_size=8, initializer_range=0.1)),
        tmp_path,
    )
    bank = AdapterBank.from_pretrained(folder, device="cpu", dtype="bfloat16")
    judge = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids, mask = batch()
    with torch.no_grad():
        found = logprobs(bank, ids, mask).float()
        for index, row in enumerate(ROWS):
            wanted = judge(input_ids=torch.tensor([row])).logits[0].float().log_softmax(-1)
            torch.testing.assert_close(found[index][mask[index]], wanted, rtol=0, atol=0.1)  # ten roundings of bfloat16


def test_a_leak_is_seen_however_small(tmp_path: Path) -> None:
    """A layer that lets a token see a ten-thousandth of its neighbour, as none of transformers' own parts tells."""
    folder = saved(MODELS["llama"], tmp_path)
    for dtype in ("float32", "bfloat16"):
        bank = AdapterBank.from_pretrained(folder, device="cpu", dtype=dtype)

        def shift(module: Any, inputs: Any, output: Any) -> Any:
            return output + 1e-2 * output.roll(1, dims=1)

        bank.base.get_submodule("model.layers.0.mlp").register_forward_hook(shift)
        bank.trunk.__dict__.pop("packing_fault", None)
        assert measure.packing_fault(bank.trunk) is not None


@pytest.mark.parametrize("jitter", ["mixtral", "phimoe"])
def test_router_noise_stays_off(jitter: str, tmp_path: Path) -> None:
    """Recomputed layers are in train mode, their routers are not: same numbers, same gradient; and so after somebody's train()."""
    make = {
        "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**DECODER, **EXPERTS, router_jitter_noise=0.3)),
        "phimoe": lambda: T.PhimoeForCausalLM(T.PhimoeConfig(**DECODER, **EXPERTS, input_jitter_noise=0.3)),
    }[jitter]
    bank = AdapterBank.from_pretrained(saved(make, tmp_path), device="cpu")
    ids, mask = batch()
    embedding = bank.base.get_parameter("model.embed_tokens.weight").requires_grad_(True)
    found = []
    for options in (PassOptions(), PassOptions(recompute=True), PassOptions(recompute=True)):
        bank.trunk.prepare(options)
        bank.base.train()
        with bank.trunk.passing(options):
            states = bank.trunk.hidden(ids, mask)
            (gradient,) = torch.autograd.grad(states[mask].sin().sum(), [embedding])
        found.append((states.detach(), gradient))
    for states, gradient in found[1:]:
        assert torch.equal(states, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in bank.base.modules())


def test_a_model_that_cant_recompute_says_so(tmp_path: Path) -> None:
    config = T.OpenAIGPTConfig(**SIZES, n_layer=2, n_positions=64)
    bank = AdapterBank.from_pretrained(saved(lambda: T.OpenAIGPTLMHeadModel(config), tmp_path), device="cpu")
    with pytest.raises(MarlError, match=r"model\.gradient_checkpointing: OpenAIGPTLMHeadModel can't recompute"):
        bank.trunk.prepare(PassOptions(recompute=True))
