"""What watches a run's numbers: skipped updates, failing rewards, and alarms over the metrics.

Every process sees the same numbers here, which are those of the whole batch, and so decides the
same. The state is plain JSON and travels with checkpoints: a resumed run counts on.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from corl_jax.errors import GuardError, RewardError

WINDOW = 10  # logged steps: over which shares are averaged, and after which an alarm is off again
FAILED_WINDOW = 20  # steps over which the failures of a reward are averaged
UNREWARDED_STEPS = 20  # without any reward, from the beginning, after which a run ends
FAILED = "/failed"
"""Ends the names of the metrics that say which share of a batch a reward failed on."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One alarm over logged metrics."""

    keys: tuple[str, ...]
    hint: str  # what the crossing may mean
    above: bool = True  # sounds above its limit, else below
    span: int = 1  # logged steps whose mean is compared
    relative: bool = False  # to the mean of the first WINDOW logged steps
    # NaN says that there was nothing to measure, and is left out of the mean; else it is beyond
    # every limit.
    nan_is_absent: bool = False


def _of_both(name: str) -> tuple[str, str]:
    return f"t2i/{name}", f"mm2t/{name}"


RULES: dict[str, Rule] = {
    "kl": Rule(_of_both("kl"), "the policy leaves its reference; a lower rate or a larger kl_coef"),
    "entropy": Rule(
        _of_both("entropy"), "samples become alike and groups teach nothing", False, WINDOW, True
    ),
    "duplicates": Rule(
        ("t2i/duplicate_fraction",), "drawings of a group are the same tokens", span=WINDOW
    ),
    "zero_spread": Rule(
        ("frac_reward_zero_std",),
        "groups get equal rewards, so there is no signal",
        span=WINDOW,
        nan_is_absent=True,
    ),
    "not_applicable": Rule(
        ("not_applicable", *_of_both("not_applicable")),
        "these completions have no reward (None, NaN or infinite) and teach nothing; look at the "
        "columns that the rewards need",
        span=WINDOW,
    ),
    "drift_mean": Rule(
        _of_both("sampling/sampling_logp_difference/mean"),
        "what samples is not what is trained; check dtype, temperature, top_k, top_p, cfg_scale",
    ),
    "drift_max": Rule(
        _of_both("sampling/sampling_logp_difference/max"),
        "a token is far less likely to one of sampler and trainer",
    ),
}
"""Alarm, which is also the option of `guards` with its limit -> what it looks at."""

OF_REWARD = re.compile(r"(?:t2i|mm2t)/rewards/[^/]+/not_applicable")
"""Metrics that the alarm `not_applicable` looks at too; over is a reward that never applies."""

HELD_OUT = "held_out"
HELD_OUT_HINT = "the reward is learned, not what it stands for"


