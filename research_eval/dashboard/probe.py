"""What happens if an expert is taken away: evaluations of trained models with another routing.

The evaluations run in a process of their own (`python -m research_eval.dashboard.probe`), one at a time, with low
priority. It holds one model, reads a JSON object per line and writes one for each. Only this file imports torch.

S samples of the validation split  T steps of a path
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_eval.errors import ConfigError
from research_eval.files import run_folder

KINDS = ("none", "skip", "forbid", "swap", "path", "tokens")
SECONDS = 60.0  # for one evaluation
MOST_WAITING = 8
MOST_KEPT = 200  # results
NICE = 10


@dataclass(frozen=True)
class Probe:
    """One question: the run, what is changed, and where."""

    run: str
    kind: str = "none"
    expert: int | None = None
    to: int | None = None
    step: int | None = None
    path: tuple[int, ...] | None = None
    sample: int | None = None  # of "tokens": the experts of each of its tokens

    @classmethod
    def of(cls, run: str, body: Any) -> Probe:
        """From the body of a request. Raises ConfigError."""
        if not isinstance(body, dict) or body.get("kind") not in KINDS:
            raise ConfigError(f"kind: expected one of {', '.join(KINDS)}")
        numbers = {name: body.get(name) for name in ("expert", "to", "step", "sample")}
        path = body.get("path")
        whole = [*numbers.values(), *(path if isinstance(path, list) else [])]
        if any(value is not None and (type(value) is not int or not 0 <= value < 10**6) for value in whole):
            raise ConfigError("expert, to, step, sample and path: expected whole numbers from 0")
        needs = {"skip": ["expert"], "forbid": ["expert"], "swap": ["expert", "to"], "tokens": ["sample"]}
        needed = needs.get(body["kind"], [])
        if any(numbers[name] is None for name in needed) or (body["kind"] == "path") != isinstance(path, list):
            raise ConfigError(f"{body['kind']}: needs {' and '.join(needed) or 'no path'}")
        return cls(run, body["kind"], **numbers, path=tuple(path) if isinstance(path, list) else None)

    def change(self) -> dict[str, Any]:
        """The arguments of `intervene`."""
        found: dict[str, Any] = {"step": self.step}
        if self.kind in ("skip", "forbid"):
            found[self.kind] = [self.expert]
        if self.kind == "swap":
            found["swap"] = {self.expert: self.to}
        if self.kind == "path":
            found["path"] = self.path
        return found


class Busy(Exception):
    """Too many evaluations wait already, or the machine has other work."""


class Probes:
    """Asks the process, which is started by the first question, and keeps its answers."""

    def __init__(self, db: str | None) -> None:
        self._db = db
        self._turn, self._waiting = threading.Lock(), threading.Semaphore(MOST_WAITING)
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._known: OrderedDict[tuple[str, Probe], dict[str, Any]] = OrderedDict()

    def ask(self, probe: Probe, anyway: bool = False) -> dict[str, Any]:
        """The answer to a question. Raises ConfigError, and Busy unless the question comes `anyway`."""
        weights = run_folder(probe.run) / "model.safetensors"
        if not weights.is_file():
            raise ConfigError(f"run {probe.run}: its weights are not here. Only this machine's runs can be changed.")
        key = (f"{weights.stat().st_mtime_ns}", probe)
        if key in self._known:
            return self._known[key]
        if not anyway and os.getloadavg()[0] > (os.cpu_count() or 1):
            raise Busy("this machine has other work, which an evaluation would slow down")
        if not self._waiting.acquire(blocking=False):
            raise Busy(f"{MOST_WAITING} evaluations wait already")
        try:
            with self._turn:
                found = self._answer(probe)
        finally:
            self._waiting.release()
        self._known[key] = found
        while len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)
        return found

    def _answer(self, probe: Probe) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        question = {"folder": str(run_folder(probe.run)), "change": probe.change(), "sample": probe.sample}
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._lines.get(timeout=SECONDS))
        except (queue.Empty, OSError) as error:
            self.close()
            raise ConfigError(f"the evaluation took longer than {SECONDS:.0f} s, or its process ended") from error
        if "error" in answer:
            raise ConfigError(str(answer["error"]))
        return answer

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._lines = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "research_eval.dashboard.probe"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        threading.Thread(target=_collect, args=(self._process, self._lines), daemon=True).start()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _collect(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.put(line)
    except ValueError:  # the pipe was closed
        return


# -------------------------------------------------------------------------------------------------- in the process


class Evaluator:
    """One trained model with the validation split of its run."""

    def __init__(self, folder: Path) -> None:
        from research_eval.datasets.providers import load_splits
        from research_eval.runs.predict import TrainedModel, read_config
        from research_eval.tasks.base import task_of

        config = read_config(folder)
        self.trained = TrainedModel(folder, "cpu")
        data = load_splits(
            config.dataset_type,
            config.dataset_name,
            config.dataset_params,
            config.seed,
            **({} if self.trained.tokenizer is None else {"tokenizer": self.trained.tokenizer}),
        )
        self.task = task_of(config.task, data)
        self.num_outputs = self.task.num_outputs(data)
        self.batches = data.validation.batches(config.training_params.eval_batch_size or config.batch_size, "cpu")
        self.runtime = self.trained._runtime

    def answer(self, change: Mapping[str, Any]) -> dict[str, Any]:
        """The evaluation with this change: answers and paths of all samples, in the order of the split."""
        import numpy as np

        from research_eval.dashboard.atlas import packed
        from research_eval.training.evaluate import evaluate

        begun, model = time.monotonic(), self.trained.model
        model.eval()
        with model.intervene(**change):
            found = evaluate(model, self.batches, self.num_outputs, self.runtime, self.task)
        if found.correct_N is None or found.answers_N is None:
            raise ConfigError("the task has no right answers to count")
        order_S = np.argsort(found.rows_N)
        paths_ST = model.recorded_paths()
        columns = {"correct": found.correct_N[order_S].astype(np.uint8)}
        columns["prediction"] = found.answers_N[order_S].astype(np.int16)
        if paths_ST is not None:
            columns["path"] = paths_ST[order_S].astype(np.int16)
        return {
            "accuracy": found.accuracy,
            "steps": 0 if paths_ST is None else paths_ST.shape[1],
            "seconds": round(time.monotonic() - begun, 3),
            "columns": {name: packed(column) for name, column in columns.items()},
        }

    def tokens(self, sample: int) -> dict[str, Any]:
        """The expert with the most weight of each token of one sample, for every layer [T][L]."""
        import numpy as np
        import torch

        from research_eval.models.base_model import logits_of

        model = self.trained.model
        recorder = model.recorder()
        if not 0 <= sample < len(self.batches.data):
            raise ConfigError(f"sample: expected a number below {len(self.batches.data)}, got {sample}")
        model.eval()
        model.start_recording()
        with torch.no_grad():
            logits_of(model, self.batches.take(np.array([sample])))
        if recorder is None or not recorder.is_about_tokens():
            raise ConfigError("this model does not choose experts for tokens")
        layers = []
        for layer in range(recorder.num_steps):
            _, token_D, expert_D = recorder.token_choices(layer)
            layers.append(expert_D[np.argsort(token_D)].tolist())
        return {"layers": layers}


def main() -> None:
    """Answer questions until the standard input ends."""
    if hasattr(os, "nice"):
        os.nice(NICE)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not stand among the answers
    folder, evaluator = "", None
    for line in sys.stdin:
        try:
            question = json.loads(line)
            if question["folder"] != folder or evaluator is None:
                evaluator, folder = Evaluator(Path(question["folder"])), question["folder"]
            if question["sample"] is None:
                change = question["change"]
                answer = evaluator.answer(change | {"swap": _numbered(change.get("swap"))})
            else:
                answer = evaluator.tokens(question["sample"])
        except Exception as problem:  # whatever happens is the answer
            answer = {"error": f"{problem}" or type(problem).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _numbered(swap: Mapping[str, int] | None) -> dict[int, int] | None:
    """JSON has texts as keys."""
    return None if swap is None else {int(key): value for key, value in swap.items()}


if __name__ == "__main__":
    main()
