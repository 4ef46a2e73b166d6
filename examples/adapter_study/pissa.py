"""PiSSA (arXiv 2404.02948) for a base that must not change: the changed base and its first adapter, as a model and an adapter on disk.

PiSSA takes the largest singular directions out of each weight and makes the adapter of them, so it rewrites the base, which marl
refuses: all roles stand on it. What is left of the base is a model like any other, though. The policy starts from the adapter that
was taken out, and the reference is a frozen copy of it: together they are the base that the other kinds start from.
"""

import json
from pathlib import Path

RANK, ALPHA = 16, 32


def convert(out: Path, base: Path) -> None:
    """Write `out/base` and `out/adapter`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config)
    peft.save_pretrained(str(out / "adapter"))
    peft.unload().save_pretrained(out / "base")  # without its adapter it is what PiSSA left of the base
    AutoTokenizer.from_pretrained(base).save_pretrained(out / "base")
    file = out / "adapter" / "adapter_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["init_lora_weights"] = (
        True  # its base has been changed already, and must not be once more when the file is loaded
    )
    written["base_model_name_or_path"] = str(out.parent / "pissa" / "base")
    file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
