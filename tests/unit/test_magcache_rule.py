"""MagCache's decisions against a transcription of the published code, pass by pass, and curves by noise level."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from wan_fp8.caching import PRESETS, MagCache, RunPlan, load_curve, published, save_curve, skipped_passes
from wan_fp8.errors import InputError
from wan_fp8.models.specs import SPECS
from wan_fp8.sampling import high_noise_steps, sigmas, timesteps


class Published:
    """``MagCache4Wan2.2/magcache_generate.py`` as it runs, state on the class, one call for each forward; the model is
    left out. Its ``use_magcache`` decides, its ``set_magcache_params`` resamples."""

    cnt: ClassVar[int]
    num_steps: ClassVar[int]
    split_step: ClassVar[int | None]
    magcache_thresh: ClassVar[float]
    K: ClassVar[int]
    retention_ratio: ClassVar[float]
    mode: ClassVar[str]
    accumulated_err: ClassVar[list]
    accumulated_steps: ClassVar[list]
    accumulated_ratio: ClassVar[list]
    mag_ratios: ClassVar[np.ndarray]

    @classmethod
    def set_params(cls, thresh, K, retention, ratios, sample_steps, split, mode):
        cls.cnt, cls.num_steps = 0, sample_steps * 2
        cls.split_step = split * 2 if split is not None else None
        cls.magcache_thresh, cls.K, cls.retention_ratio, cls.mode = thresh, K, retention, mode
        cls.accumulated_err, cls.accumulated_steps, cls.accumulated_ratio = [0.0, 0.0], [0, 0], [1.0, 1.0]
        cls.mag_ratios = np.array([1.0] * 2 + list(ratios))

        def nearest_interp(src_array, target_length):
            src_length = len(src_array)
            if target_length == 1:
                return np.array([src_array[-1]])
            scale = (src_length - 1) / (target_length - 1)
            mapped_indices = np.round(np.arange(target_length) * scale).astype(int)
            return src_array[mapped_indices]

        if len(cls.mag_ratios) != sample_steps * 2:
            cond = nearest_interp(cls.mag_ratios[0::2], sample_steps)
            uncond = nearest_interp(cls.mag_ratios[1::2], sample_steps)
            cls.mag_ratios = np.concatenate([cond.reshape(-1, 1), uncond.reshape(-1, 1)], axis=1).reshape(-1)

    @classmethod
    def forward_skips(cls) -> bool:
        if cls.mode == "t2v":
            use = True
            if cls.cnt < int(cls.split_step * cls.retention_ratio):
                use = False
            if (
                cls.cnt >= cls.split_step
                and cls.cnt <= (cls.num_steps - cls.split_step) * cls.retention_ratio + cls.split_step
            ):
                use = False
        elif cls.mode == "i2v":
            use = cls.cnt >= int(cls.split_step + (cls.num_steps - cls.split_step) * cls.retention_ratio)
        else:
            use = cls.cnt >= int(cls.num_steps * cls.retention_ratio)
        skip_forward = False
        if use:
            cur_mag_ratio = cls.mag_ratios[cls.cnt]
            p = cls.cnt % 2
            cls.accumulated_ratio[p] *= cur_mag_ratio
            cls.accumulated_steps[p] += 1
            cls.accumulated_err[p] += np.abs(1 - cls.accumulated_ratio[p])
            if cls.accumulated_err[p] < cls.magcache_thresh and cls.accumulated_steps[p] <= cls.K:
                skip_forward = True
            else:
                cls.accumulated_err[p], cls.accumulated_steps[p], cls.accumulated_ratio[p] = 0, 0, 1.0
        cls.cnt += 1
        return skip_forward

    @classmethod
    def run(cls, *args) -> list[int]:
        cls.set_params(*args)
        return [c for c in range(cls.num_steps) if cls.forward_skips()]


CURVES = {"t2v": "t2v-A14B", "i2v": "i2v-A14B", "ti2v": "ti2v-5B t2v"}
STEPS = {"t2v": (40, 26), "i2v": (40, 15), "ti2v": (50, None)}
SETTINGS = [(0.12, 2, 0.2), (0.24, 2, 0.1), (0.06, 2, 0.4), (0.04, 3, 0.2)]


def ratios(name: str) -> list[float]:
    """As published, from the data file itself."""
    from wan_fp8 import caching

    path = caching.__file__.replace("__init__.py", "ratios.json")
    with open(path, encoding="utf-8") as opened:
        return json.load(opened)["curves"][name]["ratios"]


@pytest.mark.parametrize("mode", ["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("steps", [None, 20, 30, 33, 50])
def test_the_published_decisions(mode, setting, steps):
    count, split = STEPS[mode]
    if steps is not None and split is not None:
        shift, boundary = {"t2v": (12.0, 0.875), "i2v": (5.0, 0.9)}[mode]
        split = high_noise_steps(timesteps(steps, shift, "unipc"), boundary)
    count, values = steps or count, ratios(CURVES[mode])
    threshold, skips, retention = setting
    ours = skipped_passes(
        steps=count,
        threshold=threshold,
        max_skips=skips,
        retention=retention,
        ratios=values,
        mode=mode,
        high_noise_steps=split,
    )
    assert ours == Published.run(threshold, skips, retention, values, count, split, mode)
    assert 0 < len(ours) < 2 * count or (mode == "i2v" and steps == 20)


@pytest.mark.parametrize(
    ("mode", "steps", "split", "setting", "cond", "uncond"),
    [
        ("t2v", 40, 26, (0.06, 2, 0.4), "10 11 13 14 16 17 19 20 22 23 25 32 34 36", None),
        ("t2v", 20, 13, (0.06, 2, 0.4), "5 6 8 9 11 12 17", None),
        ("i2v", 40, 15, (0.06, 2, 0.1), "18 19 21 22 24 25 27 29 31 33", "17 18 20 21 23 24 26 27 29 31 33"),
        ("i2v", 40, 15, (0.12, 2, 0.2), "20 21 23 24 26 27 29 30 32 34 36", None),
    ],
)
def test_written_out(mode, steps, split, setting, cond, uncond):
    """Sequences that the published decision code printed when it was run."""
    threshold, skips, retention = setting
    found = skipped_passes(
        steps=steps,
        threshold=threshold,
        max_skips=skips,
        retention=retention,
        ratios=ratios(CURVES[mode]),
        mode=mode,
        high_noise_steps=split,
    )
    assert [c // 2 for c in found if c % 2 == 0] == [int(s) for s in cond.split()]
    assert [c // 2 for c in found if c % 2] == [int(s) for s in (uncond or cond).split()]


def test_two_experts_need_their_switch():
    common = dict(steps=40, threshold=0.1, max_skips=2, retention=0.2, ratios=ratios("t2v-A14B"))
    with pytest.raises(InputError, match=r"mode t2v needs high_noise_steps.*got None"):
        skipped_passes(**common, mode="t2v")
    with pytest.raises(InputError, match=r"mode must be one of t2v, i2v, ti2v; got 's2v'"):
        skipped_passes(**common, mode="s2v")
    with pytest.raises(InputError, match=r"ratios come in pairs"):
        skipped_passes(**{**common, "ratios": [1.0] * 77}, mode="ti2v")


# ---- plans of a run ------------------------------------------------------------------------------------------------


def planned(name: str, setting: MagCache, schedule, split: int | None, *, whole: bool = True) -> list[int]:
    """What a run's one or two models skip, together, in whole-run numbering."""
    spec, steps, found = SPECS[name.split()[0]], len(schedule) - 1, []
    parts = [(0, steps, None)] if split is None else [(0, split, "high_noise"), (split, steps, "low_noise")]
    for first, end, expert in parts:
        if whole:
            plan = RunPlan(spec=spec, schedule=tuple(schedule), first=first, end=end, expert=expert)
            offset = 0
        else:  # one of core's pair of samplers: it knows its own part, and nobody said which expert it is
            plan = RunPlan(spec=spec, schedule=tuple(schedule[first : end + 1]), first=0, end=end - first)
            offset = 2 * first
        assert setting.refusal(plan) is None
        found += [c + offset for c in sorted(setting.start(plan).decisions)]
    return found


