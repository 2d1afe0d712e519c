"""Reading the trials of a study.

Optuna makes an object of every row of six tables, which takes most of the time that a new worker needs for a large
study. This file reads the same rows as tuples, and reads each distribution once.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Connection

_trials = models.TrialModel.__table__
_params = models.TrialParamModel.__table__
_values = models.TrialValueModel.__table__
_scores = models.TrialIntermediateValueModel.__table__
_user, _system = models.TrialUserAttributeModel.__table__, models.TrialSystemAttributeModel.__table__

_read_value = models.TrialValueModel.stored_repr_to_value
_read_score = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value


@functools.lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    """The distribution, which all trials share: nobody may change it."""
    return json_to_distribution(text)


def read_trials(
    connection: Connection, study_id: int, after: int = -1, also: Collection[int] = ()
) -> list[FrozenTrial]:
    """The trials whose ids are greater than `after` or in `also`, by id."""
    wanted: sa.ColumnElement[bool] = _trials.c.study_id == study_id
    if after >= 0:
        # The ids are part of the text, because a query may have only so many parameters.
        ids: sa.BindParameter[Any] = sa.bindparam("ids", sorted(also), expanding=True, literal_execute=True)
        wanted &= (_trials.c.trial_id > after) | _trials.c.trial_id.in_(ids)

    def rows(table: Any, order: Any, *columns: Any) -> Iterator[Any]:
        query = sa.select(table.c.trial_id, *columns).join(_trials, _trials.c.trial_id == table.c.trial_id)
        yield from connection.execute(query.where(wanted).order_by(order))

    # The trials are read first: whoever ends a trial has written all else before.
    query = sa.select(
        *(_trials.c.trial_id, _trials.c.number, _trials.c.state, _trials.c.datetime_start, _trials.c.datetime_complete)
    )
    trials = connection.execute(query.where(wanted).order_by(_trials.c.trial_id)).all()
    params: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    distributions: defaultdict[int, dict[str, BaseDistribution]] = defaultdict(dict)
    for trial, name, value, text in rows(
        _params, _params.c.param_id, _params.c.param_name, _params.c.param_value, _params.c.distribution_json
    ):
        distributions[trial][name] = _distribution(text)
        params[trial][name] = distributions[trial][name].to_external_repr(value)
    values: defaultdict[int, list[float]] = defaultdict(list)
    for trial, value, kind in rows(_values, _values.c.objective, _values.c.value, _values.c.value_type):
        values[trial].append(_read_value(value, kind))
    scores: defaultdict[int, dict[int, float]] = defaultdict(dict)
    columns = (_scores.c.step, _scores.c.intermediate_value, _scores.c.intermediate_value_type)
    for trial, step, value, kind in rows(_scores, _scores.c.step, *columns):
        scores[trial][step] = _read_score(value, kind)
    attributes: list[defaultdict[int, dict[str, Any]]] = []
    for table in (_user, _system):
        attributes.append(defaultdict(dict))
        for trial, key, text in rows(table, table.c.trial_id, table.c.key, table.c.value_json):
            attributes[-1][trial][key] = json.loads(text)
    user, system = attributes
    return [
        FrozenTrial(
            number=number,
            state=state,
            value=None,
            values=values.get(trial),
            datetime_start=started,
            datetime_complete=completed,
            params=params[trial],
            distributions=distributions[trial],
            user_attrs=user[trial],
            system_attrs=system[trial],
            intermediate_values=scores[trial],
            trial_id=trial,
        )
        for trial, number, state, started, completed in trials
    ]
