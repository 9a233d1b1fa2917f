"""MLflow: one run for each stage. MLFLOW_TRACKING_URI names the server.

MLflow keeps every value that it receives. So a run that continues skips the steps of a metric that
MLflow already has, whose values are the same. A run that starts at step 0 again is a new one there.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from absl import logging

from rmjax.registry import setting
from rmjax.run.loggers import LoggerContext, not_installed, run_id

if TYPE_CHECKING:
    import mlflow


@dataclasses.dataclass(frozen=True)
class Settings:
    """Keys in the section `logger`."""

    project: str = setting("rmjax", doc="wandb: the project; mlflow: the experiment")


class Tracked:
    """A run at an MLflow server, see `rmjax.types.Logger`.

    A server that fails while the run trains causes a warning, not an error.

    Args:
      client: of the server.
      run: id of the run.
      metric: the class `mlflow.entities.Metric`.
      resumed: the stage continues, so the server may have some of its steps.
    """

    def __init__(self, client: mlflow.MlflowClient, run: str, metric: type, resumed: bool):
        self._client, self._run, self._metric, self._resumed = client, run, metric, resumed
        # The last step of each metric that the server has from before a stop.
        self._last: dict[str, int] = {}

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        """Sends the values that the server does not have yet."""
        # MLflow's names take letters, digits and a few marks.
        name_of = lambda name: re.sub(r"[^\w\-./ ]", "_", f"{kind}/{name}")
        named = {name_of(name): value for name, value in values.items()}
        milliseconds = int(1000 * time.time())
        try:
            fresh = {name: value for name, value in named.items() if step > self._known(name)}
            metrics = [
                self._metric(name, value, milliseconds, step) for name, value in fresh.items()
            ]
            self._client.log_batch(self._run, metrics=metrics)
        except Exception as error:  # the server and the network raise many kinds
            logging.warning("mlflow: step %d is not logged: %s", step, error)

    def _known(self, name: str) -> int:
        """The last step of a metric that the server has; -1 if none."""
        if self._resumed and name not in self._last:
            history = self._client.get_metric_history(self._run, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last.get(name, -1)

    def close(self) -> None:
        """Marks the run as finished."""
        try:
            self._client.set_terminated(self._run)
        except Exception as error:
            logging.warning("mlflow: the run is not marked as finished: %s", error)


def make(settings: Settings, context: LoggerContext) -> Tracked:
    """Builds the logger, see `rmjax.types.Logger`. The config is the run's artifact config.json.

    Args:
      settings: see `Settings`.
      context: of the stage. If it continues, so does its run at the server.

    Returns:
      The logger.

    Raises:
      ImportError: the package mlflow is missing.
    """
    try:
        import mlflow
        from mlflow.entities import Metric
    except ImportError as error:
        raise not_installed("mlflow") from error
    client = mlflow.MlflowClient()

    def create() -> str:
        known = client.get_experiment_by_name(settings.project)
        experiment = known.experiment_id if known else client.create_experiment(settings.project)
        name = f"{context.workdir.name} {context.stage}"
        run = client.create_run(experiment, run_name=name).info.run_id
        client.log_dict(run, context.config, "config.json")
        return run

    run = run_id(context, "mlflow", create)
    client.update_run(run, status="RUNNING")
    return Tracked(client, run, Metric, resumed=context.start_step > 0)
