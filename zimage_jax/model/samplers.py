"""Noise levels and samplers: everything that a job's steps need beside arrays. On the host.

A sampler is a table of numbers, one row per NFE, so that the scan and the driver run the same
arithmetic, and a new sampler is a new table:

    x' = scale (x + dt v + carry (m - m_before)) + noise n,    m = of_x x + of_v v

x are the latents, v the DiT's velocity (from noise to picture), n new noise, and m what the sampler
remembers: the predicted picture x + sigma v, or the velocity. Sources: ComfyUI's k_diffusion
(sampling.py) and samplers.py, whose formulas are given here for latents (1 - sigma) z + sigma n.

Axes: N + 1 levels of a schedule of N steps; one row of an Update per NFE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ..errors import UsageError

Levels = Float[np.ndarray, "levels"]  # falling noise levels, and a final 0
Numbers = Float[np.ndarray, "nfes"]
Number = Any  # one per NFE: an array of all, or within a program the scalar of one; or None

# -- schedules of noise levels ---------------------------------------------------------------------

TABLE = 1000  # noise levels that ComfyUI's schedules choose from


def shifted(s: Any, shift: float) -> Any:
    """Noise levels of times `s` in 0..1: shift s / (1 + (shift - 1) s). (arXiv 2403.03206)"""
    return shift * s / (1 + (shift - 1) * s)


def simple(steps: int, shift: float) -> Levels:
    """Uniform in time: Z-Image's own. (diffusers `FlowMatchEulerDiscreteScheduler`, static shift)

    ComfyUI's `simple` reads the same levels from a table; they are equal where `steps` divides
    1000, and within 0.003 elsewhere.
    """
    s = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    s = np.float32(shift) * s / (1 + np.float32(shift - 1) * s)
    return np.append(s, np.float32(0))


def sgm_uniform(steps: int, shift: float) -> Levels:
    """Uniform in time down to the table's smallest level, which is left out."""
    smallest = shifted(1 / TABLE, shift)
    return _ended(shifted(np.linspace(1, smallest, steps + 1)[:-1], shift))


def beta(steps: int, shift: float) -> Levels:
    """Quantiles of the beta distribution (0.6, 0.6): dense at both ends. (arXiv 2407.12173)

    Levels that would repeat are left out, so that many steps give fewer levels.
    """
    from scipy.special import betaincinv  # takes longer to import than a command's checks

    quantiles = betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps, endpoint=False))
    index = np.rint(quantiles * (TABLE - 1))
    index = index[np.append(True, np.diff(index) != 0)]
    return _ended(shifted((index + 1) / TABLE, shift))


def linear_quadratic(steps: int, shift: float) -> Levels:
    """Half of the steps for the first 2.5 % of the noise, then quadratic; it ignores `shift`.

    (Mochi's, as in ComfyUI)
    """
    if steps == 1:
        return _ended(np.ones(1))
    linear, threshold = steps // 2, 0.025
    rest, missing = steps - linear, linear - threshold * steps
    square = missing / (linear * rest**2)
    slope = threshold / linear - 2 * missing / rest**2
    i = np.arange(steps, dtype=np.float64)
    later = square * i**2 + slope * i + square * linear**2
    return _ended(1 - np.where(i < linear, i * threshold / linear, later))


SCHEDULES: dict[str, Callable[[int, float], Levels]] = {
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "beta": beta,
    "linear_quadratic": linear_quadratic,
}


def _ended(levels: np.ndarray) -> Levels:
    return np.append(levels, 0).astype(np.float32)


# -- from a picture: where to begin ----------------------------------------------------------------