@pytest.mark.parametrize("mode", ["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_by_noise_level_the_published_schedule_gives_the_published_passes(mode, setting):
    count, split = STEPS[mode]
    shift = {"t2v": 12.0, "i2v": 5.0, "ti2v": 5.0}[mode]
    schedule = sigmas(count, shift, "unipc").float().tolist()  # as samplers have it
    threshold, skips, retention = setting
    spec = {"t2v": "t2v-A14B", "i2v": "i2v-A14B", "ti2v": "ti2v-5B"}[mode]
    magcache = MagCache(threshold, skips, retention, phase="published")
    expected = Published.run(threshold, skips, retention, ratios(CURVES[mode]), count, split, mode)
    assert planned(spec, magcache, schedule, split) == expected


@pytest.mark.parametrize("whole", [True, False])
def test_in_phase_skips_cond_and_uncond_together_and_no_more_than_the_threshold_allows(whole):
    schedule = sigmas(40, 5.0, "unipc").float().tolist()
    found = planned("i2v-A14B", MagCache(0.06, 2, 0.1), schedule, 15, whole=whole)
    cond, uncond = ([c // 2 for c in found if c % 2 == p] for p in (0, 1))
    assert cond == uncond == [18, 19, 21, 22, 24, 25, 27, 29, 31, 33]
    curve = published()["i2v-A14B"]
    for row in (curve.cond, curve.uncond):
        rho, error = 1.0, 0.0
        for step in range(18, 40):
            if step in cond:
                rho *= row[step]
                error += abs(1 - rho)
                assert error < 0.06
            else:
                rho, error = 1.0, 0.0


def test_the_experts_share_no_state_in_phase():
    """Published, the last skip of the high-noise expert leaves its count to the low-noise one."""
    schedule = sigmas(40, 12.0, "unipc").float().tolist()

    def low(phase: str, whole: bool = True) -> list[int]:
        found = planned("t2v-A14B", MagCache(0.24, 2, 0.1, phase=phase), schedule, 26, whole=whole)
        return [c // 2 for c in found if c >= 52 and c % 2 == 0]

    assert low("in_phase") == low("in_phase", whole=False) == [28, 29, 31, 32, 34, 35, 37, 39]
    assert low("published") == [29, 30, 32, 33, 35, 36, 38]


def test_the_table_of_the_documentation():
    """Passes that presets skip, in phase, on the published schedules."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "magcache.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(E\w+)` \| ([\d.]+), (\d), ([\d.]+) \| (\d+) of 80 \| (\d+) of 80 \| (\d+) of 100 \|$", page, re.M
    )
    assert [row[0] for row in rows] == list(PRESETS)
    for name, threshold, skips, retention, *counts in rows:
        assert PRESETS[name] == (float(threshold), int(skips), float(retention))
        runs = [("t2v-A14B", 12.0, 40, 26), ("i2v-A14B", 5.0, 40, 15), ("ti2v-5B", 5.0, 50, None)]
        for count, (model, shift, steps, split) in zip(counts, runs, strict=True):
            schedule = sigmas(steps, shift, "unipc").float().tolist()
            assert len(planned(model, MagCache(*PRESETS[name]), schedule, split)) == int(count)


def test_fewer_steps_have_the_ratios_of_several_in_one():
    curve = published()["ti2v-5B t2v"]
    half = curve.sigmas[::2]
    for index in range(1, len(half)):
        expected = curve.cond[2 * index - 1] * curve.cond[2 * index]
        assert curve.ratio(half[index - 1], half[index], 0, None) == pytest.approx(expected, rel=1e-12)
    between = (curve.sigmas[10] + curve.sigmas[11]) / 2
    halves = curve.ratio(curve.sigmas[10], between, 1, None) * curve.ratio(between, curve.sigmas[11], 1, None)
    assert halves == pytest.approx(curve.uncond[11], rel=1e-12)


def test_nothing_is_known_below_the_curve_or_across_the_switch():
    curve = published()["t2v-A14B"]
    s = curve.sigmas
    assert curve.ratio(s[-1], s[-1] / 2, 0, "low_noise") == math.inf
    assert curve.ratio(s[20], s[21], 0, "low_noise") == math.inf
    assert curve.ratio(s[30], s[31], 0, "high_noise") == math.inf
    assert curve.ratio(s[20], s[21], 0, "high_noise") == curve.cond[21]
    assert curve.side(s[25]) == "high_noise" and curve.side(s[26]) == "low_noise"


def test_other_shifts_and_solvers_are_resampled_and_bounded():
    """Few and many steps, two shifts, two grids: every skip stays below the threshold on the curve as a function of the
    noise level."""
    curve = published()["t2v-A14B"]
    for steps, shift, solver in [(12, 12.0, "unipc"), (30, 5.0, "dpm++"), (100, 12.0, "euler"), (40, 8.0, "unipc")]:
        schedule = sigmas(steps, shift, solver).float().tolist()
        split = high_noise_steps(timesteps(steps, shift, solver), 0.875)
        found = planned("t2v-A14B", MagCache(0.12, 2, 0.2), schedule, split)
        assert found and len(found) < 1.4 * steps
        for c in found:
            assert schedule[c // 2] >= curve.sigmas[-1] * (1 - 1e-4), "beyond the curve"
            assert c // 2 not in (0, split)
    coarse = planned("t2v-A14B", MagCache(0.12, 2, 0.2), sigmas(12, 12.0).float().tolist(), 8)
    fine = planned("t2v-A14B", MagCache(0.12, 2, 0.2), sigmas(60, 12.0).float().tolist(), 39)
    assert len(coarse) / 24 < len(fine) / 120, "coarse steps differ more"


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_few_steps_are_refused_whole_or_in_parts():
    spec = SPECS["t2v-A14B"]
    schedule = tuple(sigmas(8, 5.0, "euler").tolist())
    for first, end in ((0, 8), (0, 3), (3, 8)):
        plan = RunPlan(spec=spec, schedule=schedule, first=first, end=end)
        assert "MagCache cannot skip in a run of 8 steps" in MagCache().refusal(plan)
    short = tuple(sigmas(4, 5.0, "euler").tolist())
    for part in (short[:3], short[2:]):
        plan = RunPlan(spec=spec, schedule=part, first=0, end=2)
        assert "MagCache cannot skip in a run of" in MagCache().refusal(plan)
    for part in (sigmas(20, 12.0)[:14], sigmas(20, 12.0)[13:]):
        plan = RunPlan(spec=spec, schedule=tuple(part.tolist()), first=0, end=len(part) - 1)
        assert MagCache().refusal(plan) is None


def test_another_models_curve_is_refused():
    import dataclasses

    schedule = tuple(sigmas(40, 12.0).tolist())
    other = dataclasses.replace(SPECS["t2v-A14B"], dim=1536, num_layers=30, num_heads=12)
    plan = RunPlan(spec=other, schedule=schedule, first=0, end=26, expert="high_noise")
    assert "measured on a model of width 5120 with 40 blocks, and this one has width 1536 and 30" in MagCache().refusal(
        plan
    )
    asked = MagCache(curve=published()["t2v-A14B"])
    assert asked.refusal(plan) is None, "by name it is taken"
    plan = RunPlan(spec=SPECS["i2v-A14B"], schedule=schedule, first=0, end=15, expert="high_noise")
    assert "was measured on a t2v model, and this one is i2v" in asked.refusal(plan)


def test_one_expert_throughout_is_refused():
    plan = RunPlan(spec=SPECS["i2v-A14B"], schedule=tuple(sigmas(40, 5.0).tolist()), first=0, end=40)
    assert "is of two experts, and one model runs every step" in MagCache().refusal(plan)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (dict(threshold=float("nan")), "threshold is an error of at least 0"),
        (dict(max_skips=-1), "max_skips counts steps in a row from 0"),
        (dict(retention=1.5), "retention is a share of the steps, 0 to 1"),
        (dict(phase="both"), "phase must be one of in_phase, published"),
        (dict(reuse="guess"), "reuse must be one of keep, scale, linear"),
    ],
)
def test_settings_are_checked(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        MagCache(**wrong)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """A valid curve file, and a function that writes it with changes."""
    import dataclasses

    curve = dataclasses.replace(published()["t2v-A14B"], models=(("high_noise", "a"), ("low_noise", "b")))
    path = tmp_path / "mine.json"
    save_curve(curve, path)

    def change(**changes):
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(data))
        return path

    return curve, path, change


def test_a_curve_comes_back_as_it_was_written(file):
    import dataclasses

    curve, path, _ = file
    assert load_curve(path) == dataclasses.replace(curve, name="mine")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(cond=[float("nan")] * 40), "its cond must be finite numbers; entry 0 is nan"),
        (dict(cond=[0.9] * 39), "its cond has 39 ratios for 40 sigmas"),
        (dict(cond=[0.9] * 39 + [-1]), "its cond must be ratios of magnitudes"),
        (dict(cond=[0.9] * 39 + ["1"]), "its cond must be finite numbers; entry 39 is '1'"),
        (dict(uncond=[]), "its uncond must be a list of 1 to 1000 numbers"),
        (dict(sigmas=[0.5, 0.6] * 20), "its sigmas must be at least two and fall"),
        (dict(sigmas=[i / 10 for i in range(40, 0, -1)]), "its sigmas must lie between 0 and 1"),
        (dict(switch=40), "its switch must be null or a step from 1 to 39; got 40"),
        (dict(switch=True), "its switch must be null"),
        (dict(task="vace"), "its task must be one of t2v, i2v, ti2v, animate, s2v; got 'vace'"),
        (dict(shape=[5120]), "its shape must be the model's width and number of blocks"),
        (dict(models=[["high_noise", 3]]), "its models must be pairs"),
        (dict(format="other"), "it is no curve of version 1"),
        (dict(version=2), "it is no curve of version 1"),
    ],
)
def test_bad_curves_are_refused(file, changes, sentence):
    with pytest.raises(InputError, match=r"mine\.json: " + sentence):
        load_curve(file[2](**changes))


def test_no_json_is_refused(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"broken\.json is no readable JSON"):
        load_curve(path)
    with pytest.raises(InputError, match=r"gone\.json is no readable JSON"):
        load_curve(tmp_path / "gone.json")


def test_measured_figures_of_the_page_are_those_of_the_script() -> None:
    pack = Path(__file__).resolve().parents[2]
    page = (pack / "docs" / "magcache.md").read_text(encoding="utf-8")
    rows = json.loads((pack / "benchmarks/results/cache_i2v-a14b_1280x720_h200.json").read_text())["rows"]
    for row in rows:
        cells = (
            f"`{row['cache']}`", row["passes_computed"], row["passes_skipped"], f"{row['skipped_pass_ms']:.1f}",
            f"{row['loop_ratio']:.3f}", row["activations_per_conditioning"],
        )  # fmt: skip
        assert "| " + " | ".join(map(str, cells)) + " |\n" in page
        assert row["passes_computed"] + row["passes_skipped"] == 80


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "no readable JSON"),
        ('{"format": "wan_fp8_magcache_curve", "version": 1, "sigmas": [1%s, 0.5]}' % ("0" * 400), "far above"),
        ('{"format": "wan_fp8_magcache_curve", "version": 1, "sigmas": [1e999, 0.5]}', "finite"),
        ('{"format": "wan_fp8_magcache_curve", "version": 1, "sigmas": [NaN, 0.5]}', "finite"),
    ],
    ids=["deep", "long", "infinite", "nan"],
)
def test_a_hostile_curve_gets_a_sentence(tmp_path, text: str, words: str):
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(InputError, match=words) as found:
        load_curve(tmp_path / "curve.json")
    assert len(str(found.value)) < 400
