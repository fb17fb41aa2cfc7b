"""By baseline: a stream's tasks learnt by the configured baseline, which records no entries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import PreTrainedModel

from flows.identity import task_seed
from flows.learning import Learner, Outcome, Work, failed_audit, fit
from flows.setting import Setting
from flows.standing import Standing
from flows.tracking import Tracker
from neft.audit import WeightAudit, trained_weights
from neft.baselines import Baseline


@dataclass
class ByBaseline(Learner):
    """Learns each task by `baseline`, in one model."""

    baseline: Baseline
    setting: Setting
    standing: Standing
    tracker: Tracker
    #: The weights before the task, since no entries can give them back.
    _before: dict[str, torch.Tensor] | None = field(init=False, default=None)

    def begin(self, work: Work) -> None:
        if self.setting.config.on_failure == "skip":
            self._before = {name: tensor.cpu().clone() for name, tensor in self.standing.model.state_dict().items()}

    def train(self, work: Work) -> Outcome:
        standing, seed = self.standing, task_seed(self.setting, work.task)
        audit = WeightAudit(standing.model)
        prepared = self.baseline.prepare(standing.model, seed)
        trained = trained_weights(prepared)
        guard = self.baseline.guard(prepared)
        result = fit(prepared, standing.tokenizer, work, self.setting, self.tracker, guard)
        standing.model = cast(PreTrainedModel, self.baseline.finish(prepared))
        found = audit.compare(standing.model, trained)
        if not found.identical:
            raise failed_audit(work.task, found, "that its baseline does not train")
        length = self.setting.config.training.max_length
        self.baseline.remember(standing.model, standing.tokenizer, work.task, length, seed)
        standing.settle()
        return Outcome(result, found)

    def roll_back(self, work: Work) -> None:
        """Nothing is kept to go back to where a failed task stops the stream."""
        before = self._before
        if before is not None:
            self.standing.bring_back(work.task.name, lambda model: model.load_state_dict(before))