def by_noise(levels: Callable[[int], Levels], steps: int, strength: float) -> Levels:
    """Begin at the noise level `strength`: 0.6 keeps 40 % of the picture's latents.

    The steps below are spaced as those of `steps` levels, and never wider; where `strength` is one
    of these levels, they are the schedule's own.
    """
    of_all = levels(steps).astype(np.float64)
    position = np.interp(-strength, -of_all, np.arange(len(of_all)))
    if abs(position - round(position)) < 1e-5:
        return levels(steps)[round(position) :]
    count = int(np.ceil(steps - position))
    at = np.linspace(position, len(of_all) - 1, count + 1)
    found = np.interp(at, np.arange(len(of_all)), of_all).astype(np.float32)
    found[0] = strength
    return found


def by_share(levels: Callable[[int], Levels], steps: int, strength: float) -> Levels:
    """The last int(steps x strength) levels, rounded up. (diffusers `ZImageImg2ImgPipeline`)"""
    first = int(steps - min(steps * strength, steps))
    return levels(steps)[first:]


def by_more_steps(levels: Callable[[int], Levels], steps: int, strength: float) -> Levels:
    """The last `steps` of int(steps / strength) levels. (ComfyUI `KSampler.set_steps`)"""
    if strength > 0.9999:
        return levels(steps)
    return levels(int(steps / strength))[-(steps + 1) :]


STRENGTH_RULES = {"noise": by_noise, "diffusers": by_share, "comfyui": by_more_steps}


# -- samplers --------------------------------------------------------------------------------------


class Update(NamedTuple):
    """The numbers of a step, or of all steps as arrays. None where no step needs the number."""

    t: Number  # the time given to the DiT: 1 - sigma
    dt: Number
    of_x: Number = None
    of_v: Number = None
    carry: Number = None
    scale: Number = None
    noise: Number = None
    guidance: Number = None
    # the guided velocity's norm is at most so many times the prompt's own
    norm: Number = None
    # with a mask: the noise level after the step, and the mask's value from which is redrawn
    kept: Number = None
    threshold: Number = None


class Table(NamedTuple):
    """The part of an Update that a sampler gives, and the noise level at each NFE."""

    sigmas: np.ndarray
    after: np.ndarray  # the noise level after each step
    numbers: dict[str, np.ndarray]


def euler(levels: np.ndarray) -> Table:
    """x' = x + (sigma - sigma') v. (diffusers `FlowMatchEulerDiscreteScheduler.step`)"""
    return Table(levels[:-1], levels[1:], {"dt": levels[:-1] - levels[1:]})


def _multistep(levels: np.ndarray, carry: Callable[[float, float], float]) -> Table:
    """Euler, and `carry(h, h_before)` times the last change of the predicted picture.

    h is the fall of log sigma in a step. The first and the last step are Euler's.
    """
    sigmas, after, numbers = euler(levels)
    found = np.zeros(len(sigmas))
    for i in range(1, len(sigmas) - 1):
        before, now, then = np.log(levels[i - 1 : i + 2].astype(np.float64))
        found[i] = carry(now - then, before - now)
    remembered = {"of_x": np.ones(len(sigmas)), "of_v": sigmas}
    return Table(sigmas, after, {**numbers, **remembered, "carry": found})


def dpmpp_2m(levels: np.ndarray) -> Table:
    """DPM-Solver++(2M). (arXiv 2211.01095; ComfyUI `sample_dpmpp_2m`)"""
    return _multistep(levels, lambda h, before: -np.expm1(-h) * h / (2 * before))


def res_multistep(levels: np.ndarray) -> Table:
    """The refined exponential solver of second order. (arXiv 2308.02157; ComfyUI
    `sample_res_multistep`)"""

    return _multistep(levels, lambda h, before: (h + np.expm1(-h)) / before)


def heun(levels: np.ndarray) -> Table:
    """Euler, corrected by the velocity at its end: two NFEs per step, but one for the last.

    (ComfyUI `sample_heun`)
    """
    sigmas, after, numbers = euler(levels)
    count, dt = len(sigmas), numbers["dt"]
    # the NFE of a correction follows each step but the last
    place = np.sort(np.concatenate([np.arange(count), np.arange(count - 1) + 0.5]))
    index, corrects = place.astype(int), place % 1 > 0
    at, steps = np.where(corrects, after[index], sigmas[index]), np.where(corrects, 0, dt[index])
    ones, zeros = np.ones(len(place)), np.zeros(len(place))
    carry = np.where(corrects, dt[index] / 2, 0)
    return Table(at, after[index], {"dt": steps, "of_x": zeros, "of_v": ones, "carry": carry})


