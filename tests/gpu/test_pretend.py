"""The pretended device refuses what CUDA refuses, and nothing else. On a real GPU the same lists are put to CUDA itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretend import is_pretended, pretended_cuda
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from marl_core.testing import tiny_model

Mix = Callable[[Tensor, Tensor], Any]
"""An operation on x [4], on the device, and y [4], the same numbers on the CPU."""


def cpu_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


WRONG: dict[str, Mix] = {
    "add": lambda x, y: x + y,
    "add in place": lambda x, y: x.add_(y),
    "a number on the device into a CPU tensor": lambda x, y: y.add_(x[0]),
    "a CPU number as what is written": lambda x, y: y[0].mul_(x[0]),
    "compare": lambda x, y: x == y,
    "equal": lambda x, y: torch.equal(x, y),
    "cat": lambda x, y: torch.cat([x, y]),
    "stack": lambda x, y: torch.stack([x[0], y[0]]),
    "where": lambda x, y: torch.where(y > 1, x, 0.0),
    "where, the numbers": lambda x, y: torch.where(x > 1, x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 1, 0.0),
    "masked_scatter": lambda x, y: x.masked_scatter(x > 1, y),
    "gather": lambda x, y: x.gather(0, y.long()),
    "scatter": lambda x, y: x.scatter(0, y.long(), x),
    "index_select": lambda x, y: x.index_select(0, y.long()),
    "index_copy": lambda x, y: x.index_copy(0, torch.arange(4), x),
    "isin": lambda x, y: torch.isin(x, y),
    "a CPU tensor indexed": lambda x, y: y[x.long()],
    "a CPU tensor masked": lambda x, y: y[x > 1],
    "a CPU tensor written at": lambda x, y: y.index_put_((x.long(),), y),
    "CPU values written at": lambda x, y: x.index_put_((x.long(),), y),
    "matmul": lambda x, y: x @ y,
    "linear": lambda x, y: F.linear(x, torch.ones(2, 4)),
    "embedding": lambda x, y: F.embedding(y.long(), torch.ones(4, 2, device=x.device)),
    "integer matmul": lambda x, y: x.long()[None] @ x.long()[:, None],
    "attention": lambda x, y: F.scaled_dot_product_attention(
        x.view(1, 1, 4, 1), x.view(1, 1, 4, 1), y.view(1, 1, 4, 1)
    ),
    "clamp": lambda x, y: x.clamp(y, y + 1),
    "foreach": lambda x, y: torch._foreach_add([x, x], [x, y]),
    "a CPU generator": lambda x, y: torch.rand(3, device=x.device, generator=cpu_generator()),
    "a CPU generator in place": lambda x, y: x.normal_(generator=cpu_generator()),
    "a CPU generator, drawing": lambda x, y: torch.multinomial(x + 1, 2, generator=cpu_generator()),
    "a CUDA generator on the CPU": lambda x, y: torch.rand(3, generator=torch.Generator("cuda")),
    "in inference mode": lambda x, y: in_inference_mode(lambda: F.linear(x, y[None])),
    "set_rng_state": lambda x, y: torch.cuda.set_rng_state(torch.cuda.get_rng_state().to(x.device)),
}
NUMPY: dict[str, Mix] = {
    "numpy": lambda x, y: x.numpy(),
    "asarray": lambda x, y: np.asarray(x),
    "numpy of a slice": lambda x, y: x[1:].detach().numpy(),
}
RIGHT: dict[str, Mix] = {
    "a CPU number": lambda x, y: x + y[0],
    "a number first": lambda x, y: y[0] * x,
    "in place with a CPU number": lambda x, y: x.mul_(y[1]),
    "where with CPU numbers": lambda x, y: torch.where(x > 1, y[0], y[1]),
    "masked_fill with a CPU number": lambda x, y: x.masked_fill(x > 1, y[0]),
    "fill_": lambda x, y: x.fill_(y[0]),
    "copy_": lambda x, y: x.copy_(y),
    "a slice written": lambda x, y: written(x, y),
    "CPU index": lambda x, y: x[y.long()],
    "CPU mask": lambda x, y: x[y > 1],
    "list as index": lambda x, y: x[[0, 1]],
    "CPU index, a CPU number written": lambda x, y: x.index_put_((y.long(),), y[0]),
    "to": lambda x, y: x + y.to(x.device),
    "to another tensor": lambda x, y: y.to(x),
    "to by name": lambda x, y: y.to(device="cuda", dtype=torch.float64),
    "type_as": lambda x, y: y.type_as(x),
    "cuda": lambda x, y: y.cuda(),
    "zeros_like": lambda x, y: torch.zeros_like(x) + torch.full_like(y, 2.0, device=x.device),
    "new_zeros": lambda x, y: x.new_zeros(4) + x,
    "new_tensor": lambda x, y: x.new_tensor([1.0, 2, 3, 4]) + x,
    "tensor": lambda x, y: torch.tensor([1.0], device="cuda") + x,
    "as_tensor": lambda x, y: torch.as_tensor(y, device="cuda") + x,
    "arange": lambda x, y: torch.arange(4, device=x.device) + x,
    "under a device": lambda x, y: under_a_device() + x,
    "its generator": lambda x, y: torch.rand(4, device="cuda", generator=torch.Generator("cuda")) + x,
    "multinomial": lambda x, y: torch.multinomial(x + 1, 2),
    "dropout": lambda x, y: F.dropout(x, 0.5),
    "deepcopy": lambda x, y: copy.deepcopy(x) + copy.deepcopy(nn.Parameter(x)),
    "in a thread": lambda x, y: in_a_thread(lambda: torch.ones(4, device="cuda") + x),
    "inference mode": lambda x, y: in_inference_mode(lambda: F.linear(x, y.to("cuda")[None])),
    "autocast": lambda x, y: under_autocast(lambda: F.linear(x, x[None])),
}
HOST: dict[str, Mix] = {
    "cpu": lambda x, y: x.cpu() + y,
    "to": lambda x, y: x.to("cpu") + y,
    "to another tensor": lambda x, y: x.to(y) + y,
    "copy_": lambda x, y: y.copy_(x),
    "zeros_like": lambda x, y: torch.zeros_like(x, device="cpu") + y,
    "tensor": lambda x, y: torch.tensor(x.tolist()) + y,
    "from numpy": lambda x, y: torch.from_numpy(x.cpu().numpy()) + y,
    "forced numpy": lambda x, y: torch.from_numpy(x.numpy(force=True)) + y,
    "items": lambda x, y: y + float(x[0]) + x[1].item() + int(x.long().sum()),
    "a number on the device as index": lambda x, y: y[x[1].long()],
}


def written(x: Tensor, y: Tensor) -> Tensor:
    x[:2] = y[:2]
    return x


def in_a_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def in_inference_mode(work: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return work()


def under_autocast(work: Callable[[], Any]) -> Any:
    with torch.autocast("cuda", enabled=False):
        return work()


def under_a_device() -> Tensor:
    with torch.device("cuda"):
        return torch.zeros(4) + torch.tensor(1.0)


@pytest.fixture
def pair(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(4.0, device=device), torch.arange(4.0)


@pytest.mark.parametrize("mix", WRONG.values(), ids=WRONG)
def test_what_cuda_refuses_is_refused(mix: Mix, pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        mix(*pair)


@pytest.mark.parametrize("mix", NUMPY.values(), ids=NUMPY)
def test_numpy_never_sees_it(mix: Mix, pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        mix(*pair)


@pytest.mark.parametrize("mix", RIGHT.values(), ids=RIGHT)
def test_what_stays_on_the_device(mix: Mix, pair: tuple[Tensor, Tensor]) -> None:
    found = mix(*pair)
    assert found.is_cuda
    assert found.device == torch.device("cuda", 0)
    assert found.get_device() == 0
    assert not found.is_cpu


@pytest.mark.parametrize("mix", HOST.values(), ids=HOST)
def test_what_comes_to_the_cpu(mix: Mix, pair: tuple[Tensor, Tensor]) -> None:
    found = mix(*pair)
    assert found.device == torch.device("cpu")
    assert found.is_cpu


def test_the_numbers_are_the_cpus(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    torch.testing.assert_close(
        (x.exp() @ x).cpu(), y.exp() @ y
    )  # the same bits where it is pretended; a real one has its own exp


def test_views_share_their_place(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    assert all(view.is_cuda for view in (x[1:], x.view(2, 2), x.unbind()[0], x.detach(), x.expand(3, 4)))
    y.data = x
    assert y.is_cuda


def test_to_its_own_device_is_the_same_tensor(pair: tuple[Tensor, Tensor]) -> None:
    x, y = pair
    assert x.to("cuda") is x
    assert x.cuda() is x
    assert y.to("cpu") is y
    assert y.cpu() is y
    assert x.to("cuda", copy=True) is not x


def test_gradients_are_where_the_leaf_is(device: torch.device) -> None:
    leaf, weight = torch.ones(3, requires_grad=True), torch.ones(3, device=device, requires_grad=True)
    (leaf.to(device) * weight).sum().cpu().backward()
    assert leaf.grad is not None
    assert weight.grad is not None
    assert leaf.grad.is_cpu
    assert weight.grad.is_cuda


@pytest.mark.parametrize("foreach", [None, True, False])
def test_an_optimizer_steps(foreach: bool | None, device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        model(torch.ones(2, 4, device=device)).sum().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.is_cuda
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(moment.is_cuda for moment in moments)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_gives_the_same_gradient(reentrant: bool, device: torch.device) -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).to(device)
    x = torch.ones(2, 4, device=device, requires_grad=True)
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        out: Any = checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
        (gradient,) = torch.autograd.grad(out.sum(), x) if not (again and reentrant) else (_by_backward(out, x),)
        gradients.append(gradient)
    assert gradients[0].is_cuda
    assert torch.equal(*gradients)


def _by_backward(out: Tensor, x: Tensor) -> Tensor:
    out.sum().backward()
    assert x.grad is not None
    return x.grad


class TestRandomState:
    def test_is_one_of_its_own(self, device: torch.device) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = torch.rand(3, device=device)
        assert torch.equal(torch.get_rng_state(), before)
        torch.cuda.manual_seed(0)
        assert torch.equal(torch.rand(3, device=device), first)

    def test_a_fork_without_the_device_leaves_it_out(self, device: torch.device) -> None:
        torch.manual_seed(0)
        expected = torch.rand(3, device=device)
        for devices, same in (([device], True), ([], False)):
            torch.manual_seed(0)
            with torch.random.fork_rng(devices=devices):
                torch.rand(3, device=device)
            assert torch.equal(torch.rand(3, device=device), expected) == same


class TestAModel:
    def test_moves_keeping_its_parameters_and_ties(self, device: torch.device) -> None:
        model: Any = tiny_model()
        weight = model.lm_head.weight
        model.to(device)
        assert model.lm_head.weight is weight
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.device == device
        assert all(tensor.is_cuda for tensor in model.state_dict().values())
        model.to("cpu")
        assert all(tensor.is_cpu for tensor in model.state_dict().values())

    def test_trains_and_generates(self, device: torch.device) -> None:
        model: Any = tiny_model().to(device)  # type: ignore[arg-type]  # torch types `to` loosely
        ids = torch.tensor([[0, 5, 6], [7, 8, 9]], device=device)
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=device)
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        assert all(parameter.grad.is_cuda for parameter in model.parameters())
        found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=True)
        assert found.is_cuda
        with pytest.raises(RuntimeError):
            model(input_ids=ids.cpu())

    def test_is_loaded_onto_it(self, device: torch.device, tiny_folder: str) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_folder, device_map={"": "cuda"})
        assert all(tensor.is_cuda for tensor in model.state_dict().values())


def test_safetensors_write_and_load(device: torch.device, tmp_path: Path) -> None:
    save_file({"x": torch.arange(3.0, device=device)}, tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["x"].is_cpu
    assert load_file(tmp_path / "x.safetensors", device="cuda")["x"].is_cuda


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs a machine without CUDA, and a session that doesn't pretend"
)
def test_afterwards_nothing_is_left() -> None:
    names = {name: torch.Tensor.__dict__.get(name) for name in ("device", "to", "cpu", "numpy", "zeros_like")}
    functions = (torch.tensor, torch.Generator, torch.zeros_like, torch.cuda.is_available)
    with pretended_cuda():
        x = torch.ones(2, device="cuda")
        assert torch.cuda.is_available()
        assert is_pretended(x)
    assert {name: torch.Tensor.__dict__.get(name) for name in names} == names
    assert (torch.tensor, torch.Generator, torch.zeros_like, torch.cuda.is_available) == functions
    assert not torch.cuda.is_available()
    assert torch.equal(x + torch.ones(2), torch.full((2,), 2.0))
