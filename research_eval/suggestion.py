"""New configs from past runs: steps away from the best ones, or what a TPE sampler makes of all of them.

A suggestion is a complete config that was checked, and rehearsed where its data can be made. Nobody has run it before,
whatever became of the run, and no other suggestion is the same; names, seeds and settings that do not change what is
computed make no difference.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from research_eval.analysis.runs import OPERATIONAL
from research_eval.annotations import INT_MAX, Range
from research_eval.db_utils import RunRow, Store, canonical_json
from research_eval.errors import ConfigError
from research_eval.files import file_stem, write_atomically
from research_eval.metrics import DEFAULT_METRIC, check_selectable, direction
from research_eval.perturbation import Config, Space, is_number, perturbed, rounded, space_around, values_of, widened
from research_eval.schema import ExperimentConfig, config_from_dict
from research_eval.search_space import Infeasible
from research_eval.seeding import derive_seed
from research_eval.store_tools import Change, changes, check_metric
from research_eval.system.untrusted import stored_object
from research_eval.wording import hint

if TYPE_CHECKING:
    import optuna

    from research_eval.datasets.token_data import DataSplits

log = logging.getLogger(__name__)

STRATEGIES = ("perturb", "tpe")
DEFAULT_MAGNITUDE = 0.1
MAX_TRIES = 300  # draws in search of one new config
MAX_SUGGESTIONS = 1000  # of one config, or of one sampler
TRIES_PER_STEP = 50  # without a new one, after which the way from the template gets a step longer
MIN_FITTED = 2  # runs below which a sampler has nothing to compare
REHEARSED_SAMPLES = 4096
KNOWN = "what was drawn has been run, suggested or turned down before"


@dataclass(frozen=True)
class Request:
    """What is asked for. `narrowing` is the content of a search space file. Raises ConfigError."""

    dataset_name: str
    model_type: str
    metric_name: str = DEFAULT_METRIC
    top_n: int = 3
    num_variations_per_config: int = 2
    perturbation_magnitude: float = DEFAULT_MAGNITUDE
    strategy: str = "perturb"
    seed: int = 0
    narrowing: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
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
class PastRun:
    """A run with its complete config and its value of the metric; NaN where it has none, as when it is not finished."""

    run_id: str
    config: Config
    value: float

    @property
    def identity(self) -> str:
        return identity(self.config)

    @property
    def task(self) -> str:
        params = self.config["dataset_params"]
        return canonical_json({key: value for key, value in params.items() if key != "data_dir"})


@dataclass(frozen=True)
class Template:
    """A past config that does well: its runs with different seeds, the newest of each."""

    config: ExperimentConfig
    runs: list[PastRun]
    mean: float


@dataclass(frozen=True)
class Suggestion:
    """A new config, where it comes from in words, and what differs there."""

    config: ExperimentConfig
    file_name: str
    source: str
    changes: list[Change]

    def to_json(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2) + "\n"


def suggest(store: Store, request: Request) -> list[Suggestion]:
    """At least one new config and at most `top_n` * `num_variations_per_config`. Raises ConfigError."""
    rows = store.runs(request.dataset_name, [request.metric_name])
    past = past_runs([row for row in rows if row.model_type == request.model_type], request.metric_name)
    templates = find_templates(past, request)
    if not templates:
        raise _nothing_to_start_from(store, rows, request)
    novelty = Novelty(past)
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


def write_suggestions(suggestions: Sequence[Suggestion], folder: Path) -> list[Path]:
    """One file each; the same ones may be there already. Raises ConfigError for a file that was changed since."""
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


# ------------------------------------------------------------------------------------------------------ past runs


def past_runs(rows: Iterable[RunRow], metric: str) -> list[PastRun]:
    """The runs whose configs the program still takes, oldest first.

    A stored config is complete, unless an earlier program stored it: then what it leaves out is filled in.
    """
    found: list[PastRun] = []
    complete: set[str] = set()  # keys of configs that were found to be complete: checking takes a hundred times as long
    refused: list[str] = []
    for row in rows:
        config = _object(row.config_json)
        if _keys(config) not in complete:
            try:
                checked = config_from_dict(config, source=f"run {row.experiment_id}").to_dict()
            except ConfigError as error:
                refused.append(str(error))
                continue
            if _keys(checked) == _keys(config):
                complete.add(_keys(config))
            config = checked
        value = row.metrics.get(metric, math.nan) if row.status == "finished" else math.nan
        found.append(PastRun(row.experiment_id, config, value))
    if refused:
        log.warning("%d runs have configs that the program does not take, the first:\n%s", len(refused), refused[0])
    return found


def _object(text: str) -> Config:
    return stored_object(text)


def _keys(config: Config) -> str:
    return canonical_json({key: sorted(value) if isinstance(value, dict) else None for key, value in config.items()})


def identity(config: Config) -> str:
    """Equal text for complete configs that compute the same but for the seed."""
    kept = {key: value for key, value in config.items() if key not in ("seed", "experiment_name")}
    training = {key: value for key, value in config["training_params"].items() if key not in OPERATIONAL}
    return canonical_json({**kept, "training_params": training})


def find_templates(past: Sequence[PastRun], request: Request) -> list[Template]:
    """The best different configs by the mean of their seeds, best first; of equally good ones the older first."""
    seeds: dict[str, dict[int, PastRun]] = {}
    for run in past:
        if math.isfinite(run.value):
            seeds.setdefault(run.identity, {})[run.config["seed"]] = run
    sign = -1 if direction(request.metric_name) == "maximize" else 1
    groups = [[by_seed[seed] for seed in sorted(by_seed)] for by_seed in seeds.values()]
    ranked = sorted(((fmean(run.value for run in runs), runs) for runs in groups), key=lambda one: sign * one[0])
    templates = [Template(config_from_dict(runs[0].config), runs, mean) for mean, runs in ranked[: request.top_n]]
    tasks = {template.runs[0].task for template in templates}
    if len(tasks) > 1:
        log.warning("the best configs have %d different dataset_params: their scores do not compare", len(tasks))
    return templates


def _nothing_to_start_from(store: Store, rows: Sequence[RunRow], request: Request) -> ConfigError:
    """Says what there is instead."""
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


class Novelty:
    """Knows which configs have been run or suggested, and why others were turned down."""

    def __init__(self, past: Iterable[PastRun]) -> None:
        self._known = {run.identity for run in past}
        self._tried: set[str] = set()
        self._reasons = Counter[str]()

    def admit(self, config: Config) -> ExperimentConfig | None:
        """The checked config if it is new and runs; it counts as suggested then."""
        text = canonical_json(config)
        if text in self._tried:
            self.turn_down(KNOWN)
            return None
        self._tried.add(text)
        try:
            checked = config_from_dict(config, source="suggestion")
        except ConfigError as error:
            self.turn_down(str(error))
            return None
        key = identity(checked.to_dict())
        problem = KNOWN if key in self._known else rehearse(checked)
        if problem is not None:
            self.turn_down(problem)
            return None
        self._known.add(key)
        return checked

    def turn_down(self, reason: str) -> None:
        self._reasons[reason] += 1

    def reason(self) -> str:
        """The most frequent one."""
        ((reason, _),) = self._reasons.most_common(1)
        return reason


# ---------------------------------------------------------------------------------------------- does a config run?


def rehearse(config: ExperimentConfig) -> str | None:
    """Why the model cannot make a training step, None if it can; real-world data, which may be elsewhere, is not read.

    A model may ask more of the data than its constructor knows, as a given route does.
    """
    if config.dataset_type != "synthetic":
        return None
    import torch

    from research_eval.datasets.token_data import Batches
    from research_eval.experiment import create_model
    from research_eval.models.base_model import adapt, auxiliary_terms, logits_of

    data = _splits_of(config.dataset_name, canonical_json(config.dataset_params), config.seed)
    context = {name: getattr(data, name) for name in ("vocab_size", "num_classes", "padding_idx", "max_length")}
    samples = np.arange(min(len(data.train), REHEARSED_SAMPLES))
    batches = Batches(data.train, config.batch_size)
    try:
        with torch.random.fork_rng(devices=[]):
            params = config.model_params
            model = adapt(create_model(config.model_type, params, context, torch.device("cpu")), config.model_type)
            model.prepare(batches.take(samples))
            batch = batches.take(samples[: config.batch_size])
            loss = model.task_loss(logits_of(model, batch), batch.labels)
            sum((term.weight * term.raw for term in auxiliary_terms(model).values()), start=loss).backward()
    except Exception as problem:  # of a foreign class, anything: such a config is not suggested
        log.debug("rehearsal", exc_info=True)
        return f"{type(problem).__name__}: {problem}" if not isinstance(problem, ConfigError) else str(problem)
    return None


@functools.lru_cache(maxsize=1)
def _splits_of(dataset_name: str, params: str, seed: int) -> DataSplits:
    """Those of a template, for all its variations."""
    from research_eval.datasets.providers import load_splits

    return load_splits("synthetic", dataset_name, json.loads(params), seed)


# ------------------------------------------------------------------------------------------------------ strategies


def _suggest_by_steps(templates: Sequence[Template], novelty: Novelty, request: Request) -> list[Suggestion]:
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
    """A step away from the config, more of them where all around it is known."""
    config = start
    for _ in range(1 + tries // TRIES_PER_STEP):
        config = perturbed(config, space, magnitude, rng)
    return config


def _new_configs(draw: Callable[[int], Config], novelty: Novelty, wanted: int) -> list[ExperimentConfig]:
    """The first `wanted` new ones of what `draw` gives, or as many as were found.

    It is told how often it has failed since the last one.
    """
    found: list[ExperimentConfig] = []
    tries = 0
    while len(found) < wanted and tries < MAX_TRIES:
        try:
            config = novelty.admit(draw(tries))
        except Infeasible as problem:
            novelty.turn_down(str(problem))
            config = None
        tries += 1
        if config is not None:
            found.append(config)
            tries = 0
    return found


def _named(config: ExperimentConfig, name: str, number: int, source: str, start: Config) -> Suggestion:
    config = config.model_copy(update={"experiment_name": f"{name}_var{number}"})
    complete = config.to_dict()
    differences = [change for change in changes(start, complete) if change.name not in ("experiment_name", "seed")]
    digest = hashlib.sha256(canonical_json(complete).encode()).hexdigest()[:8]
    return Suggestion(config, f"{file_stem(name)}_var{number}_{digest}.json", source, differences)


@dataclass(frozen=True)
class Fitted:
    """A past run as the sampler sees it."""

    run: PastRun
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]


def _suggest_by_tpe(
    past: Sequence[PastRun], template: Template, novelty: Novelty, request: Request
) -> list[Suggestion]:
    import optuna

    space, fitted = _fit(past, template, request)
    way = direction(request.metric_name)
    with _quiet(optuna):
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
            trial = study.ask()  # stays running: the sampler keeps away from what it has given already
            try:
                return space.search.sample(functools.partial(_ask, trial))
            except Infeasible:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise

        configs = _new_configs(draw, novelty, request.top_n * request.num_variations_per_config)
    worst_last = sorted((one.run for one in fitted), key=lambda run: run.value, reverse=way == "maximize")
    found = []
    for number, config in enumerate(configs, 1):  # of equally near runs the best, which is the first
        near = min(worst_last, key=functools.partial(_distance, space, config.to_dict()))
        source = f"fitted on {len(fitted)} runs, nearest run {near.run_id} ({request.metric_name} {near.value:.4g})"
        found.append(_named(config, template.config.experiment_name, number, source, near.config))
    return found


def _fit(past: Sequence[PastRun], template: Template, request: Request) -> tuple[Space, list[Fitted]]:
    """The space around the best config, and the finished runs of its task, epochs and batch size that lie in it."""
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
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        low, high = distribution.low, distribution.high
        return trial.suggest_int(name, low, high, step=distribution.step, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    least, most, step = distribution.low, distribution.high, distribution.step
    value = trial.suggest_float(name, least, most, step=step, log=distribution.log)
    return value if step else min(max(rounded(value), least), most)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's report on every study, and its warnings of what is experimental."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distance(space: Space, config: Config, run: PastRun) -> float:
    """The sum over the parameters of their differences: shares of an interval, 1 for other choices."""
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
