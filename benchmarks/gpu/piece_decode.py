"""Sampling: marl's loop, transformers' own ways, a token step as one CUDA graph, and what the memory's bandwidth allows."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from floor import copy_bandwidth
from models import random_bank, random_rows
from record import Skip
from timing import Timed, timed, wait
from torch import Tensor
from transformers import GenerationConfig, StaticCache

from marl_core.bank.trunk import PassOptions
from marl_core.config.run_config import SamplingSection, SpeedSection
from marl_core.ppo.sampling.choose import choose
from marl_core.ppo.sampling.sampler import PolicySampler
from marl_core.ppo.types import Prompts, Rollout

SIZES = {"full": ("1b", 64, 64, 128), "tiny": ("tiny", 4, 8, 12)}
"""Shape, rows, prompt tokens, new tokens."""
POLICY = "policy"
BLOCK = 256
"""Tokens of a block of continuous batching's cache, as transformers has them. It gets as many blocks as the rows need: left alone it
takes nine tenths of the memory."""


def measurements(device: str, shape: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name; they share one base."""
    bench = Bench(device, shape)
    return {
        "decode marl": bench.marl,
        "decode transformers": bench.transformers,
        "decode marl, no adapter": bench.bare,
        "decode limit": bench.limit,
        "decode graph": bench.graph,
        "decode continuous": bench.continuous,
        "decode static": bench.static,
    }


