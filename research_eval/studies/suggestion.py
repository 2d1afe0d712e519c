"""New configs from past runs: steps away from the best ones, or proposals of a TPE sampler fitted on all of them.

A suggestion is a complete, checked config. If its data are synthetic, its model has made a training step. It differs
from every stored run, finished or not, and from every other suggestion. Names, seeds and settings that do not change
what is computed do not count as differences.

The strategy "perturb" starts from each of the best configs and moves a few values a little way (`perturbation`). The
strategy "tpe" fits Optuna's sampler on all comparable runs, also the bad ones, and draws from it. Both draw until they
have enough new configs, or until many draws in a row have found none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from research_eval.annotations import INT_MAX, Range
from research_eval.config.sections import ExperimentConfig
from research_eval.errors import ConfigError
from research_eval.files import file_stem, write_atomically
from research_eval.seeding import derive_seed
from research_eval.store.changes import Change, changes
from research_eval.store.find import check_metric
from research_eval.store.metrics import DEFAULT_METRIC, check_selectable, direction
from research_eval.store.records import ACTIVE_RUNS, KEPT, RunFilter, RunRow
from research_eval.store.store import Store
from research_eval.store.values import canonical_json
from research_eval.studies import adapter, storage
from research_eval.studies.distributions import Infeasible
from research_eval.studies.novelty import Novelty
from research_eval.studies.original_trials import with_translations
from research_eval.studies.past_runs import PastRun, Template, find_templates, past_runs
from research_eval.studies.perturbation import (
    Config,
    Space,
    is_number,
    perturbed,
    rounded,
    space_around,
    values_of,
    widened,
)
from research_eval.wording import hint

log = logging.getLogger(__name__)

STRATEGIES = ("perturb", "tpe")
DEFAULT_MAGNITUDE = 0.1
MAX_TRIES = 300  # draws in search of one new config
MAX_SUGGESTIONS = 1000  # per template, or per sampler
TRIES_PER_STEP = 50  # after so many draws without a new config, a variation is one step longer
MIN_FITTED = 2  # runs that a sampler needs to compare


@dataclass(frozen=True)
class Request:
    """What the user asks for. `narrowing` is the content of a search space file. Raises ConfigError.

    `wanted` are the runs to start from.
    """

    dataset_name: str
    model_type: str
    metric_name: str = DEFAULT_METRIC
    top_n: int = 3
    num_variations_per_config: int = 2
    perturbation_magnitude: float = DEFAULT_MAGNITUDE
    strategy: str = "perturb"
    seed: int = 0
    narrowing: Mapping[str, Any] | None = None
    wanted: RunFilter = ACTIVE_RUNS

    def __post_init__(self) -> None:
        """Check the numbers and names. Messages name the flag that the user has to change."""
        check_selectable(self.metric_name, "--metric_name")
        for name, least in (("top_n", 1), ("num_variations_per_config", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name}: has to be at least {least}, got {getattr(self, name)}")
        if self.seed > INT_MAX:
            raise ConfigError(f"--seed: has to be at most {INT_MAX:,}, got {self.seed:,}")
        by_tpe = self.strategy == "tpe"
        asked = self.num_variations_per_config * (self.top_n if by_tpe else 1)
        if asked > MAX_SUGGESTIONS:
            what = "--top_n times --num_variations_per_config" if by_tpe else "--num_variations_per_config"
            raise ConfigError(f"{what}: has to be at most {MAX_SUGGESTIONS:,}, got {asked:,}")
        if not 0 < self.perturbation_magnitude < math.inf:
            magnitude = self.perturbation_magnitude
            raise ConfigError(f"--perturbation_magnitude: has to be a positive number, got {magnitude}")
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy: unknown {self.strategy!r}.{hint(self.strategy, STRATEGIES)}")
        if "dataset_params" in (self.narrowing or {}):
            raise ConfigError("--search_space: dataset_params: a suggestion keeps those of the run it comes from")


@dataclass(frozen=True)
class Suggestion:
    """A new config, the run that it comes from (in words), and how it differs from that run."""

    config: ExperimentConfig
    file_name: str
    source: str
    changes: list[Change]

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(self.config.to_dict(), indent=2) + "\n"


def suggest(store: Store, request: Request) -> list[Suggestion]:
    """Find new configs: at least one, at most `top_n` * `num_variations_per_config`. Raises ConfigError."""
    # Runs that are not wanted, or archived, are no start. But what they have tried is not new either.
    every = store.runs(request.dataset_name, [request.metric_name], RunFilter(view=KEPT))
    own = [row for row in every if row.model_type == request.model_type]
    known = past_runs(with_translations(store, request.dataset_name, own), request.metric_name)
    rows = store.runs(request.dataset_name, [], request.wanted)
    ids = {row.experiment_id for row in rows}
    past = [run for run in known if run.run_id in ids]
    templates = find_templates(past, request.metric_name, request.top_n)
    if every and not rows:
        place = f"{request.dataset_name!r} in {store.location}"
        raise ConfigError(f"no run on {place} is left by the filters such as --name; archived runs do not count")
    if not templates:
        raise _nothing_to_start_from(store, rows, request)
    _warn_of_changed_data(templates[0])
    novelty = Novelty(known)
    if request.strategy == "tpe":
        wanted = request.top_n * request.num_variations_per_config
        found = _suggest_by_tpe(past, templates[0], novelty, request)
    else:
        wanted = len(templates) * request.num_variations_per_config
        found = _suggest_by_steps(templates, novelty, request)
    if not found:
        raise ConfigError(
            f"no new config was found in {MAX_TRIES} tries: {novelty.reason()}. "
            "Give another --search_space, or a larger --perturbation_magnitude."
        )
    if len(found) < wanted:
        log.warning("only %d of %d new configs were found: %s", len(found), wanted, novelty.reason())
    return found


def _warn_of_changed_data(template: Template) -> None:
    """Say so if the files of the best config have changed since its runs. Nothing is fetched from a network."""
    config, known = template.config, template.runs[-1].data_sha256
    if known is None or not (config.dataset_params.get("data_dir") or config.dataset_params.get("sources")):
        return
    from research_eval.datasets.providers import load_splits  # here, because it imports torch

    try:
        data = load_splits(config.dataset_type, config.dataset_name, config.dataset_params, config.seed)
    except ConfigError:  # the files may be on another machine
        return
    if data.fingerprint.get("data_sha256") != known:
        log.warning(
            "the data of %s have changed since run %s: its scores, and those of the other runs, are of the old data",
            *(config.dataset_name, template.runs[-1].run_id),
        )


def write_suggestions(suggestions: Sequence[Suggestion], folder: Path) -> list[Path]:
    """Write a file per suggestion and return the paths.

    Files with the same content may exist already. Raises ConfigError for an existing file with other content.
    """
    paths = [folder / suggestion.file_name for suggestion in suggestions]
    contents = [suggestion.to_json().encode() for suggestion in suggestions]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents, strict=True):
            if path.exists() and path.read_bytes() != content:
                raise ConfigError(f"{path}: is there with other content. Move it away or give another --output_dir.")
        for path, content in zip(paths, contents, strict=True):
            write_atomically(path, content)
    except OSError as error:
        raise ConfigError(f"--output_dir: {folder} cannot be written: {error.strerror}") from error
    return paths


def _nothing_to_start_from(store: Store, rows: Sequence[RunRow], request: Request) -> ConfigError:
    """The error for a request without templates. It says what the store has instead."""
    dataset, model_type, metric = request.dataset_name, request.model_type, request.metric_name
    statuses = Counter(row.status for row in rows if row.model_type == model_type)
    if not rows:
        known = hint(dataset, store.dataset_names()) or " There are no runs at all."
        return ConfigError(f"--dataset_name: no runs on {dataset!r} in {store.location}.{known}")
    if not statuses:
        known = hint(model_type, {row.model_type for row in rows})
        return ConfigError(f"--model_type: no runs of {model_type!r} on {dataset} in {store.location}.{known}")
    if statuses["finished"]:
        check_metric(store, metric, "--metric_name")
    counted = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))
    return ConfigError(
        f"no finished run of {model_type} on {dataset} has a config to start from and a number for {metric}; "
        f"there are {counted}"
    )


# ------------------------------------------------------------------------------------------------------ strategies


def _suggest_by_steps(templates: Sequence[Template], novelty: Novelty, request: Request) -> list[Suggestion]:
    """Variations of each template. Each template has random numbers of its own."""
    found = []
    for rank, template in enumerate(templates):
        start, space = template.config.to_dict(), space_around(template.config, request.narrowing or {})
        rng = np.random.default_rng(derive_seed(request.seed, "suggestion", rank))
        draw = functools.partial(_walk, start, space, request.perturbation_magnitude, rng)
        seeds = f", mean of {len(template.runs)} seeds" if len(template.runs) > 1 else ""
        source = f"from run {template.runs[0].run_id} ({request.metric_name} {template.mean:.4g}{seeds})"
        for number, config in enumerate(_new_configs(draw, novelty, request.num_variations_per_config), 1):
            found.append(_named(config, template.config.experiment_name, number, source, start))
    return found


def _walk(start: Config, space: Space, magnitude: float, rng: np.random.Generator, tries: int) -> Config:
    """A step away from the config; several steps if many draws have found nothing new."""
    config = start
    for _ in range(1 + tries // TRIES_PER_STEP):
        config = perturbed(config, space, magnitude, rng)
    return config


def _new_configs(draw: Callable[[int], Config], novelty: Novelty, wanted: int) -> list[ExperimentConfig]:
    """The first `wanted` new configs that `draw` returns, or as many as were found.

    `draw` receives the number of failed draws since the last new config.
    """
    found: list[ExperimentConfig] = []
    tries = 0
    while len(found) < wanted and tries < MAX_TRIES:
        try:
            config = novelty.admit(draw(tries))
        except Infeasible as problem:
            novelty.refuse(str(problem))
            config = None
        tries += 1
        if config is not None:
            found.append(config)
            tries = 0
    return found


def _named(config: ExperimentConfig, name: str, number: int, source: str, start: Config) -> Suggestion:
    """The suggestion with a name and a file name. The file name contains a hash of the config."""
    config = config.model_copy(update={"experiment_name": f"{name}_var{number}"})
    complete = config.to_dict()
    differences = [change for change in changes(start, complete) if change.name not in ("experiment_name", "seed")]
    digest = hashlib.sha256(canonical_json(complete).encode()).hexdigest()[:8]
    return Suggestion(config, f"{file_stem(name)}_var{number}_{digest}.json", source, differences)


@dataclass(frozen=True)
class Fitted:
    """A past run with its values and distributions, as the sampler needs them."""

    run: PastRun
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]


def _suggest_by_tpe(
    past: Sequence[PastRun], template: Template, novelty: Novelty, request: Request
) -> list[Suggestion]:
    """Fit a sampler on all comparable runs and ask it for new configs.

    Each suggestion names the run that is nearest to it.
    """
    space, fitted = _fit(past, template, request)
    way = direction(request.metric_name)
    with _quiet():
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=MIN_FITTED,
            seed=derive_seed(request.seed, "suggestion") % 2**32,
            multivariate=True,
            group=True,
            constant_liar=True,
        )
        study = optuna.create_study(direction=way, sampler=sampler)
        for one in fitted:
            value, params, distributions = one.run.value, one.params, one.distributions
            study.add_trial(optuna.trial.create_trial(value=value, params=params, distributions=distributions))

        def draw(_tries: int) -> Config:
            trial = study.ask()  # the trial stays running, so that the sampler avoids values near it
            try:
                return space.search.sample(functools.partial(_ask, trial))
            except Infeasible:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise

        configs = _new_configs(draw, novelty, request.top_n * request.num_variations_per_config)
    best_first = sorted((one.run for one in fitted), key=lambda run: run.value, reverse=way == "maximize")
    found = []
    for number, config in enumerate(configs, 1):
        # `min` returns the first of equally near runs, which is the best of them.
        near = min(best_first, key=functools.partial(_distance, space, config.to_dict()))
        source = f"fitted on {len(fitted)} runs, nearest run {near.run_id} ({request.metric_name} {near.value:.4g})"
        found.append(_named(config, template.config.experiment_name, number, source, near.config))
    return found


def _fit(past: Sequence[PastRun], template: Template, request: Request) -> tuple[Space, list[Fitted]]:
    """The space around the best config, and the comparable finished runs inside it.

    A run is comparable if it has the same task and the same epochs and batch size, unless these are searched.
    Raises ConfigError if there are fewer than `MIN_FITTED`.
    """
    space = space_around(template.config, request.narrowing or {})
    searched = {parameter.name for parameter in space.parameters}
    same = [name for name in ("epochs", "batch_size") if name not in searched]
    best = template.runs[0]
    finished = [run for run in past if math.isfinite(run.value)]
    comparable = [
        run for run in finished if run.task == best.task and all(run.config[name] == best.config[name] for name in same)
    ]
    space = widened(space, [run.config for run in comparable])
    located = [(run, space.search.locate(run.config)) for run in comparable]
    fitted = [Fitted(run, *place) for run, place in located if place is not None]
    if len(fitted) < MIN_FITTED:
        raise ConfigError(
            f"--strategy tpe: {len(fitted)} of {len(finished)} finished runs have the dataset_params, epochs and batch "
            f"size of the best one and values inside the search space; at least {MIN_FITTED} are needed. "
            "Use --strategy perturb."
        )
    if len(fitted) < len(finished):
        left_out = len(finished) - len(fitted)
        log.info("%d finished runs are left out: another task or budget, or outside the search space", left_out)
    return space, fitted


def _ask(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """A value from the sampler; a real number is rounded, so that the file is easy to read."""
    value = adapter.suggest(trial, name, distribution)
    if isinstance(distribution, FloatDistribution) and not distribution.step:
        return min(max(rounded(value), distribution.low), distribution.high)
    return value


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide Optuna's report on every study, and its warnings of experimental parts."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with storage.experimental():
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distance(space: Space, config: Config, run: PastRun) -> float:
    """The distance of a config from a run: the sum of the differences of all parameters.

    The difference of two numbers is a share of their interval; that of two different choices is 1.
    """
    total = 0.0
    for parameter in space.parameters:
        left: Any = values_of(config, parameter).get(parameter.key)
        right: Any = values_of(run.config, parameter).get(parameter.key)
        domain = parameter.domain
        if isinstance(domain, Range) and is_number(left) and is_number(right) and domain.high > domain.low:
            scale: Callable[[float], float] = math.log if domain.log else float
            total += abs(scale(left) - scale(right)) / (scale(domain.high) - scale(domain.low))
        else:
            total += left != right
    return total
