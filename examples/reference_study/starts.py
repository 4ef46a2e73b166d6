"""How far each start model is from the exact SFT model: merged or kept, in float32, bfloat16, 8 and 4 bits.

The exact model is base plus SFT adapter in float32. Numbers are over held-out review snippets.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from arms import Inputs
from peft import LoraConfig, PeftModel, get_peft_model
from quickstart_parts import console, reviews_of
from results import RESULTS, write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BASES: dict[str, dict[str, Any]] = {  # as the strategies of the same names load them
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "bnb-8bit": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    },
    "bnb-4bit": {
        "dtype": torch.bfloat16,
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    },
}
TEXTS = 48


def measure_starts(runs: Path, inputs: Inputs) -> None:
    """Write results/starts.jsonl, unless the same inputs were measured before."""
    file = RESULTS / "starts.jsonl"
    if file.is_file():
        console.print(f"done before: {file}")
        return
    tokenizer = AutoTokenizer.from_pretrained(inputs.merged)
    rows = [tokenizer.encode(text, add_special_tokens=False)[:48] for text in reviews_of("eval", TEXTS)]
    rows = [row for row in rows if len(row) > 4]
    judge = kept(inputs, BASES["float32"])
    exact = [log_softmax(judge, row) for row in rows]
    found = []
    for base, options in BASES.items():
        merged = AutoModelForCausalLM.from_pretrained(inputs.merged, **options).eval()
        bare = [log_softmax(merged, row) for row in rows]
        for name, model in models(inputs, merged, options):
            mine = [log_softmax(model, row) for row in rows]
            found.append({"base": base, "start": name} | compare(exact, mine, bare, rows))
            console.print(found[-1])
    write(file, found)


def models(inputs: Inputs, merged: Any, options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The start models on one kind of base, one at a time."""
    yield "merged", merged
    yield "fresh LoRA on merged", fresh(merged)
    yield "adapter kept", kept(inputs, options)
    yield "raw", AutoModelForCausalLM.from_pretrained(inputs.raw, **options).eval()


def kept(inputs: Inputs, options: dict[str, Any]) -> Any:
    """The base with the SFT adapter beside its weights."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs.raw, **options), inputs.sft).eval()


def fresh(merged: Any) -> Any:
    """A new LoRA on the merged base, as the policy starts."""
    return get_peft_model(
        merged, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()


@torch.no_grad()
def log_softmax(model: Any, row: list[int]) -> Tensor:
    """Log-probs [L, V] float32 of one text's next tokens."""
    logits: Tensor = model(input_ids=torch.tensor([row])).logits[0].float()
    return logits.log_softmax(dim=-1)


def compare(exact: list[Tensor], mine: list[Tensor], merged: list[Tensor], rows: list[list[int]]) -> dict[str, Any]:
    """Nats per token from the exact model; whether bitwise equal to the merged model of the same base; perplexity."""
    kl = torch.cat([(p.exp() * (p - q)).sum(dim=-1) for p, q in zip(exact, mine, strict=True)])
    told = torch.cat(list(_chosen(mine, rows)))
    gap = (told - torch.cat(list(_chosen(exact, rows)))).abs()
    return {
        "kl_per_token": float(f"{kl.mean():.4g}"),
        "largest_logprob_gap": float(f"{gap.max():.4g}"),
        "same_first_choice": round(float(_same(exact, mine)), 4),
        "perplexity": round(float((-told.mean()).exp()), 2),
        "bitwise_as_merged": all(torch.equal(p, q) for p, q in zip(merged, mine, strict=True)),
        "kl_from_merged": float(
            f"{torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(merged, mine, strict=True)]).mean():.4g}"
        ),
        "tokens": len(told),
    }


def _chosen(logprobs: list[Tensor], rows: list[list[int]]) -> Iterator[Tensor]:
    for one, row in zip(logprobs, rows, strict=True):
        yield one[:-1].gather(-1, torch.tensor(row[1:])[:, None]).squeeze(-1)


def _same(exact: list[Tensor], mine: list[Tensor]) -> Tensor:
    pairs = zip(exact, mine, strict=True)
    return torch.cat([(p.argmax(dim=-1) == q.argmax(dim=-1)).float() for p, q in pairs]).mean()