def euler_ancestral(levels: np.ndarray) -> Table:
    """Euler to a lower level, then new noise up to the next one; eta is 1.

    (ComfyUI `sample_euler_ancestral_RF`)
    """
    sigmas, after = (part.astype(np.float64) for part in (levels[:-1], levels[1:]))
    down = after * after / sigmas
    scale = (1 - after) / (1 - down)
    noise = np.sqrt(np.maximum(after**2 - (down * scale) ** 2, 0))
    return Table(levels[:-1], levels[1:], {"dt": sigmas - down, "scale": scale, "noise": noise})


SAMPLERS: dict[str, Callable[[np.ndarray], Table]] = {
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "res_multistep": res_multistep,
    "heun": heun,
    "euler_ancestral": euler_ancestral,
}


# -- the trajectory of a job -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A job's way from its first latents to the last: the noise levels, and its steps' numbers."""

    start: float  # the noise level of the first latents; 0 if there is no NFE
    sigmas: Numbers  # the noise level at each NFE
    update: Update

    @property
    def nfes(self) -> int:
        return len(self.sigmas)

    @property
    def scheduler_times(self) -> Numbers:
        """The scheduler's t at each NFE, from 1000 to 0."""
        return self.sigmas * np.float32(1000)

    @property
    def template(self) -> Update:
        """The Update of one step with 0 for every number: what is given, and what is None."""
        return Update(*(None if field is None else np.float32(0) for field in self.update))

    def step(self, index: int) -> Update:
        return Update(*(None if field is None else field[index] for field in self.update))

    @classmethod
    def of(
        cls,
        steps: int,
        shift: float,
        *,
        sampler: str = "euler",
        schedule: str = "simple",
        strength: float | None = None,
        rule: str = "noise",
        guidance: float = 0.0,
        normalization: float = 0.0,
        truncation: float = 1.0,
        is_masked: bool = False,
        is_differential: bool = False,
    ) -> "Trajectory":
        """The trajectory of `steps` steps.

        `strength`: None for a job that begins from noise alone, else 0..1, by the rule named.
        `normalization`, `truncation`: limits of guidance as in diffusers' `ZImagePipeline`.
        `is_differential`: a mask's grey says from which step on a place is redrawn. (arXiv
        2306.00950)

        Raises UsageError for `steps` below 1.
        """
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        levels = _levels(steps, shift, schedule, strength, rule)
        sigmas, after, numbers = SAMPLERS[sampler](levels)
        t = (np.float32(1000) - sigmas * np.float32(1000)) / np.float32(1000)
        if guidance:
            numbers["guidance"] = np.where(t > truncation, 0, guidance)
            if normalization:
                numbers["norm"] = np.where(t > truncation, np.inf, normalization)
        if is_masked:
            numbers["kept"] = after
            if is_differential:
                numbers["threshold"] = sigmas / levels[0]  # ComfyUI's DifferentialDiffusion
        cast = {name: np.asarray(values, np.float32) for name, values in numbers.items()}
        start = float(levels[0]) if len(levels) > 1 else 0.0
        return cls(start=start, sigmas=sigmas.astype(np.float32), update=Update(t=t, **cast))


def _levels(
    steps: int, shift: float, schedule: str, strength: float | None, rule: str
) -> np.ndarray:
    def levels(count: int) -> np.ndarray:
        return SCHEDULES[schedule](count, shift)

    if strength is None:
        return levels(steps)
    if strength == 0:
        return np.zeros(1, np.float32)
    return STRENGTH_RULES[rule](levels, steps, strength)