class Guards:
    """The guards of a run; `options` is `schema.Guards`."""

    def __init__(self, options: Any):
        self._options = options
        self._state: dict[str, Any] = {
            "in_a_row": 0,  # skipped updates up to now
            "skipped": 0,  # in the whole run
            "unlogged": 0,  # skipped since the last logged step
            "failed": {},  # metric of a reward -> its last FAILED_WINDOW values
            "unrewarded": 0,  # steps from the beginning in which no reward applied; None: one did
            "recent": {},  # metric -> its last values, as many as its rule averages
            "first": {},  # metric -> its first WINDOW values
            "quiet": {},  # alarm that is on -> logged steps within the limit since
            "rewards": [0.0, 0],  # sum and number of training rewards since the last evaluation
            "best": {},  # held-out score -> [mean, standard error, training reward] of its best
        }

    def state(self) -> dict[str, Any]:
        """What `restore` takes; JSON, in which NaN may become None."""
        return self._state

    @property
    def skipped(self) -> int:
        """Updates of the whole run that were skipped."""
        return self._state["skipped"]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state`; an alarm that is on and has become fatal begins anew."""
        self._state = self._state | dict(state)
        quiet = self._state["quiet"].items()
        self._state["quiet"] = {k: v for k, v in quiet if k not in self._options.fatal}

    # ---- every step

    def step(
        self,
        step: int,
        updates: Sequence[Mapping[str, float]],
        metrics: Mapping[str, float],
        is_last: bool = False,
    ) -> None:
        """Looks at a step's updates, in order, and at its rewards; `is_last`: of the run.

        Raises:
            GuardError: `max_skipped_updates` updates in a row were skipped, or no reward has
                applied to any completion of the run.
            RewardError: a reward fails on more than `max_failed_reward_fraction` of the samples.
        """
        state = self._state
        for update in updates:
            skipped = bool(update["update/skipped"])
            state["in_a_row"] = state["in_a_row"] + 1 if skipped else 0
            state["skipped"] += skipped
            state["unlogged"] += skipped
            if state["in_a_row"] >= self._options.max_skipped_updates:
                raise GuardError(_not_finite(step, update, state["in_a_row"]))
        for name, value in metrics.items():
            if name.endswith(FAILED):
                self._failed(step, name, float(value))
        if "not_applicable" in metrics and state["unrewarded"] is not None:
            self._unrewarded(step, float(metrics["not_applicable"]), is_last)

    def _unrewarded(self, step: int, share: float, is_last: bool) -> None:
        state = self._state
        state["unrewarded"] = state["unrewarded"] + 1 if share == 1.0 else None
        limit = self._options.not_applicable
        if limit is None or state["unrewarded"] is None:
            return
        if is_last or state["unrewarded"] >= UNREWARDED_STEPS:
            raise GuardError(
                f"step {step}: no reward has applied to any completion of the "
                f"{state['unrewarded']} step(s) of this run, so it has learnt nothing: every "
                "reward was None, NaN or infinite. Look at the columns that the rewards need, and "
                "at rewards by use; guards.not_applicable null lets such a run go on"
            )

    def _failed(self, step: int, name: str, value: float) -> None:
        last = self._state["failed"].setdefault(name, [])
        last[:] = [*last, value][-FAILED_WINDOW:]
        limit, share = self._options.max_failed_reward_fraction, statistics.fmean(last)
        if len(last) == FAILED_WINDOW and share > limit:
            reward = name.removesuffix(FAILED).rpartition("/")[2]
            raise RewardError(
                f"step {step}: reward {reward} failed on {share:.0%} of the samples of the last "
                f"{len(last)} steps, more than guards.max_failed_reward_fraction {limit:g}; the "
                "warnings above say why"
            )

    # ---- logged steps

    def logged(
        self, step: int, values: Mapping[str, float], is_last: bool = False
    ) -> tuple[dict[str, float], list[str]]:
        """(metrics to log beside a step's others, a line for each alarm that begins).

        `is_last`: of the run, which may be shorter than what alarms are averaged over.
        Call `require` with the lines when they have been said.
        """
        state = self._state
        metrics = {"update/skipped": float(state["unlogged"])}
        metrics["update/skipped_total"] = float(state["skipped"])
        state["unlogged"] = 0
        if math.isfinite(reward := values.get("reward", math.nan)):
            state["rewards"] = [state["rewards"][0] + reward, state["rewards"][1] + 1]
            self._window("first", "reward", reward)
        lines = []
        for name, rule in RULES.items():
            limit = getattr(self._options, name)
            present = [key for key in rule.keys if key in values]
            if limit is None or not present:
                continue
            levels = {key: self._level(rule, key, values[key]) for key in present}
            over = [key for key, level in levels.items() if _beyond(rule, level, limit)]
            if name == "not_applicable":
                over += self._never_applicable(values, levels, is_last)
            if self._switch(name, bool(over)):
                side = "above" if rule.above else "below"
                share = " of its first steps" if rule.relative else ""
                found = " and ".join(f"{key} {levels[key]:.4g}{share}" for key in over)
                lines.append(_line(name, step, f"{found}, {side} {limit:g}", rule.hint))
            metrics[f"alarm/{name}"] = float(name in state["quiet"])
        return metrics, lines

    def _never_applicable(
        self, values: Mapping[str, float], levels: dict[str, float | None], is_last: bool
    ) -> list[str]:
        """Rewards that applied to nothing in the last WINDOW logged steps, or in a shorter run.

        A share of its own for each would not do: a reward may be meant for few rows.
        """
        for key in filter(OF_REWARD.fullmatch, values):
            recent = self._window("recent", key, values[key], WINDOW)
            if (len(recent) == WINDOW or is_last) and min(recent) == 1.0:
                levels[key] = 1.0
        return [key for key in levels if OF_REWARD.fullmatch(key)]

    def _level(self, rule: Rule, key: str, value: float) -> float | None:
        """What is compared with the limit; None while there are too few steps."""
        if rule.span == 1:
            return value
        if rule.nan_is_absent and math.isnan(value):
            return None
        if rule.relative and len(self._state["first"].get(key, [])) < WINDOW:
            self._window("first", key, value)
            return None
        recent = self._window("recent", key, value, rule.span)
        if len(recent) < rule.span:
            return None
        level = statistics.fmean(recent)
        if not rule.relative:
            return level
        first = statistics.fmean(map(_number, self._state["first"][key]))
        return level / first if first else 1.0

    def _window(self, kind: str, key: str, value: float, span: int | None = None) -> list[float]:
        """The last `span` values with this one, or for None the first WINDOW ones."""
        values = [_number(x) for x in self._state[kind].get(key, [])]
        kept = [*values, value][-span:] if span else [*values, value][:WINDOW]
        self._state[kind][key] = kept
        return kept

    def _switch(self, name: str, over: bool) -> bool:
        """Whether the alarm begins now; it is off again after WINDOW logged steps without."""
        quiet = self._state["quiet"]
        if over:
            begins = name not in quiet
            quiet[name] = 0
            return begins
        if name in quiet:
            quiet[name] += 1
            if quiet[name] >= WINDOW:
                del quiet[name]
        return False

    # ---- evaluations

    def evaluated(
        self, step: int, values: Mapping[str, float]
    ) -> tuple[dict[str, float], list[str]]:
        """As `logged`, of an evaluation: a held-out score below its best while rewards rose.

        Beyond `held_out` standard errors of the difference. The training reward of an evaluation
        is the mean of the logged steps since the one before; of the first, that of the run's
        first WINDOW logged steps.
        """
        state, limit = self._state, self._options.held_out
        total, count = state["rewards"]
        state["rewards"] = [0.0, 0]
        scores = held_out_scores(values)
        if limit is None or not scores:
            return {}, []
        reward = total / count if count else None
        begin = [_number(x) for x in state["first"].get("reward", [])]
        fallen = []
        for name, (mean, error) in scores.items():
            best = state["best"].get(name)
            if best is None or mean > best[0]:
                state["best"][name] = [mean, error, reward]
                continue
            then = best[2] if best[2] is not None else (statistics.fmean(begin) if begin else None)
            drop = best[0] - mean
            risen = then is not None and reward is not None and reward > then
            if risen and drop > limit * math.hypot(error, best[1]):
                fallen.append(
                    f"{name} {mean:.4g} after {best[0]:.4g}, the reward {reward:.4g} after "
                    f"{then:.4g}"
                )
        begins = bool(fallen) and HELD_OUT not in state["quiet"]
        state["quiet"] = {k: v for k, v in state["quiet"].items() if k != HELD_OUT}
        if fallen:
            state["quiet"][HELD_OUT] = 0
        lines = [_line(HELD_OUT, step, " and ".join(fallen), HELD_OUT_HINT)] if begins else []
        return {f"alarm/{HELD_OUT}": float(bool(fallen))}, lines

    def require(self, lines: Sequence[str]) -> None:
        """Raises GuardError if one of the alarms that began is listed as fatal."""
        fatal = tuple(f"alarm {name} " for name in self._options.fatal)
        listed = [line for line in lines if line.startswith(fatal)]
        if fatal and listed:
            raise GuardError("\n".join(f"{line}; guards.fatal lists it" for line in listed))


def held_out_scores(values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """name -> (mean, standard error) of an evaluation's rewards, or of its two accuracies."""
    scores = {}
    for name, mean in values.items():
        if f"{name}_stderr" in values:
            error = values[f"{name}_stderr"]
        elif name.endswith("/accuracy") and {f"{name}_low", f"{name}_high"} <= values.keys():
            error = (values[f"{name}_high"] - values[f"{name}_low"]) / (2 * 1.96)
        else:
            continue
        if math.isfinite(mean) and math.isfinite(error):
            scores[name] = (float(mean), float(error))
    return scores


def _beyond(rule: Rule, level: float | None, limit: float) -> bool:
    """NaN is beyond every limit."""
    if level is None:
        return False
    return not (level <= limit if rule.above else level >= limit)


def _line(name: str, step: int, found: str, hint: str) -> str:
    return f"alarm {name} at step {step}: {found}: {hint}"


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _not_finite(step: int, update: Mapping[str, float], in_a_row: int) -> str:
    """What was not finite in the last of the skipped updates."""
    parts = [
        name
        for name, value in update.items()
        if "/" in name and not math.isfinite(float(value)) and "sampling" not in name
    ]
    where = ", ".join(parts) or "no part of the loss, so it is a derivative"
    return (
        f"step {step}: {in_a_row} update(s) in a row were skipped, because loss "
        f"{float(update['loss']):g} and gradient norm {float(update['grad_norm']):g} are not both "
        f"finite; not finite: {where}. Parameters and optimizer are finite, in checkpoints too. "
        "Try a lower optimizer.learning_rate or max_grad_norm, or model.dtype float32"
    )