class Bench:
    """A random base with one adapter on all its linear layers, and prompts."""

    def __init__(self, device: str, shape: str) -> None:
        self.device = device
        self.shape, self.rows, self.prompt, self.new = SIZES[shape]
        if device == "cuda":
            _ = self.bank  # made while others load

    @cached_property
    def bank(self) -> Any:
        """Made when it is first wanted."""
        bank = random_bank(self.shape, "bfloat16", self.device, policy=POLICY)
        _spread(bank)
        return bank

    @cached_property
    def prompts(self) -> Prompts:
        """Random tokens, all rows of one length."""
        return Prompts.of(random_rows(self.rows, self.prompt, self.bank.trunk.vocabulary), 0).to(self.bank.device)

    def sampling(self, new: int | None = None) -> SamplingSection:
        """All rows to their last token."""
        new = self.new if new is None else new
        return SamplingSection(max_new_tokens=new, min_new_tokens=new)

    def rollout(self, speed: SpeedSection, adapter: str | None = POLICY, new: int | None = None) -> Rollout:
        """What a run would sample."""
        return PolicySampler(self.bank, adapter, self.sampling(new), (2,), speed)(self.prompts, 0)

    def said(self, found: Timed, **more: Any) -> dict[str, Any]:
        """The row of one way to sample."""
        tokens = self.rows * self.new
        return {
            "ms_a_token_step": round(found.seconds / self.new * 1e3, 3),
            "tokens_per_second": round(tokens / found.seconds, 1),
            "seconds": round(found.seconds, 4),
            **({} if found.peak_mib is None else {"peak_mib": round(found.peak_mib, 1)}),
            **more,
            "seconds_of_runs": [round(found.fastest, 4), round(found.slowest, 4)],
            "shape": self.shape,
            "rows": self.rows,
            "prompt_tokens": self.prompt,
            "new_tokens": self.new,
            "dtype": "bfloat16",
        }

    def _ours(self, speed: SpeedSection, adapter: str | None = POLICY) -> Timed:
        self.rollout(speed, adapter, new=min(8, self.new))  # kernels and buffers
        return timed(lambda: self.rollout(speed, adapter), self.device, repeat=3, warm=0, at_most=2.0)

    def marl(self) -> dict[str, Any]:
        """marl's loop, through the adapter; log-probs and entropies are by-products. Its first tokens beside transformers'."""
        found = self.said(self._ours(SpeedSection()))
        return {**found, "greedy_alike": self._greedy_alike()}

    def _greedy_alike(self) -> float:
        """Share of rows whose most likely first token is the same in marl's prefill and in the model's own forward."""
        ids, mask = self.prompts.ids, self.prompts.mask
        with torch.no_grad(), self.bank.using(POLICY):
            own = self.bank.trunk.logits_of(self.bank.trunk.extend(ids, mask, self.bank.trunk.new_cache(ids.shape[1])))
            plain = self.bank.base(input_ids=ids, attention_mask=mask.long()).logits
            return round(float((own[:, -1].argmax(-1) == plain[:, -1].argmax(-1)).float().mean()), 4)

    def bare(self) -> dict[str, Any]:
        """marl's loop with the adapter off: what the adapter costs."""
        return self.said(self._ours(SpeedSection(), None))

    def transformers(self) -> dict[str, Any]:
        """speed.decode: transformers."""
        return self.said(self._ours(SpeedSection(decode="transformers")))

    def limit(self) -> dict[str, Any]:
        """Bytes that a token step must read, over the bandwidth that a copy reaches."""
        config = self.bank.base.config
        head = config.hidden_size // config.num_attention_heads
        embedding = self.bank.base.get_input_embeddings().weight
        weights = sum(p.numel() * p.element_size() for p in self.bank.base.parameters() if p is not embedding)
        mean_length = self.prompt + self.new / 2
        entry = 2 * config.num_hidden_layers * config.num_key_value_heads * head * embedding.element_size()
        cache = int(self.rows * mean_length * entry)
        speed = copy_bandwidth(self.device)
        seconds = (weights + cache) / speed
        return {
            "ms_a_token_step": round(seconds * 1e3, 4),
            "tokens_per_second": round(self.rows / seconds, 1),
            "copy_gb_per_second": round(speed / 1e9, 1),
            "weight_mib": round(weights / 2**20, 1),
            "cache_mib": round(cache / 2**20, 1),
            "is": "weights without the embedding, adapters and the mean cache, read once a token step",
        }

    def graph(self) -> dict[str, Any]:
        """A token step, sampling included, as one CUDA graph on a cache of fixed size: what marl's loop could be. Not in marl.

        On a CPU the same step is called as it is.
        """
        step = Step(self)
        step.capture()
        found = timed(step.run, self.device, repeat=3, warm=1, at_most=2.0)
        marl, mine = self.rollout(SpeedSection()).ids, step.run()
        same = (marl[:, : mine.shape[1]] == mine).float()
        return self.said(
            found,
            capture_seconds=round(step.capture_seconds, 3),
            first_token_alike=round(float(same[:, 0].mean()), 4),
            tokens_alike=round(float(same.mean()), 4),
            captured=self.device == "cuda",
        )

    def continuous(self) -> dict[str, Any]:
        """transformers' continuous batching, through the adapter; the rest of this process is of no more use after it."""
        from transformers import ContinuousBatchingConfig

        model = self.bank.base
        if not hasattr(model, "generate_batch"):
            raise Skip("this transformers has no continuous batching")
        rows = self.prompts.ids.tolist()
        config = GenerationConfig(max_new_tokens=self.new, do_sample=True, eos_token_id=-1, pad_token_id=0)
        blocks = self.rows * (-(-(self.prompt + self.new) // BLOCK) + 1)
        bounds = ContinuousBatchingConfig(num_blocks=blocks, max_batch_tokens=max(self.rows * self.prompt, BLOCK))
        lengths: list[int] = []
        attention: list[str] = []
        set_attention = model.set_attn_implementation

        def noted(name: str) -> None:
            if name.startswith("paged|"):
                attention.append(name)
            set_attention(name)

        model.set_attn_implementation = noted

        def run() -> None:
            found = model.generate_batch(rows, generation_config=config, continuous_batching_config=bounds)
            lengths[:] = [len(output.generated_tokens) for output in found.values()]

        with self.bank.using(POLICY), self.bank.trunk.passing(PassOptions(pack=False)), self.bank.trunk.generating():
            start = time.perf_counter()
            run()
            first = time.perf_counter() - start
            found = timed(run, self.device, repeat=2, warm=0, at_most=2.0)
        if sum(lengths) != self.rows * self.new:
            raise RuntimeError(f"{len(lengths)} rows came back with {sum(lengths)} tokens of {self.rows * self.new}")
        return self.said(
            found,
            first_seconds=round(first, 3),
            blocks=blocks,
            attention=attention[-1] if attention else "not told",
            includes="its manager made anew in each run",
        )

    def static(self) -> dict[str, Any]:
        """transformers' generate with a cache of fixed size, its forward compiled with CUDA graphs."""
        if self.device != "cuda":
            raise Skip("transformers compiles generate on a GPU only")
        config = GenerationConfig(
            max_new_tokens=self.new,
            min_new_tokens=self.new,
            do_sample=True,
            eos_token_id=[2],
            pad_token_id=0,
            cache_implementation="static",
        )
        bank = self.bank

        def run() -> None:
            ids, mask = self.prompts.ids, self.prompts.mask.long()
            bank.base.generate(input_ids=ids, attention_mask=mask, generation_config=config)

        with (
            torch.no_grad(),
            bank.using(POLICY),
            bank.trunk.passing(PassOptions(pack=False)),
            bank.trunk.generating(),
        ):
            start = time.perf_counter()
            run()
            wait(self.device)
            first = time.perf_counter() - start
            found = timed(run, self.device, repeat=2, warm=0, at_most=2.0)
        return self.said(found, first_seconds=round(first, 3))


def _spread(bank: Any) -> None:
    """A new adapter changes nothing; this one does, as a trained one would."""
    random = torch.Generator(device=bank.device).manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters(POLICY).values():
            parameter.copy_(torch.randn(parameter.shape, generator=random, device=parameter.device) * 0.01)


class Step:
    """One token step over buffers that stay where they are: token, place, uniform numbers -> the next token of each row."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.bank = bench, bench.bank
        rows, self.room = bench.rows, bench.prompt + bench.new
        device = self.bank.device
        random = torch.Generator().manual_seed(0)  # the numbers that `generate` draws from this seed
        uniforms = torch.rand(rows, bench.new, generator=random, dtype=torch.float64)
        self.uniforms = uniforms.to(device)
        self.uniform = torch.zeros(rows, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, dtype=torch.float32, device=device)
        self.places = torch.arange(self.room, device=device)
        self.sampling = bench.sampling()
        self.cache = StaticCache(config=self.bank.base.config, max_cache_len=self.room)
        self.captured: torch.cuda.CUDAGraph | None = None
        self.capture_seconds = 0.0

    def _hidden(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        found = self.bank.trunk.body(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        states: Tensor = found.last_hidden_state
        return states[:, -1]

    def _draw(self, hidden: Tensor) -> None:
        """Into the buffers. The end token is put out as `min_new_tokens` does."""
        logits = self.bank.trunk.logits_of(hidden).float()
        logits[:, 2] = -1e9
        tokens, output = choose(logits, self.uniform, self.sampling)
        self.tokens.copy_(tokens[:, None])
        self.logprobs.copy_(output.logprobs)

    def _step(self) -> None:
        rows = len(self.tokens)
        mask = (self.places <= self.place)[None, None, None, :].expand(rows, 1, 1, self.room)
        self._draw(self._hidden(self.tokens, mask, self.place.expand(rows, 1)))
        self.place.add_(1)

    def _prefill(self) -> None:
        """The prompts anew, and the first token."""
        self._rewind(0)
        prompt = self.bench.prompt
        ids = self.bench.prompts.ids
        seen = (self.places[None, :] <= self.places[:prompt, None])[None, None].expand(len(ids), 1, prompt, self.room)
        self.uniform.copy_(self.uniforms[:, 0])
        self._draw(self._hidden(ids, seen, self.places[None, :prompt].expand(len(ids), prompt)))
        self.place.fill_(prompt)

    def _rewind(self, length: int) -> None:
        for layer in self.cache.layers:
            if getattr(layer, "is_initialized", False):
                layer.cumulative_length.fill_(length)

    def _open(self) -> Any:
        from contextlib import ExitStack

        opened = ExitStack()
        opened.enter_context(torch.no_grad())
        opened.enter_context(self.bank.using(POLICY))
        opened.enter_context(self.bank.trunk.passing(PassOptions(pack=False)))
        opened.enter_context(self.bank.trunk.generating())
        return opened

    def capture(self) -> None:
        """Warm up beside the main stream, then record one step."""
        if self.bench.device != "cuda":
            return
        start = time.perf_counter()
        with self._open():
            self._prefill()
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(beside)
            torch.cuda.synchronize()
            self._rewind(self.bench.prompt)
            self.place.fill_(self.bench.prompt)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.captured = graph
        torch.cuda.synchronize()
        self.capture_seconds = time.perf_counter() - start

    def run(self) -> Tensor:
        """Prompts and all tokens; ids [rows, new]."""
        new = self.bench.new
        ids = torch.empty(len(self.tokens), new, dtype=torch.int64, device=self.tokens.device)
        with self._open():
            self._prefill()
            ids[:, 0] = self.tokens[:, 0]
            for index in range(1, new):
                self.uniform.copy_(self.uniforms[:, index])
                if self.captured is not None:
                    self.captured.replay()
                else:
                    self._step()
                ids[:, index] = self.tokens[:, 0]
        return ids
