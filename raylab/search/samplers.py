"""Points asked of Optuna: the samplers by the design that names them, and values as a study holds them."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna

from raylab.base.identity import canonical
from raylab.job.designs import Values, is_active, last_step, order_space, step_value
from raylab.job.settings import is_integer
from raylab.job.specs import Choices, Job, Range

# Silent, warnings too: TPE's tell of conditional settings, which are meant.
optuna.logging.set_verbosity(optuna.logging.ERROR)


def _make_random(seed: int, num_arms: int, anew: bool) -> optuna.samplers.BaseSampler:
    return optuna.samplers.RandomSampler(seed=seed)


def _make_tpe(seed: int, num_arms: int, anew: bool) -> optuna.samplers.BaseSampler:
    if anew:
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,  # conditional settings: arms that share settings inform each other
            constant_liar=True,  # arms still running count as bad: workers spread out
            n_startup_trials=max(3, min(10, num_arms // 4)),
        )


def _make_nsga2(seed: int, num_arms: int, anew: bool) -> optuna.samplers.BaseSampler:
    # Every setting mutated is a random point, which still counts in its generation.
    return optuna.samplers.NSGAIISampler(
        seed=seed, population_size=max(4, min(50, num_arms // 5)), mutation_prob=1.0 if anew else None
    )


# Design -> sampler of a seed and the number of arms; or, `anew`, of any point rather than a likely one.
SAMPLERS: dict[str, Callable[[int, int, bool], optuna.samplers.BaseSampler]] = {
    "random": _make_random,
    "tpe": _make_tpe,
    "nsga2": _make_nsga2,
}


def encode_choice(value: Any) -> Any:
    """A choice as Optuna takes it: scalars, or JSON text."""
    return canonical(value) if isinstance(value, list | dict) else value


def suggest_point(trial: optuna.Trial, job: Job) -> Values:
    """A point of the space, setting by setting."""
    values: Values = {}
    for name in order_space(job):
        entry = job.search.space[name]
        if not is_active(job, name, values):
            continue
        if isinstance(entry, Choices):
            coded = {encode_choice(choice): choice for choice in entry.choices}
            values[name] = coded[trial.suggest_categorical(name, list(coded))]
        elif is_integer(name) and entry.log:
            values[name] = trial.suggest_int(name, int(entry.low), int(entry.high), log=True)
        elif is_integer(name) or entry.step is not None:
            # By the number of steps: the same values as on a grid.
            index = trial.suggest_int(name, 0, last_step(entry))
            values[name] = step_value(name, entry, index)
        else:
            values[name] = trial.suggest_float(name, entry.low, entry.high, log=entry.log)
    return values


def encode_point(job: Job, values: Mapping[str, Any]) -> Values:
    """A point as the study holds it, so that `suggest_point` gives these values back."""
    coded: Values = {}
    for name, value in values.items():
        entry = job.search.space[name]
        if isinstance(entry, Range) and not entry.log and (is_integer(name) or entry.step is not None):
            coded[name] = round((value - entry.low) / (entry.step or 1))
        else:
            coded[name] = encode_choice(value)
    return coded
