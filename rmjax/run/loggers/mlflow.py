"""MLflow: a run for each stage. The server is that of MLFLOW_TRACKING_URI.

MLflow keeps every value that it is given. A run that goes on leaves out the steps that MLflow has of a metric, whose
values are the same. A run that starts at step 0 again is a new one there.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from rmjax.registry import setting
from rmjax.run.loggers import LoggerContext, not_installed, run_id


@dataclasses.dataclass(frozen=True)
class Settings:
    project: str = setting("rmjax", doc="wandb: the project; mlflow: the experiment")


class Tracked:
    """A run at an MLflow server. A server that fails while the run trains is a warning."""

    def __init__(self, client: Any, run: str, metric: type, resumed: bool):
        self._client, self._run, self._metric, self._resumed = client, run, metric, resumed
        self._last: dict[str, int] = {}  # step that the server has of a metric, from before a stop

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        # Names take letters, digits and a few marks.
        named = {
            re.sub(r"[^\w\-./ ]", "_", f"{kind}/{name}"): value for name, value in values.items()
        }
        milliseconds = int(1000 * time.time())
        try:
            fresh = {name: value for name, value in named.items() if step > self._known(name)}
            metrics = [
                self._metric(name, value, milliseconds, step) for name, value in fresh.items()
            ]
            self._client.log_batch(self._run, metrics=metrics)
        except Exception as error:  # of the server or of the network, which have many
            logging.warning("mlflow: step %d is not logged: %s", step, error)

    def _known(self, name: str) -> int:
        if self._resumed and name not in self._last:
            history = self._client.get_metric_history(self._run, name)
            self._last[name] = max((metric.step for metric in history), default=-1)
        return self._last.get(name, -1)

    def close(self) -> None:
        try:
            self._client.set_terminated(self._run)
        except Exception as error:
            logging.warning("mlflow: the run is not marked as finished: %s", error)


def make(settings: Settings, context: LoggerContext) -> Tracked:
    """Goes on with the stage's run, if it had begun. The config is its artifact config.json.

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
        run = client.create_run(
            experiment, run_name=f"{context.workdir.name} {context.stage}"
        ).info.run_id
        client.log_dict(run, context.config, "config.json")
        return run

    run = run_id(context, "mlflow", create)
    client.update_run(run, status="RUNNING")
    return Tracked(client, run, Metric, resumed=context.start_step > 0)
