"""The search of ``dct tune``: by Optuna, whose study is kept in a file, or by Ray Tune."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dct_compile.cli.tune_space import Choice, Range, Space, defaults
from dct_compile.cli.tune_trial import TrialError
from dct_compile.tuning import Measured

Run = Callable[[Mapping[str, Any], str], Measured]
"""Trains with options, under the name of a trial. Raises ``TrialError``."""
Tell = Callable[[int, Mapping[str, Any], Measured | str], None]
"""Is told the number of a trial, its options, and its numbers or its error."""


@dataclass(frozen=True)
class Tried:
    """A trial that has ended well. ``seconds``: of a step, with those that the assumed link adds."""

    options: dict[str, Any]
    measured: Measured
    seconds: float


@dataclass(frozen=True)
class Goal:
    """The fewest seconds at a loss of at most ``bound``. ``seconds``: of a training's step."""

    bound: float
    seconds: Callable[[Measured], float]

    def best(self, tried: list[Tried]) -> Tried | None:
        """Returns the trial with the fewest seconds of those within the bound, if there is one."""
        return min((trial for trial in tried if trial.measured.loss <= self.bound), key=lambda trial: trial.seconds, default=None)


def front(tried: list[Tried]) -> list[Tried]:
    """Returns the trials to which no other one is preferable in both seconds and loss, by seconds."""
    found: list[Tried] = []
    for trial in sorted(tried, key=lambda trial: (trial.seconds, trial.measured.loss)):
        if not found or trial.measured.loss < found[-1].measured.loss:
            found.append(trial)
    return found


class OptunaStudy:
    """A study in a SQLite file: a second run goes on where the first one has ended.

    Args:
        path: The file.
        name: Names all that two runs must have in common.
        seed: Of the sampler.
    """

    def __init__(self, path: Path, name: str, seed: int) -> None:
        import optuna

        self._optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = f"sqlite:///{path.resolve()}"
        self.study = optuna.create_study(study_name=name, storage=storage, directions=["minimize", "minimize"], load_if_exists=True)
        # The same seed after a restart would draw the same options again.
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + len(self.study.trials))
        for trial in self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # of a run that was interrupted
            self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self.study.enqueue_trial(trial.params)

    def dense(self, run: Callable[[], Measured]) -> Measured:
        """Returns the numbers of the dense training, which is run once per study."""
        if "dense" not in self.study.user_attrs:
            self.study.set_user_attr("dense", asdict(run()))
        return _measured(self.study.user_attrs["dense"])

    def search(self, space: Space, run: Run, goal: Goal, trials: int, tell: Tell) -> list[Tried]:
        """Tries options until the study has ``trials`` trials, failed ones included, and returns those that have ended well."""
        if not self.study.trials:
            self.study.enqueue_trial({name: _known(space[name], value) for name, value in defaults(space).items()})
        while len(self._ended()) < trials:
            trial = self.study.ask()
            options = {name: _suggest(trial, name, values) for name, values in space.items()}
            trial.set_user_attr("options", json.dumps(options))
            try:
                measured = run(options, f"{trial.number:04}")
            except TrialError as error:
                trial.set_user_attr("error", str(error))
                self.study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                tell(trial.number, options, str(error))
                continue
            trial.set_user_attr("measured", asdict(measured))
            trial.set_constraint("loss", measured.loss - goal.bound)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
                self.study.tell(trial, [goal.seconds(measured), measured.loss])
            tell(trial.number, options, measured)
        found = [trial for trial in self._ended() if "measured" in trial.user_attrs]
        pairs = [(json.loads(trial.user_attrs["options"]), _measured(trial.user_attrs["measured"])) for trial in found]
        return [Tried(options, measured, goal.seconds(measured)) for options, measured in pairs]

    def _ended(self) -> list[Any]:
        """Returns the trials that have ended well or with an error of their own, not those that were interrupted."""
        return [trial for trial in self.study.trials if trial.user_attrs.keys() & {"measured", "error"}]


def search_with_ray(folder: Path, space: Space, run: Run, goal: Goal, trials: int, tell: Tell) -> list[Tried]:
    """Tries ``trials`` options at random, one after the other, by Ray Tune, and returns those that have ended well."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # the target and the folder may be relative paths
    from ray import tune

    def trainable(config: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_id()
        tune.report({"measured": asdict(run(config, name))})

    drawn = {
        name: tune.choice(list(values.values)) if isinstance(values, Choice) else tune.loguniform(values.low, values.high)
        for name, values in space.items()
    }
    config = tune.TuneConfig(num_samples=trials, max_concurrent_trials=1)
    storage = tune.RunConfig(name="ray", storage_path=str(folder.resolve()), verbose=0)
    tried = []
    for number, result in enumerate(tune.Tuner(trainable, param_space=drawn, tune_config=config, run_config=storage).fit()):
        options = dict(result.config or {})
        if result.error is not None or not result.metrics:
            tell(number, options, str(result.error))
            continue
        measured = _measured(result.metrics["measured"])
        tell(number, options, measured)
        tried.append(Tried(options, measured, goal.seconds(measured)))
    return tried


def _suggest(trial: Any, name: str, values: Range | Choice) -> Any:
    if isinstance(values, Choice):
        return json.loads(trial.suggest_categorical(name, [_known(values, value) for value in values.values]))
    return trial.suggest_float(name, values.low, values.high, log=True)


def _known(values: Range | Choice, value: Any) -> Any:
    """Returns a value as Optuna has it: of a choice as JSON, since it keeps plain values alone."""
    return json.dumps(value) if isinstance(values, Choice) else value


def _measured(values: Mapping[str, Any]) -> Measured:
    return Measured(**{**values, "kinds": tuple(values["kinds"])})
