"""What holds over a run: guidance in one batch or two calls gives the same numbers, and nothing piles up."""

from __future__ import annotations

import gc

import pytest
import torch
from test_model_parity import inputs, relative, tiny_model

from wan_fp8.attention import Attention, Step
from wan_fp8.models.blocks import ForwardOptions
from wan_fp8.models.wan import MAX_CACHED_PROMPTS
from wan_fp8.sampling import UniPC, sigmas, timesteps


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("name", ["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("attention", ["auto", "reference-fp8"])
def test_one_batch_of_two_equals_two_calls(name: str, attention: str) -> None:
    model = tiny_model(name)
    x, _ = inputs(name)
    prompts = torch.randn(2, 1, 12, 4096, generator=torch.Generator().manual_seed(5))
    timestep = torch.tensor([[0.0, 650.0, 650.0]]) if name == "ti2v" else torch.tensor([650.0])
    options = ForwardOptions(attention=Attention(attention, "auto", 0, 0, 0, 0, bound=None))
    alone = torch.cat([model(x, timestep, prompt, options=options) for prompt in prompts])
    together = model(torch.cat([x, x]), torch.cat([timestep] * 2), torch.cat([*prompts]), options=options)
    assert relative(together, alone) < 1e-5
    assert relative(alone[:1], alone[1:]) > 1e-2, "two prompts that differ"


def live_bytes() -> tuple[int, int]:
    """Tensors that exist, and the bytes of their storages, each counted once."""
    gc.collect()
    storages, count = {}, 0
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            count += 1
    return count, sum(storages.values())


@pytest.mark.parametrize("name", ["t2v", "ti2v"])
@pytest.mark.parametrize("low_precision", [False, True])
def test_nothing_piles_up_over_20_steps(name: str, low_precision: bool) -> None:
    """Prompts by identity, as a caller without names gives them; each step makes new latents."""
    model, steps = tiny_model(name), 20
    x, cond = inputs(name)
    uncond = torch.randn(cond.shape)
    attention = Attention("reference-fp8", "auto", 2, 2, 0, 0) if low_precision else None
    solver = UniPC(sigmas(steps, 5.0, "unipc"))
    seen = []
    latents = torch.randn(1, model.spec.out_dim, *x.shape[2:])
    for index, timestep in enumerate(timesteps(steps, 5.0, "unipc")):
        options = ForwardOptions(attention=attention, step=Step(index, steps))
        at = timestep[None].float() if name == "t2v" else torch.tensor([[0.0, timestep, timestep]])
        given = torch.cat([latents, x[:, model.spec.out_dim :]], dim=1)
        velocities = [model(given, at, prompt, options=options) for prompt in (cond, uncond)]
        latents = solver.step(velocities[1] + 3.5 * (velocities[0] - velocities[1]), index, latents)
        del velocities, given, at
        if index % 4 == 3:
            seen.append(live_bytes())
    assert len(seen) == 5 and len(set(seen)) == 1, seen


def test_prompts_that_come_and_go_do_not_pile_up() -> None:
    model = tiny_model("t2v")
    x, _ = inputs("t2v")
    seen = []
    for seed in range(MAX_CACHED_PROMPTS + 6):
        prompt = torch.randn(1, 12, 4096, generator=torch.Generator().manual_seed(seed))
        model(x, torch.tensor([900.0]), prompt, options=ForwardOptions(text_key=seed))
        del prompt
        seen.append(live_bytes())
    assert len(set(seen[MAX_CACHED_PROMPTS:])) == 1, seen
