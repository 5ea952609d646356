"""Runs over one and two experts: exactly one undisturbed sampler, with core's own samplers as the oracle."""

from __future__ import annotations

import threading

import bridge_kit as kit
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy_core")


@pytest.fixture(scope="module")
def experts(comfy_core):
    return kit.core_model(seed=0), kit.core_model(seed=1)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield
    assert not [t for t in threading.enumerate() if t.name == "wan-fp8-sampler"], "a sampler thread was left running"
    kit.unload_everything()


def stages(high, low, switch, cfg=(3.5, 3.5)):
    bridge = kit.bridge()
    return [bridge.Stage(model=high, cfg=cfg[0]), bridge.Stage(model=low, cfg=cfg[1], first_step=switch)]


def run(stage_list, sampler, sigmas, **kw):
    bridge = kit.bridge()
    output, denoised = bridge.run_stages(
        stage_list,
        positive=kw.pop("positive", kit.prompt(1)),
        negative=kit.prompt(2),
        latent=kw.pop("latent", kit.empty_latent()),
        sigmas=sigmas,
        sampler=bridge.make_sampler(sampler) if isinstance(sampler, str) else sampler,
        seed=7,
        **kw,
    )
    return output["samples"], denoised["samples"]


def seen_by(model):
    """A clone of MODEL that notes the sigma, timestep and batch of every forward."""
    calls = []

    def wrapper(executor, x, t, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[-1]
        calls.append((float(options["sigmas"][0]), t.flatten().tolist(), list(options["cond_or_uncond"])))
        return executor(x, t, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key("diffusion_model", "seen", wrapper)
    return model, calls


@pytest.mark.parametrize(
    "sampler",
    ["euler", "dpmpp_2m", "uni_pc", "heun", "res_multistep_cfg_pp", "dpmpp_2m_sde", "euler_ancestral", "ddim", "unipc"],
)
def test_switching_between_equal_experts_changes_nothing(experts, sampler):
    bridge = kit.bridge()
    sigmas = bridge.core_sigmas(experts[0], "simple", 4)
    one, _ = run([bridge.Stage(model=experts[0], cfg=3.5)], sampler, sigmas)
    two, _ = run(stages(experts[0], experts[0].clone(), 2), sampler, sigmas)
    assert torch.equal(one, two)
    other, _ = run(stages(experts[0], experts[1], 2), sampler, sigmas)
    assert kit.distance(other, one) > 1e-2


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler"])
def test_one_stage_is_cores_ksampler(experts, sampler):
    bridge = kit.bridge()
    sigmas = bridge.core_sigmas(experts[0], "simple", 4, sampler)
    core_sampler = (
        bridge.make_sampler(sampler)
        if sampler != "euler"
        else __import__("comfy.samplers").samplers.sampler_object(sampler)
    )
    ours, _ = run([bridge.Stage(model=experts[0], cfg=3.5)], core_sampler, sigmas)
    assert torch.equal(ours, kit.ksample(experts[0], steps=4, sampler=sampler))


def test_each_expert_serves_its_own_steps_with_its_own_guidance(experts):
    sigmas = kit.engine("sampling").sigmas(5, 5.0, "unipc")
    high, high_calls = seen_by(experts[0])
    low, low_calls = seen_by(experts[1])
    run(stages(high, low, 2, cfg=(3.5, 1.0)), "unipc", sigmas)
    assert [round(c[0], 5) for c in high_calls] == [round(float(s), 5) for s in sigmas[:2]]
    assert [round(c[0], 5) for c in low_calls] == [round(float(s), 5) for s in sigmas[2:5]]
    assert all(sorted(c[2]) == [0, 1] for c in high_calls), "cond and uncond"
    assert all(c[2] == [0] for c in low_calls), "guidance 1 skips the negative pass"


def test_samplers_that_evaluate_between_steps_take_the_expert_of_that_sigma(experts):
    bridge = kit.bridge()
    sigmas = bridge.core_sigmas(experts[0], "simple", 4)
    high, high_calls = seen_by(experts[0])
    low, low_calls = seen_by(experts[1])
    run(stages(high, low, 2), "dpm_2", sigmas)
    boundary = float(sigmas[2])
    assert len(high_calls) == 4 and all(c[0] > boundary for c in high_calls)
    assert low_calls and all(c[0] <= boundary for c in low_calls)


def by_hand(high, low, switch, cfg, solver, steps, shift, noise, prompts):
    """The official loop: integer timesteps, two forwards a step, guidance, solver."""
    sampling = kit.engine("sampling")
    sigmas = sampling.sigmas(steps, shift, solver).float()
    run_solver, x = sampling.make_solver(solver, sigmas), noise.clone()
    for index, t in enumerate(sampling.timesteps(steps, shift, solver)):
        net = (high if index < switch else low).model.diffusion_model
        cond, uncond = (net(x, t[None].float(), rows, transformer_options={}).float() for ((rows, _),) in prompts)
        guide = cfg[0] if index < switch else cfg[1]
        x = run_solver.step(uncond + guide * (cond - uncond), index, x)
    return x


@pytest.mark.parametrize(("solver", "shift"), [("unipc", 12.0), ("unipc", 5.0), ("dpm++", 3.0), ("euler", 5.0)])
def test_official_solvers_follow_the_official_loop(experts, solver, shift):
    """Pure noise at the start, integer timesteps, history carried across the switch; the same in our model and
    core's."""
    sampling, steps = kit.engine("sampling"), 8
    models = [kit.bridge().fork(m) for m in experts]
    sigmas, timesteps = sampling.sigmas(steps, shift, solver), sampling.timesteps(steps, shift, solver)
    noise = torch.randn(kit.empty_latent()["samples"].shape, generator=torch.manual_seed(7))
    wanted = by_hand(*models, 3, (4.0, 3.0), solver, steps, shift, noise, [kit.prompt(1), kit.prompt(2)])
    high, calls = seen_by(models[0])
    output, denoised = run(stages(high, models[1], 3, (4.0, 3.0)), solver, sigmas, timesteps=timesteps)
    assert [c[1][0] for c in calls] == timesteps[:3].tolist()
    raw = models[0].model.process_latent_out(wanted)
    assert kit.distance(output, raw) < 2e-5
    assert kit.distance(denoised, raw) < 2e-5  # the last step goes to the last clean estimate


def test_timesteps_off_the_schedule_stay_cores(experts):
    bridge, sampling = kit.bridge(), kit.engine("sampling")
    sigmas, timesteps = sampling.sigmas(3, 5.0, "dpm++"), sampling.timesteps(3, 5.0, "dpm++")
    model = bridge.with_timesteps(experts[0], sigmas.float(), timesteps)
    told = model.get_model_object("model_sampling").timestep
    assert told(sigmas[:3].float()).tolist() == timesteps.tolist()
    assert told(torch.tensor([0.123456])).item() == pytest.approx(123.456)
    assert told(sigmas[1].float()).item() == timesteps[1].item()
    assert experts[0].get_model_object("model_sampling").timestep(torch.tensor([0.25])).item() == 250


def test_truncation_in_float64_differs_from_the_float_path(experts):
    """At 40 steps and shift 3 truncating float32 sigmas would move three DPM++ timesteps by one."""
    bridge, sampling = kit.bridge(), kit.engine("sampling")
    sigmas, timesteps = sampling.sigmas(40, 3.0, "dpm++"), sampling.timesteps(40, 3.0, "dpm++")
    assert (sigmas[:-1].float() * 1000).long().tolist() != timesteps.tolist()
    model = bridge.with_timesteps(experts[0], sigmas.float(), timesteps)
    assert model.get_model_object("model_sampling").timestep(sigmas[:-1].float()).long().tolist() == timesteps.tolist()


def ti2v_latent():
    latent = kit.empty_latent(48, frames=3)
    latent["samples"][:, :, 0] = torch.randn(1, 48, 4, 4, generator=torch.Generator().manual_seed(4))
    latent["noise_mask"] = torch.ones(1, 1, 3, 4, 4)
    latent["noise_mask"][:, :, 0] = 0
    return latent


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler", "dpmpp_2m"])
def test_ti2v_first_frame_is_kept(solver):
    bridge, sampling = kit.bridge(), kit.engine("sampling")
    model, calls = seen_by(kit.own_model("ti2v"))
    official = solver in sampling.SOLVER_NAMES
    name = solver if official else "unipc"
    sigmas, timesteps = sampling.sigmas(4, 5.0, name), sampling.timesteps(4, 5.0, name)
    latent = ti2v_latent()
    output, _ = run(
        [bridge.Stage(model=model, cfg=5.0)], solver, sigmas, latent=latent, timesteps=timesteps if official else None
    )
    assert kit.distance(output[:, :, 0], latent["samples"][:, :, 0]) < 1e-6
    for (_, told, _), t in zip(calls, timesteps, strict=True):
        per_frame = torch.tensor(told).reshape(-1, 3)
        assert (per_frame[:, 0] == 0).all()
        if official:
            assert (per_frame[:, 1:] == float(t)).all()


def test_latents_survive_the_switch_where_core_loses_them(experts):
    """After one step at a high shift the latents are nearly all noise; core's pair of samplers divides by 1 - sigma
    there."""
    bridge, sampling = kit.bridge(), kit.engine("sampling")
    sigmas = sampling.sigmas(60, 12.0, "euler")[:5]
    one, _ = run([bridge.Stage(model=experts[0], cfg=1.0)], "euler", sigmas)
    two, _ = run(stages(experts[0], experts[0].clone(), 1, cfg=(1.0, 1.0)), "euler", sigmas)
    assert torch.equal(one, two)


def test_schedule_that_ends_early_and_goes_on_later(experts):
    """Leftover noise in the LATENT, as between two KSamplerAdvanced."""
    bridge, sampling = kit.bridge(), kit.engine("sampling")
    sigmas, stage = sampling.sigmas(6, 5.0, "euler"), bridge.Stage(model=experts[0], cfg=3.5)
    whole, _ = run([stage], "euler", sigmas)
    half, _ = run([stage], "euler", sigmas[:4])
    rest, _ = run([stage], "euler", sigmas[3:], latent={"samples": half}, add_noise=False)
    assert kit.distance(rest, whole) < 1e-4


def test_stages_without_steps_are_never_loaded(experts):
    bridge, sampling = kit.bridge(), kit.engine("sampling")
    sigmas = sampling.sigmas(3, 5.0, "euler")
    alone, _ = run([bridge.Stage(model=experts[1], cfg=3.5)], "euler", sigmas)
    high, calls = seen_by(experts[0])
    assert torch.equal(run(stages(high, experts[1], 0), "euler", sigmas)[0], alone)
    assert not calls
    low, calls = seen_by(experts[0])
    assert torch.equal(run(stages(experts[1], low, 3), "euler", sigmas)[0], alone)
    assert not calls


def test_progress_is_one_bar_over_both_experts(experts, monkeypatch):
    import comfy.utils

    updates = []

    class Bar:
        def __init__(self, total, **kw):
            updates.append(("total", total))

        def update_absolute(self, value, total=None, preview=None):
            updates.append((value, total))

    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    threads = set()
    high, low = experts[0].clone(), experts[1].clone()
    for model in (high, low):
        model.add_wrapper_with_key(
            "diffusion_model", "thread", lambda ex, *a, **k: threads.add(threading.current_thread()) or ex(*a, **k)
        )
    run(stages(high, low, 2), "dpmpp_2m", kit.bridge().core_sigmas(high, "simple", 4))
    assert updates == [("total", 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert threads == {threading.current_thread()}, "models run in the thread that executes nodes"


@pytest.mark.parametrize("at", [1, 4])
def test_interrupt_in_either_expert_ends_the_run_and_the_next_one_works(experts, at):
    import comfy.model_management as management

    sigmas = kit.bridge().core_sigmas(experts[0], "simple", 4)
    expected, _ = run(stages(*experts, 2), "dpmpp_2m", sigmas)
    count = []

    def cancel(executor, *args, **kwargs):
        count.append(1)
        if len(count) == at:
            management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    cancelled = [m.clone() for m in experts]
    for model in cancelled:
        model.add_wrapper_with_key("diffusion_model", "cancel", cancel)
    with pytest.raises(management.InterruptProcessingException):
        run(stages(*cancelled, 2), "dpmpp_2m", sigmas)
    assert len(count) == at
    assert torch.equal(run(stages(*experts, 2), "dpmpp_2m", sigmas)[0], expected)


def test_an_error_in_the_sampler_itself_reaches_the_caller(experts):
    import comfy.samplers

    def broken(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model(x, sigmas[0] * x.new_ones([1]), **extra_args)
        raise RuntimeError("the sampler broke")

    sigmas = kit.bridge().core_sigmas(experts[0], "simple", 4)
    with pytest.raises(RuntimeError, match="the sampler broke"):
        run(stages(*experts, 2), comfy.samplers.KSAMPLER(broken), sigmas)


def test_a_sampler_that_climbs_back_gets_the_high_noise_expert_again(experts):
    import comfy.samplers

    def restarting(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for index in (0, 3, 1, 3):
            x = x - 0.1 * model(x, sigmas[index] * x.new_ones([1]), **extra_args)
        return x

    high, high_calls = seen_by(experts[0])
    low, low_calls = seen_by(experts[1])
    run(stages(high, low, 2), comfy.samplers.KSAMPLER(restarting), kit.bridge().core_sigmas(high, "simple", 4))
    assert (len(high_calls), len(low_calls)) == (2, 2)


def test_each_stage_is_a_whole_run_for_its_own_wrappers(experts):
    events = []

    def noted(model, name):
        def outer(executor, *args, **kwargs):
            events.append(f"{name} in")
            out = executor(*args, **kwargs)
            events.append(f"{name} out")
            return out

        model = model.clone()
        model.add_wrapper_with_key("outer_sample", "noted", outer)
        return model

    run(
        stages(noted(experts[0], "high"), noted(experts[1], "low"), 2),
        "euler",
        kit.bridge().core_sigmas(experts[0], "simple", 4),
    )
    assert events == ["high in", "high out", "low in", "low out"]


def test_post_cfg_functions_of_sampler_and_of_each_model_are_kept_apart(experts):
    seen = []

    def noted(model, name):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: seen.append(name) or args["denoised"])
        return model

    run(
        stages(noted(experts[0], "high"), noted(experts[1], "low"), 2),
        "res_multistep_cfg_pp",
        kit.bridge().core_sigmas(experts[0], "simple", 4),
    )
    assert seen == ["high", "high", "low", "low"]


def test_bad_runs_are_refused(experts):
    bridge, errors = kit.bridge(), kit.engine("errors")
    sigmas = bridge.core_sigmas(experts[0], "simple", 4)
    with pytest.raises(errors.InputError, match="starts at step 0"):
        run([bridge.Stage(model=experts[0], cfg=1.0, first_step=1)], "euler", sigmas)
    with pytest.raises(errors.InputError, match="in order"):
        run([*stages(*experts, 3), bridge.Stage(model=experts[0], cfg=1.0, first_step=1)], "euler", sigmas)
    with pytest.raises(errors.InputError, match="at least two sigmas"):
        run([bridge.Stage(model=experts[0], cfg=1.0)], "euler", sigmas[:1])
    with pytest.raises(errors.InputError, match=r"solver must be one of .*got 'nope'"):
        bridge.make_sampler("nope")
    with pytest.raises(errors.InputError, match="shape of the latents"):
        run([bridge.Stage(model=experts[0], cfg=1.0)], "euler", sigmas, noise=torch.zeros(1))


def test_every_name_makes_a_sampler():
    bridge = kit.bridge()
    names = bridge.sampler_names()
    assert names[:3] == list(kit.engine("sampling").SOLVER_NAMES) and len(set(names)) == len(names)
    assert all(hasattr(bridge.make_sampler(name), "sample") for name in names)
